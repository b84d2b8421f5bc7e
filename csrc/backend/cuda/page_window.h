// Pages that the device's memory does not hold: they come through streams from the host, and lie in
// a window of the device's memory while kernels read them: in one half of it, while those that come
// next are sent to the other.
//
// Kernels do not read the host's memory by themselves: of a prompt, every tile of queries would
// read each page again, and a link is the slowest of all that is between a page and a
// multiprocessor. A copy of each page goes over it once.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "backend/cuda/device.h"
#include "backend/cuda/sent_places.h"

namespace puna {

class PageWindow {
 public:
  // What serves one window after the other.
  struct Memory {
    CudaScratch pages;
    SentPlaces halves;
    CudaDevice::Event
        come[SentPlaces::kCount];  // by half: copies of its pages are done, all of them
  };

  // `memory` is taken where a segment has a stream: pages of `page_bytes`.
  PageWindow(CudaDevice& device, Memory& memory, std::span<const AttentionSegment> segments,
             size_t page_bytes);

  // Where page `index` of the stream will lie when it is its turn.
  const void* place(KvStream* stream, int64_t index);
  // Whether any was placed.
  bool used() const { return last_ > 0; }
  // attend(first, count): notes kernels that read so many pages of all segments, whose turn it is.
  // All `pages` pages have their turn once, in order, also when this is called again. Ranges begin
  // at multiples of kHalf.
  void each(int64_t pages, const std::function<void(int64_t first, int64_t count)>& attend);

 private:
  static constexpr int64_t kHalf = KvStream::kHeld / SentPlaces::kCount;
  struct Streamed {
    KvStream* stream;
    std::vector<uint8_t> wanted = {};  // by page: whether it comes through the stream
  };

  char* place(size_t stream, int64_t index) const;
  bool comes_from(int64_t first, int64_t end) const;
  void bring(int64_t first, int64_t end);
  void pass(int64_t end);

  CudaDevice& device_;
  Memory& memory_;
  const size_t page_bytes_;
  std::vector<Streamed> streams_;
  char* pages_ = nullptr;                 // of each stream, KvStream::kHeld pages
  int64_t end_[SentPlaces::kCount] = {};  // behind the pages that a half's last turn was for
  int64_t last_ = 0;                      // behind the last page that was placed
  bool begun_ = false;
};

}  // namespace puna
