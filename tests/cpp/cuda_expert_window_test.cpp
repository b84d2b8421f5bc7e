// The window that matrices of the host's memory come through: what kernels find at a place is the
// matrix that they were noted for, whoever is early or late, the copies or the kernels.
#include <algorithm>

#include "backend/cuda/expert_window.h"
#include "cuda_subjects.h"

using namespace fixture;

namespace {

WeightRef random_bytes(std::mt19937& random, size_t bytes) {
  const std::shared_ptr<uint32_t[]> data(new uint32_t[bytes / 4 + 1]);
  for (size_t i = 0; i <= bytes / 4; ++i) data[i] = static_cast<uint32_t>(random());
  return {WeightFormat::kInt8G32, 1, static_cast<int64_t>(bytes), bytes, data};
}

}  // namespace

TEST(the_window_has_the_matrix_whose_turn_it_is) {
  const auto host = make_cpu_backend({"", 2});
  for (const bool late : {false, true}) {
    emulator::set_late(late);
    std::mt19937 random(31);
    const auto device = std::make_shared<CudaDevice>(emulator::device_table(), 0, size_t{8});
    ExpertWindow window;
    constexpr size_t kPiece = ExpertWindow::kPieceBytes;
    // Of several pieces, more of them than are on their way at a time; then larger ones, so that
    // the window grows; then smaller.
    for (const std::vector<size_t>& sizes :
         std::vector<std::vector<size_t>>{{kPiece + 5, 7, 2 * kPiece, kPiece - 1, 100},
                                          {100, 3 * kPiece + 1, 2 * kPiece + 3},
                                          {12, 13, 14, 15}}) {
      std::vector<WeightRef> matrices;
      std::vector<std::shared_ptr<void>> seen;
      for (const size_t bytes : sizes) {
        matrices.push_back(random_bytes(random, bytes));
        seen.push_back(device->allocate(bytes));
      }
      window.each(*device, *host, matrices, [&](size_t i, const void* place) {
        device->copy(seen[i].get(), place, sizes[i]);
      });
      for (size_t i = 0; i < sizes.size(); ++i) {
        std::vector<char> got(sizes[i]);
        device->download(got.data(), seen[i].get(), sizes[i], sizes[i], 1);
        CHECK(std::equal(got.begin(), got.end(), static_cast<const char*>(matrices[i].data.get())));
      }
    }
  }
  emulator::set_late(false);
}
