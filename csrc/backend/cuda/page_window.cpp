#include "backend/cuda/page_window.h"

#include <algorithm>

#include "base/error.h"

namespace puna {

PageWindow::PageWindow(CudaDevice& device, Memory& memory,
                       std::span<const AttentionSegment> segments, size_t page_bytes)
    : device_(device), memory_(memory), page_bytes_(page_bytes) {
  static_assert(kHalf % cuda::kGroupPages == 0);
  for (const AttentionSegment& segment : segments) {
    const auto is_it = [&](const Streamed& other) { return other.stream == segment.stream; };
    if (segment.stream != nullptr && std::ranges::none_of(streams_, is_it))
      streams_.push_back({segment.stream});
  }
  const auto bytes = static_cast<int64_t>(page_bytes * streams_.size()) * KvStream::kHeld;
  if (bytes == 0) return;
  pages_ = memory.pages.reserve<char>(device, bytes);
  for (CudaDevice::Event& come : memory.come)
    if (come == nullptr) come = device.make_event();
}

const void* PageWindow::place(KvStream* stream, int64_t index) {
  const auto found = std::ranges::find(streams_, stream, &Streamed::stream);
  if (stream == nullptr || found == streams_.end())
    fail(ErrorCode::kInternal, "[attention] page ", index, " is not there, nor a stream");
  found->wanted.resize(std::max(found->wanted.size(), static_cast<size_t>(index + 1)));
  found->wanted[static_cast<size_t>(index)] = 1;
  last_ = std::max(last_, index + 1);
  return place(static_cast<size_t>(found - streams_.begin()), index);
}

char* PageWindow::place(size_t stream, int64_t index) const {
  const auto at = static_cast<int64_t>(stream) * KvStream::kHeld + index % KvStream::kHeld;
  return pages_ + static_cast<size_t>(at) * page_bytes_;
}

bool PageWindow::comes_from(int64_t first, int64_t end) const {
  for (const Streamed& of : streams_)
    for (int64_t i = first; i < std::min(end, std::ssize(of.wanted)); ++i)
      if (of.wanted[static_cast<size_t>(i)] != 0) return true;
  return false;
}

void PageWindow::bring(int64_t first, int64_t end) {
  for (size_t s = 0; s < streams_.size(); ++s) {
    const Streamed& of = streams_[s];
    for (int64_t i = first; i < std::min(end, std::ssize(of.wanted)); ++i)
      if (of.wanted[static_cast<size_t>(i)] != 0)
        device_.send(place(s, i), of.stream->wait(i), page_bytes_);
  }
}

// What does not last may be overwritten from here on: all of it must have come.
void PageWindow::pass(int64_t end) {
  const auto lasts = [&](const Streamed& of) {
    return of.stream->lasting() >= std::min(end, std::ssize(of.wanted));
  };
  if (!std::ranges::all_of(streams_, lasts))
    for (size_t half = 0; half < SentPlaces::kCount; ++half)
      if (end_[half] <= end) device_.await(memory_.come[half]);
  for (const Streamed& of : streams_) of.stream->passed(end);
}

void PageWindow::each(int64_t pages,
                      const std::function<void(int64_t first, int64_t count)>& attend) {
  if (begun_)
    for (const Streamed& of : streams_)
      if (!of.wanted.empty()) of.stream->restart(of.wanted);
  begun_ = true;
  if (used()) memory_.halves.begin(device_);
  for (int64_t first = 0; first < pages;) {
    int64_t end = pages;  // of pages that are there
    for (int64_t at = first; at < last_; at += kHalf)
      if (comes_from(at, at + kHalf)) {
        end = std::min(pages, at > first ? at : at + kHalf);
        break;
      }
    if (comes_from(first, end)) {
      const auto half = static_cast<size_t>(first / kHalf) % SentPlaces::kCount;
      memory_.halves.turn(
          device_, half,
          [&] {
            pass(std::max<int64_t>(first - kHalf, 0));  // the other half is still on its way
            end_[half] = std::min(end, last_);
            bring(first, end);
          },
          [&] {
            // In the order of the kernels: so that it is after a stream's own copies, too.
            device_.record(memory_.come[half], cuda::kMainQueue);
            attend(first, end - first);
          });
    } else {
      attend(first, end - first);
    }
    first = end;
  }
  if (used()) pass(last_);
}

}  // namespace puna
