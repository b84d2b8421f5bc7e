// What the CUDA backend shares with others in its process, on the emulator: a stream of theirs that
// its work is asked for on.
#include <memory>
#include <string>

#include "backend/cpu/cpu_backend.h"
#include "backend/cuda/cuda_backend.h"
#include "check.h"
#include "emulator/device.h"

using namespace puna;

namespace {

constexpr int64_t kRows = 3, kCols = 40;

std::unique_ptr<Backend> backend_on(int ordinal, std::shared_ptr<void> stream) {
  return make_cuda_backend(emulator::device_table(), ordinal, make_cpu_backend({"", 1}), 0,
                           std::move(stream));
}

// A stream that is destroyed with its last owner; `*released` tells.
std::shared_ptr<void> owned_stream(int ordinal, bool* released) {
  return {emulator::make_stream(ordinal), [released](void* stream) {
            emulator::destroy_stream(stream);
            *released = true;
          }};
}

// Rows that are gathered several times over, in batches that become graphs.
std::vector<float> computed_by(Backend& backend) {
  std::vector<float> values(kRows * kCols);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  const std::vector<int32_t> order = {2, 0, 1};
  const Buffer from = backend.allocate(values.size() * 4), to = backend.allocate(values.size() * 4);
  const Rows rows(from.floats(), kRows, kCols), moved(to.floats(), kRows, kCols);
  backend.from_host(rows, values.data());
  for (int pass = 0; pass < 3; ++pass) {
    backend.gather(moved, rows, order);
    backend.gather(rows, moved, order);
    backend.to_host(values.data(), rows);
  }
  return values;
}

}  // namespace

TEST(work_is_asked_for_on_the_stream_that_is_given) {
  for (const bool late : {false, true}) {
    emulator::set_late(late);
    bool released = false;
    const std::vector<float> expected = computed_by(*backend_on(1, {}));
    std::shared_ptr<void> stream = owned_stream(1, &released);
    const void* const handle = stream.get();
    Buffer kept;
    {
      const auto backend = backend_on(1, std::move(stream));
      CHECK(computed_by(*backend) == expected);
      const int64_t asked = emulator::asked(handle);
      // Three passes of an upload for each of two tables, two kernels, and some memory.
      CHECK(asked >= 12);
      computed_by(*backend_on(1, {}));
      CHECK_EQ(emulator::asked(handle), asked);
      kept = backend->allocate(64);
    }
    // Memory lies in its order, too; and closing the device waits for it.
    CHECK(!released);
    kept = {};
    CHECK(released);
  }
  emulator::set_late(false);
}

TEST(a_stream_of_another_device_is_refused) {
  bool released = false;
  try {
    backend_on(0, owned_stream(2, &released));
    CHECK(false);
  } catch (const Error& error) {
    const std::string message = error.what();
    CHECK_EQ(static_cast<int>(error.code()), static_cast<int>(ErrorCode::kInvalidRequest));
    CHECK_EQ(std::string(error.facts().param), "stream");
    CHECK(message.find("stream is of cuda:2 and the device is cuda:0") != std::string::npos);
  }
  CHECK(released);
  // Nor what is no stream.
  int nothing = 0;
  CHECK_THROWS(ErrorCode::kDevice, backend_on(0, {&nothing, [](void*) {}}));
}
