// For the tests of attention over sealed pages: sequences, caches as a store keeps them, streams.
#pragma once

#include <algorithm>
#include <list>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include "backend/kv_seal.h"
#include "backend_fixture.h"

namespace fixture {

struct Shape {
  int64_t heads, kv_heads, head_dim;
  DType page_type;
  KvSeal seal;
  int64_t cols() const { return (heads + 2 * kv_heads) * head_dim; }
  int64_t out_cols() const { return heads * head_dim; }
  KvPageLayout open() const { return {page_type, kv_heads, head_dim}; }
  KvSealedLayout sealed() const { return {seal, kv_heads, head_dim}; }
  size_t sealed_bytes() const {
    return seal == KvSeal::kNone ? open().page_bytes() : sealed().page_bytes();
  }
};

// As in layers that keep everything: no RoPE, queries scaled by position.
struct Sequence {
  Sequence(std::mt19937& random, const Shape& shape, int64_t tokens)
      : shape(shape), tokens(tokens), qkv(randoms(random, tokens * shape.cols())) {
    for (int64_t i = 0; i < tokens; ++i)
      temperature.push_back(1 + static_cast<float>(random() % 100) * 1e-2f);
  }
  const Shape& shape;
  int64_t tokens;
  std::vector<float> qkv, temperature;
};

using Page = std::shared_ptr<std::vector<char>>;

// The pages of a sequence as a store keeps them: full ones sealed, the last one open.
struct Cache {
  explicit Cache(const Shape& shape) : shape(&shape) {}
  const Shape* shape;
  int64_t length = 0;
  std::vector<Page> sealed, open;
  std::set<int64_t> elsewhere;  // sealed pages that come through the stream
  KvStream* stream = nullptr;
  bool scales_known = false;                    // of the keys of pages elsewhere
  bool sealed_table_short = false;              // by one page
  std::vector<void*> sealed_table, open_table;  // of the call
  std::vector<const void*> scales_table;

  void begin(int64_t rows) {
    const auto page_of = [](size_t bytes) { return std::make_shared<std::vector<char>>(bytes); };
    const int64_t first = length / kPageTokens, after = length + rows;
    while (static_cast<int64_t>(open.size()) < (after + kPageTokens - 1) / kPageTokens - first)
      open.push_back(page_of(shape->open().page_bytes()));
    if (shape->seal != KvSeal::kNone)
      while (static_cast<int64_t>(sealed.size()) < after / kPageTokens)
        sealed.push_back(page_of(shape->sealed_bytes()));
    sealed_table.clear();
    open_table.clear();
    for (size_t i = 0; i < sealed.size(); ++i)
      sealed_table.push_back(elsewhere.count(static_cast<int64_t>(i)) ? nullptr
                                                                      : sealed[i]->data());
    if (sealed_table_short) sealed_table.pop_back();
    scales_table.clear();
    for (size_t i = 0; scales_known && i < sealed.size(); ++i)
      scales_table.push_back(elsewhere.count(static_cast<int64_t>(i)) == 0
                                 ? nullptr
                                 : sealed[i]->data() + shape->sealed().key_scale_offset(0));
    for (const Page& page : open) open_table.push_back(page->data());
  }
  void commit(int64_t rows) {
    const int64_t full = (length + rows) / kPageTokens - length / kPageTokens;
    length += rows;
    if (shape->seal == KvSeal::kNone)
      sealed.insert(sealed.end(), open.begin(), open.begin() + full);
    open.erase(open.begin(), open.begin() + full);
  }
};

// Hands out copies, and spoils what has been passed. Bytes of ones are NaN in every format.
class TestStream : public KvStream {
 public:
  explicit TestStream(const Cache& cache) : cache_(cache) {}
  const void* wait(int64_t index) override {
    CHECK(index > last_);  // ascending, each once
    CHECK(index >= passed_ && index < passed_ + kHeld);
    CHECK(cache_.elsewhere.count(index) == 1);
    CHECK(asked_for.empty() || asked_for[static_cast<size_t>(index)] != 0);
    if (index == broken) fail(ErrorCode::kDevice, "[test] page ", index, " cannot be read");
    last_ = index;
    ++waits;
    held_.emplace_back(index, *cache_.sealed[static_cast<size_t>(index)]);
    return held_.back().second.data();
  }
  void passed(int64_t index) override {
    CHECK(index >= passed_);
    passed_ = index;
    for (auto& [page, bytes] : held_)
      if (page < index) std::fill(bytes.begin(), bytes.end(), '\xff');
  }
  // For another call, or a second round of this.
  void rewind() {
    held_.clear();
    last_ = -1;
    passed_ = 0;
  }
  std::vector<uint8_t> asked_for;  // by the last restart
  void restart(std::span<const uint8_t> wanted) override {
    ++restarts;
    asked_for.assign(wanted.begin(), wanted.end());
    rewind();
  }
  int64_t waits = 0, restarts = 0, broken = -1;

 private:
  const Cache& cache_;
  std::list<std::pair<int64_t, std::vector<char>>> held_;
  int64_t last_ = -1, passed_ = 0;
};

struct Piece {
  const Sequence* sequence;
  Cache* cache;
  int64_t count;  // rows of the sequence from the cache's length on
  const AttentionMode* mode = nullptr;
  AttentionReport* report = nullptr;
};

// One call over pieces; the rows of all pieces, or the wanted ones of the call.
inline std::vector<float> attend(Backend& backend, const Shape& shape,
                                 const std::vector<Piece>& pieces,
                                 std::optional<std::span<const int32_t>> wanted = {}) {
  std::vector<float> qkv, temperature;
  std::vector<AttentionSegment> segments;
  int64_t rows = 0;
  for (const Piece& piece : pieces) {
    const int64_t first = piece.cache->length;
    const auto copy = [&](std::vector<float>& to, const std::vector<float>& from, int64_t cols) {
      to.insert(to.end(), from.begin() + first * cols, from.begin() + (first + piece.count) * cols);
    };
    copy(qkv, piece.sequence->qkv, shape.cols());
    copy(temperature, piece.sequence->temperature, 1);
    piece.cache->begin(piece.count);
    AttentionSegment& segment = segments.emplace_back();
    segment.first_row = rows;
    segment.rows = piece.count;
    segment.position = first;
    segment.sealed = piece.cache->sealed_table;
    segment.stream = piece.cache->stream;
    segment.key_scales = piece.cache->scales_table;
    segment.first_open = first / kPageTokens;
    segment.open = piece.cache->open_table;
    segment.mode = piece.mode;
    segment.report = piece.report;
    rows += piece.count;
  }
  AttentionInput input;
  input.qkv = {qkv.data(), rows, shape.cols()};
  input.heads = shape.heads;
  input.layout = shape.open();
  input.sealed = shape.sealed();
  input.temperature = temperature.data();
  input.queries = wanted;
  input.segments = segments;
  const int64_t count = wanted ? static_cast<int64_t>(wanted->size()) : rows;
  std::vector<float> out(static_cast<size_t>(count * shape.out_cols()));
  backend.attention({out.data(), count, shape.out_cols()}, input);
  backend.to_host(nullptr, {nullptr, 0, 0});  // of a device: it has been done
  for (const Piece& piece : pieces) piece.cache->commit(piece.count);
  return out;
}

}  // namespace fixture
