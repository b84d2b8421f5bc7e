// What one call of attention has to do: which rows are wanted, how they are bundled so that a page
// is read once for all of them, and where each page lies.
#pragma once

#include <cstdint>
#include <vector>

#include "backend/backend.h"

namespace puna {

// The fixed reduction goes by leaves of this many pages (attention_leaf.h).
constexpr int64_t kLeafPages = 8;

class AttentionPlan {
 public:
  struct Query {
    const AttentionSegment* segment;
    int64_t stream;  // of the segment, or -1
    int64_t row;     // of qkv
    int64_t out_row;
    int64_t page;  // its own: it sees the pages before as wholes
    int32_t seen;  // tokens of its own page
  };
  // One KV head and some consecutive queries.
  struct Task {
    int64_t kv_head, first, count;
    int64_t leaves;  // that any of the queries sees a part of
  };
  struct FullPage {
    void* sealed;
    const void* open;
  };
  // A page as a query sees it.
  struct PageView {
    const char* data = nullptr;  // null: not seen
    bool sealed = false;         // in the sealed form
    int32_t tokens = 0;          // that are seen
    bool operator==(const PageView& other) const {
      return data == other.data && sealed == other.sealed;
    }
  };

  // At most `task_queries` queries to a task. Queries of several segments share tasks if the pages
  // of their segments begin with the same one, as those of forks do.
  void build(const AttentionInput& input, int64_t task_queries);

  const std::vector<Query>& queries() const { return queries_; }
  // The last rows, which see most, come first.
  const std::vector<Task>& tasks() const { return tasks_; }
  // That this call fills and seals.
  const std::vector<FullPage>& full_pages() const { return full_pages_; }
  int64_t leaves() const { return leaves_; }  // of the longest task
  // Tokens that the queries see, added up.
  int64_t seen() const {
    int64_t total = 0;
    for (const Query& query : queries_) total += query.page * kPageTokens + query.seen;
    return total;
  }
  bool streams() const { return !streams_.empty(); }

  // Pages that come through streams are held for pages [first, end) alone: waits for those that a
  // query sees, after letting go of those before. At most KvStream::kHeld of them.
  void fetch(int64_t first, int64_t end);
  void let_go();  // of all of them

  int64_t stream_count() const { return static_cast<int64_t>(streams_.size()); }
  // Those before which some query of the stream's sees.
  int64_t stream_pages(int64_t stream) const;
  bool comes_through(int64_t stream, int64_t page) const;
  // From now on, fetch() waits for those alone of the stream's pages whose `wanted` is not 0, again
  // from the first on; `any`: there are some.
  void want(int64_t stream, std::vector<uint8_t> wanted, bool any);

  PageView page(const Query& query, int64_t index) const {
    if (index > query.page) return {};
    const AttentionSegment& segment = *query.segment;
    if (index == query.page)
      return {static_cast<const char*>(segment.open[index - segment.first_open]), false,
              query.seen};
    constexpr auto kAll = static_cast<int32_t>(kPageTokens);
    if (!seals_ && index >= segment.first_open)
      return {static_cast<const char*>(segment.open[index - segment.first_open]), false, kAll};
    const void* data = segment.sealed[index];
    if (data == nullptr) data = streamed(query.stream, index);
    return {static_cast<const char*>(data), seals_, kAll};
  }

 private:
  struct Stream {
    KvStream* stream;
    std::vector<const AttentionSegment*> segments;
    std::vector<int64_t> pages;        // that a query of the segment sees before its own
    std::vector<const void*> held;     // pages [held_first_, held_first_ + kHeld)
    std::vector<uint8_t> wanted = {};  // pages; empty: all that come through it
    bool reads = true;                 // any of them
  };

  const void* streamed(int64_t stream, int64_t index) const {
    const int64_t slot = index - held_first_;
    if (slot < 0 || slot >= KvStream::kHeld) return nullptr;
    return streams_[stream].held[slot];
  }
  void add_segment(const AttentionInput& input, const AttentionSegment& segment);

  bool seals_ = false;
  std::vector<const AttentionSegment*> order_;
  std::vector<Query> queries_;
  std::vector<Task> tasks_;
  std::vector<FullPage> full_pages_;
  std::vector<Stream> streams_;
  int64_t leaves_ = 0, held_first_ = 0;
};

}  // namespace puna
