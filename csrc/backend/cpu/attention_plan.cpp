#include "backend/cpu/attention_plan.h"

#include <algorithm>
#include <functional>
#include <utility>

namespace puna {
namespace {

// What tells whether two segments begin with the same page.
const void* first_page(const AttentionSegment& segment) {
  if (segment.sealed.empty()) return segment.first_open == 0 ? segment.open[0] : nullptr;
  return segment.sealed[0] != nullptr ? segment.sealed[0] : static_cast<void*>(segment.stream);
}

}  // namespace

void AttentionPlan::build(const AttentionInput& input, int64_t task_queries) {
  seals_ = input.sealed.format != KvSeal::kNone;
  order_.clear();
  queries_.clear();
  tasks_.clear();
  full_pages_.clear();
  streams_.clear();
  leaves_ = 0;

  for (const AttentionSegment& segment : input.segments) order_.push_back(&segment);
  std::stable_sort(order_.begin(), order_.end(),
                   [](const AttentionSegment* a, const AttentionSegment* b) {
                     return std::less<const void*>()(first_page(*a), first_page(*b));
                   });
  for (const AttentionSegment* segment : order_) add_segment(input, *segment);

  const auto count = static_cast<int64_t>(queries_.size());
  for (int64_t begin = 0; begin < count;) {
    const void* shared = first_page(*queries_[begin].segment);
    int64_t end = begin + 1;
    while (end < count && (queries_[end].segment == queries_[begin].segment ||
                           (shared != nullptr && first_page(*queries_[end].segment) == shared)))
      ++end;
    for (int64_t last = end; last > begin; last -= std::min(task_queries, last - begin)) {
      const int64_t size = std::min(task_queries, last - begin);
      int64_t leaves = 0;
      for (int64_t i = last - size; i < last; ++i)
        leaves = std::max(leaves, queries_[i].page / kLeafPages + 1);
      leaves_ = std::max(leaves_, leaves);
      for (int64_t head = 0; head < input.layout.kv_heads; ++head)
        tasks_.push_back({head, last - size, size, leaves});
    }
    begin = end;
  }
}

void AttentionPlan::add_segment(const AttentionInput& input, const AttentionSegment& segment) {
  const int64_t token = segment.position - segment.first_position;
  if (seals_)
    for (int64_t page = token / kPageTokens; page < (token + segment.rows) / kPageTokens; ++page)
      full_pages_.push_back({segment.sealed[page], segment.open[page - segment.first_open]});

  // Wanted rows of the segment, as [begin, end) of `queries`, or all.
  int64_t first_out = segment.first_row, wanted = segment.rows;
  if (input.queries) {
    const auto low =
        std::lower_bound(input.queries->begin(), input.queries->end(), segment.first_row);
    const auto high = std::lower_bound(low, input.queries->end(), segment.first_row + segment.rows);
    first_out = low - input.queries->begin();
    wanted = high - low;
  }
  if (wanted == 0) return;
  const auto row_of = [&](int64_t out_row) -> int64_t {
    return input.queries ? (*input.queries)[out_row] : out_row;
  };

  // Of the pages before that of its last query, some may come through a stream.
  const int64_t last = token + row_of(first_out + wanted - 1) - segment.first_row;
  const int64_t pages =
      std::min<int64_t>(last / kPageTokens, static_cast<int64_t>(segment.sealed.size()));
  int64_t stream = -1;
  if (segment.stream != nullptr && std::find(segment.sealed.begin(), segment.sealed.begin() + pages,
                                             nullptr) != segment.sealed.begin() + pages) {
    const auto found = std::find_if(streams_.begin(), streams_.end(), [&](const Stream& other) {
      return other.stream == segment.stream;
    });
    stream = found - streams_.begin();
    if (found == streams_.end())
      streams_.push_back({segment.stream, {}, {}, std::vector<const void*>(KvStream::kHeld)});
    streams_[stream].segments.push_back(&segment);
    streams_[stream].pages.push_back(pages);
  }

  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t row = row_of(first_out + i);
    const int64_t at = token + row - segment.first_row;
    queries_.push_back({&segment, stream, row, first_out + i, at / kPageTokens,
                        static_cast<int32_t>(at % kPageTokens + 1)});
  }
}

void AttentionPlan::fetch(int64_t first, int64_t end) {
  held_first_ = first;
  for (size_t index = 0; index < streams_.size(); ++index) {
    Stream& stream = streams_[index];
    std::fill(stream.held.begin(), stream.held.end(), nullptr);
    if (!stream.reads) continue;
    stream.stream->passed(first);
    for (int64_t page = first; page < end; ++page)
      if (comes_through(static_cast<int64_t>(index), page) &&
          (stream.wanted.empty() || stream.wanted[page] != 0))
        stream.held[page - first] = stream.stream->wait(page);
  }
}

void AttentionPlan::let_go() {
  for (Stream& stream : streams_) {
    std::fill(stream.held.begin(), stream.held.end(), nullptr);
    stream.stream->passed(leaves_ * kLeafPages);
  }
}

int64_t AttentionPlan::stream_pages(int64_t stream) const {
  const std::vector<int64_t>& pages = streams_[stream].pages;
  return *std::max_element(pages.begin(), pages.end());
}

bool AttentionPlan::comes_through(int64_t stream, int64_t page) const {
  const Stream& found = streams_[stream];
  for (size_t i = 0; i < found.segments.size(); ++i)
    if (page < found.pages[i] && found.segments[i]->sealed[page] == nullptr) return true;
  return false;
}

void AttentionPlan::want(int64_t stream, std::vector<uint8_t> wanted, bool any) {
  Stream& found = streams_[stream];
  found.reads = any;
  found.wanted = std::move(wanted);
  found.stream->restart(found.wanted);
}

}  // namespace puna
