#include "backend/cuda/page_window.h"

#include <algorithm>

#include "base/error.h"

namespace puna {

static_assert(KvStream::kHeld % cuda::kGroupPages == 0);

PageWindow::PageWindow(CudaDevice& device, CudaScratch& memory,
                       std::span<const AttentionSegment> segments, size_t page_bytes)
    : device_(device), page_bytes_(page_bytes) {
  for (const AttentionSegment& segment : segments) {
    const auto is_it = [&](const Streamed& other) { return other.stream == segment.stream; };
    if (segment.stream != nullptr && std::ranges::none_of(streams_, is_it))
      streams_.push_back({segment.stream});
  }
  const auto bytes = static_cast<int64_t>(page_bytes * streams_.size()) * KvStream::kHeld;
  if (bytes > 0) memory_ = memory.reserve<char>(device, bytes);
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
  return memory_ + static_cast<size_t>(at) * page_bytes_;
}

bool PageWindow::comes_from(int64_t first, int64_t end) const {
  for (const Streamed& of : streams_)
    for (int64_t i = first; i < std::min(end, std::ssize(of.wanted)); ++i)
      if (of.wanted[static_cast<size_t>(i)] != 0) return true;
  return false;
}

// In the order of the calls, so what lay there before has been read.
void PageWindow::bring(int64_t first, int64_t end) {
  for (size_t s = 0; s < streams_.size(); ++s) {
    const Streamed& of = streams_[s];
    of.stream->passed(first);
    for (int64_t i = first; i < std::min(end, std::ssize(of.wanted)); ++i)
      if (of.wanted[static_cast<size_t>(i)] != 0)
        device_.upload(place(s, i), of.stream->wait(i), page_bytes_);
  }
}

// What does not last may be overwritten from here on: all of it must have come.
void PageWindow::pass(int64_t end) {
  const auto lasts = [&](const Streamed& of) { return of.stream->lasting() >= end; };
  if (!std::ranges::all_of(streams_, lasts)) device_.finish();
  for (const Streamed& of : streams_) of.stream->passed(end);
}

void PageWindow::each(int64_t pages,
                      const std::function<void(int64_t first, int64_t count)>& attend) {
  if (begun_)
    for (const Streamed& of : streams_)
      if (!of.wanted.empty()) of.stream->restart(of.wanted);
  begun_ = true;
  for (int64_t first = 0; first < pages;) {
    int64_t end = pages;  // of pages that are there
    for (int64_t at = first; at < last_; at += KvStream::kHeld)
      if (comes_from(at, at + KvStream::kHeld)) {
        end = std::min(pages, at > first ? at : at + KvStream::kHeld);
        break;
      }
    const bool streamed = comes_from(first, end);
    if (streamed) bring(first, end);
    attend(first, end - first);
    if (streamed) pass(end);
    first = end;
  }
}

}  // namespace puna
