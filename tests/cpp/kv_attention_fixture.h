// For tests of the store and attention together: shapes, rows that follow from a text, and forward
// passes of attention alone.
#pragma once

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "backend_fixture.h"
#include "kv_fixture.h"

namespace fixture {

struct KvShape {
  int64_t heads;
  KvGeometry geometry;

  int64_t head_dim() const { return geometry.layout.head_dim; }
  int64_t cols() const { return (heads + 2 * geometry.layout.kv_heads) * head_dim(); }
  int64_t out() const { return heads * head_dim(); }
  size_t layers() const { return geometry.chunk.size(); }
};

inline KvShape random_kv_shape(std::mt19937& random) {
  const KvSeal seals[] = {KvSeal::kNone, KvSeal::kInt8, KvSeal::kInt4};
  const int64_t dims[] = {8, 16, 20}, kv_heads = 1 + random() % 2;
  const std::vector<int64_t> chunks[] = {{512, 0, 0}, {0, 256, 512, 0}, {768, 0}, {1024, 256, 0}};
  return {kv_heads * static_cast<int64_t>(1 + random() % 3),
          {{random() % 3 ? DType::kBF16 : DType::kF32, kv_heads, dims[random() % 3]},
           chunks[random() % 4],
           seals[random() % 3]}};
}

// Projected rows that follow from the text up to there, as those of a model do.
inline void project(const KvShape& shape, const Text& text, int64_t layer, int64_t first,
                    int64_t count, float* out) {
  uint64_t key = static_cast<uint64_t>(layer) * 77;
  for (int64_t t = 0; t < first + count; ++t) {
    key = mixed(key ^ static_cast<uint64_t>(text.tokens[t]));
    if (t < first) continue;
    for (int64_t c = 0; c < shape.cols(); ++c)
      *out++ = static_cast<float>(
                   static_cast<int32_t>(mixed(key + static_cast<uint64_t>(c)) >> 40) - (1 << 23)) *
               0x1p-22f;
  }
}

using KvOutputs = std::vector<std::vector<float>>;  // [layer][row * out()]
constexpr int64_t kAllRows = std::numeric_limits<int64_t>::max();

// A forward pass of all layers; appends the last `wanted` rows of each member's outputs to its
// part of `outputs`, layer by layer.
inline void forward(const KvShape& shape, KvStore& store, Backend& backend,
                    const std::vector<Member>& members, const std::vector<KvOutputs*>& outputs,
                    int64_t wanted = kAllRows) {
  std::vector<KvStore::Append> appends;
  int64_t rows = 0;
  std::vector<int32_t> queries;
  for (const Member& member : members) {
    appends.push_back({member.sequence, member.tokens, member.text->view()});
    for (int64_t r = std::max<int64_t>(0, member.tokens - wanted); r < member.tokens; ++r)
      queries.push_back(static_cast<int32_t>(rows + r));
    rows += member.tokens;
  }
  const KvStore::Plan plan = store.plan(appends);
  store.apply(plan);
  std::vector<int64_t> layers(shape.layers());
  std::iota(layers.begin(), layers.end(), int64_t{0});
  store.begin_pass(layers);
  const auto results = std::ssize(queries);
  const Buffer projected = backend.allocate(static_cast<size_t>(rows * shape.cols()) * 4);
  const Buffer attended = backend.allocate(static_cast<size_t>(results * shape.out() + 1) * 4);
  std::vector<float> qkv(static_cast<size_t>(rows * shape.cols()));
  std::vector<float> out(static_cast<size_t>(results * shape.out()));
  for (const int64_t layer : layers) {
    AttentionInput input;
    std::vector<AttentionSegment> segments;
    int64_t first = 0;
    for (const Member& member : members) {
      const KvView view = store.view(member.sequence, layer);
      AttentionSegment& segment = segments.emplace_back();
      segment.first_row = first;
      segment.rows = member.tokens;
      segment.position = store.length(member.sequence);
      segment.first_position = view.first_position;
      segment.sealed = view.sealed;
      segment.stream = view.stream;
      segment.first_open = view.first_open;
      segment.open = view.open;
      project(shape, *member.text, layer, segment.position, member.tokens,
              qkv.data() + first * shape.cols());
      first += member.tokens;
    }
    input.qkv = {projected.floats(), rows, shape.cols()};
    backend.from_host(input.qkv, qkv.data());
    input.heads = shape.heads;
    input.layout = store.geometry().layout;
    if (store.geometry().global(static_cast<size_t>(layer)))
      input.sealed = store.geometry().sealed_layout();
    input.segments = segments;
    input.queries = queries;
    const Rows to(attended.floats(), results, shape.out());
    backend.attention(to, input);
    if (outputs.empty()) continue;
    backend.to_host(out.data(), to);
    auto from = out.begin();
    for (size_t m = 0; m < members.size(); ++m) {
      std::vector<float>& all = (*outputs[m])[static_cast<size_t>(layer)];
      const auto end = from + std::min(wanted, members[m].tokens) * shape.out();
      all.insert(all.end(), from, end);
      from = end;
    }
  }
  store.commit(plan);
}

}  // namespace fixture
