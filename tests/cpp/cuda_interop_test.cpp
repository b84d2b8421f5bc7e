// What the CUDA backend shares with others in its process, on the emulator: a stream of theirs that
// its work is asked for on, and memory of its own that they read.
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

namespace {

// Memory that is watched: whether it was released, and whether before its reader had come to it.
struct Watched {
  const void* memory = nullptr;
  bool was_read = false, released = false, too_early = false;
  float seen = 0;
} watched;

const cuda::DeviceTable& watching_table() {
  static const cuda::DeviceTable table = [] {
    cuda::DeviceTable made = emulator::device_table();
    made.release = [](void* device, void* memory) {
      if (memory == watched.memory) {
        watched.released = true;
        watched.too_early = !watched.was_read;
      }
      return emulator::device_table().release(device, memory);
    };
    return made;
  }();
  return table;
}

std::unique_ptr<Backend> watched_backend() {
  return make_cuda_backend(watching_table(), 0, make_cpu_backend({"", 1}));
}

// Memory that others use, with a value.
Buffer shared_memory(Backend& backend, float value) {
  Buffer memory = backend.allocate_shared(sizeof(float));
  backend.from_host({memory.floats(), 1, 1}, &value);
  backend.to_host(nullptr, {});
  watched = {memory.data()};
  return memory;
}

// What a user asks a stream for, who then may let go of the memory.
void read_on(void* stream) {
  emulator::ask_stream(stream, [] {
    watched.was_read = true;
    watched.seen = *static_cast<const float*>(watched.memory);
  });
}

}  // namespace

TEST(shared_memory_is_released_when_its_users_have_come_to_it) {
  void* const stream = emulator::make_stream(0);
  const auto backend = watched_backend();
  CHECK(backend->gpu() == 0);
  Buffer memory = shared_memory(*backend, 42);
  read_on(stream);
  memory = {};
  CHECK(!watched.released && !watched.was_read);
  // While they cannot be waited for, it stays.
  emulator::set_everybody_fails(true);
  backend->to_host(nullptr, {});
  CHECK(!watched.released);
  emulator::set_everybody_fails(false);
  backend->to_host(nullptr, {});
  CHECK(watched.released && !watched.too_early);
  CHECK_EQ(watched.seen, 42.0f);
  emulator::destroy_stream(stream);
}

TEST(shared_memory_outlives_the_backend_and_nothing_else_does) {
  void* const stream = emulator::make_stream(0);
  auto backend = watched_backend();
  Buffer memory = shared_memory(*backend, 7);
  Buffer ours = backend->allocate(64);
  // Noted, and never started.
  const Rows rows(ours.floats(), 1, 8);
  backend->gather(rows, rows, std::vector<int32_t>{0});
  backend.reset();
  CHECK(!watched.released);
  CHECK_EQ(*memory.floats(), 7.0f);
  const Watched shared = watched;
  watched = {ours.data(), true};
  ours = {};
  CHECK(watched.released);
  watched = shared;
  read_on(stream);
  memory = {};
  CHECK(watched.released && !watched.too_early);
  CHECK_EQ(watched.seen, 7.0f);
  emulator::destroy_stream(stream);
}
