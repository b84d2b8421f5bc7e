#include "procedural_cache.h"

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <numeric>

#include "backend/kv_seal.h"
#include "base/crc32c.h"
#include "base/error.h"
#include "base/half.h"
#include "engine/factory.h"
#include "platform/read_queue.h"

namespace puna::bench {
namespace {

constexpr Geometry kGeometries[] = {{"scout", 40, 8, 128}, {"ledger", 2, 1, 128}};

uint64_t mixed(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// Softmax attention of a few queries in double, page by page.
struct DoubleAttention {
  DoubleAttention(int64_t queries, int64_t head_dim)
      : n(head_dim), m(queries, -INFINITY), l(queries), o(queries, std::vector<double>(head_dim)) {}

  template <class Key, class Value>
  void add(const std::vector<std::vector<double>>& q, int64_t tokens, Key key, Value value) {
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<double> k(n), v(n);
      for (int64_t c = 0; c < n; ++c) {
        k[c] = key(t, c);
        v[c] = value(t, c);
      }
      for (size_t i = 0; i < m.size(); ++i)
        merge(i, std::inner_product(k.begin(), k.end(), q[i].begin(), 0.0), 1, v);
    }
  }
  void merge(size_t i, double score, double weight, const std::vector<double>& value) {
    const double top = std::max(m[i], score);
    const double a = std::exp(m[i] - top), b = std::exp(score - top);
    m[i] = top;
    l[i] = l[i] * a + weight * b;
    for (int64_t c = 0; c < n; ++c) o[i][c] = o[i][c] * a + value[c] * b;
  }

  int64_t n;
  std::vector<double> m, l;
  std::vector<std::vector<double>> o;
};

}  // namespace

const Geometry& geometry_named(const std::string& name) {
  for (const Geometry& geometry : kGeometries)
    if (name == geometry.name) return geometry;
  fail(ErrorCode::kInvalidRequest, "--geom ", name, ": scout or ledger is expected");
}

KvSeal seal_named(const std::string& name) {
  if (name == "bf16") return KvSeal::kNone;
  if (name == "int8") return KvSeal::kInt8;
  if (name == "int4") return KvSeal::kInt4;
  fail(ErrorCode::kInvalidRequest, "--kv ", name, ": bf16, int8 or int4 is expected");
}

// Codes are anything; scales and zero points make values of -1 to about 1 of them. Elements of
// bfloat16 have any sign and a magnitude of 2^-3 to 2.
void ProceduralPages::fill(void* page, int64_t layer, int64_t index) const {
  auto* words = static_cast<uint64_t*>(page);
  const uint64_t key = mixed(static_cast<uint64_t>(layer) << 40 ^ static_cast<uint64_t>(index));
  const bool open = sealed_.format == KvSeal::kNone;
  const size_t codes = open ? bytes_ : sealed_.key_scale_offset(0);
  for (size_t i = 0; i < codes / 8; ++i) {
    const uint64_t random = mixed(key + i);
    words[i] = open ? (random & 0x81ff81ff81ff81ffull) + 0x3e003e003e003e00ull : random;
  }
  if (open) return;
  std::memset(static_cast<char*>(page) + codes, 0, bytes_ - codes);
  const float step = 2.0f / static_cast<float>((1 << sealed_.bits()) - 1);
  for (int64_t head = 0; head < sealed_.kv_heads; ++head) {
    const auto put = [&](size_t offset, int64_t count, int64_t used) {
      auto* scales = reinterpret_cast<uint16_t*>(static_cast<char*>(page) + offset);
      for (int64_t i = 0; i < used; ++i) {
        scales[i] = static_cast<uint16_t>(bf16_of_float(step) - mixed(key ^ (offset + i)) % 64);
        scales[count + i] = bf16_of_float(-1.0f);
      }
      return scales + count;
    };
    uint16_t* const zeros =
        put(sealed_.key_scale_offset(head), sealed_.padded_dim(), sealed_.head_dim);
    for (int64_t c = 0; topical_ && c < sealed_.head_dim; ++c)
      zeros[c] = bf16_of_float(-1.0f + topic(layer, index, head, c));
    put(sealed_.value_scale_offset(head), kPageTokens, kPageTokens);
  }
}

float ProceduralPages::topic(int64_t layer, int64_t index, int64_t head, int64_t c) {
  const uint64_t page = mixed(static_cast<uint64_t>(layer) << 40 ^ static_cast<uint64_t>(index));
  return mixed(page ^ static_cast<uint64_t>(head << 16 ^ c)) % 2 == 0 ? 0.5f : -0.5f;
}

double ProceduralPages::key(const void* page, int64_t head, int64_t t, int64_t c) const {
  if (sealed_.format != KvSeal::kNone) return sealed_key(page, sealed_, head, t, c);
  return element(page, open_.key_offset(head), open_.key_index(t, c));
}

double ProceduralPages::value(const void* page, int64_t head, int64_t t, int64_t c) const {
  if (sealed_.format != KvSeal::kNone) return sealed_value(page, sealed_, head, t, c);
  return element(page, open_.value_offset(head), open_.value_index(t, c));
}

double ProceduralPages::element(const void* page, size_t offset, int64_t index) {
  const auto* bits = reinterpret_cast<const uint16_t*>(static_cast<const char*>(page) + offset);
  return float_of_bf16(bits[index]);
}

ProceduralCache::ProceduralCache(const Geometry& shape, const KvGeometry& geometry, int64_t budget,
                                 KvStoreOptions options, Backend& backend, ThreadPool& pool,
                                 bool topical)
    : shape_(shape),
      pages_(geometry, topical),
      store_(geometry, make_memory_tier(budget), std::move(options)),
      backend_(backend),
      pool_(pool),
      base_(store_.create()) {
  order_.resize(geometry.chunk.size());
  std::iota(order_.begin(), order_.end(), int64_t{0});
}

void ProceduralCache::fill(int64_t tokens, const std::string& session) {
  if (!session.empty()) store_.attach(base_, session, {});
  const int64_t unit = store_.geometry().unit();
  for (int64_t done = 0; done < tokens;) {
    const int64_t count = std::min(unit - done % unit, tokens - done);
    const KvStore::Append append = extend(base_, count);
    const KvStore::Plan plan = store_.plan({&append, 1});
    store_.apply(plan);
    for (const int64_t layer : order_) {
      if (!store_.geometry().global(static_cast<size_t>(layer))) continue;
      const KvView view = store_.view(base_, layer);
      const bool open = store_.geometry().seal == KvSeal::kNone;
      const int64_t first = done / kPageTokens;
      pool_.run([&](Lane& lane) {
        const Part part = lane.part(count / kPageTokens);
        for (int64_t page = first + part.begin; page < first + part.end; ++page)
          pages_.fill(open ? view.open[page - view.first_open] : view.sealed[page], layer, page);
      });
    }
    store_.commit(plan);
    done += count;
  }
  if (!session.empty()) store_.flush(base_);
  tokens_ = tokens;
}

void ProceduralCache::open(const std::string& session) {
  KvStore::Opened opened = store_.open(session, false);
  store_.release(base_);
  base_ = opened.sequence;
  ids_ = std::move(opened.tokens);
  tokens_ = store_.length(base_);
}

void ProceduralCache::ask(const AttentionMode& mode, float sharpness) {
  mode_ = mode;
  sharpness_ = sharpness;
  report_ = {};
}

double ProceduralCache::step(int64_t rows) {
  while (std::ssize(forks_) < rows) forks_.push_back(store_.fork(base_));
  std::vector<KvStore::Append> appends;
  for (int64_t r = 0; r < rows; ++r) appends.push_back(extend(forks_[r], 1));
  const KvStore::Plan plan = store_.plan(appends);
  store_.apply(plan);
  const int64_t n = shape_.head_dim, cols = (shape_.heads + 2 * shape_.kv_heads) * n;
  std::normal_distribution<float> normal;
  queries_.resize(rows * cols);
  for (float& x : queries_) x = normal(random_) * 0.25f;
  const int64_t group = shape_.heads / shape_.kv_heads;
  for (int64_t item = 0; sharpness_ > 0 && item < rows * shape_.heads; ++item) {
    float* q = queries_.data() + item / shape_.heads * cols + item % shape_.heads * n;
    const int64_t head = item % shape_.heads / group;
    const auto page =
        static_cast<int64_t>(mixed(static_cast<uint64_t>(store_.length(base_) + asked_ + head)) %
                             static_cast<uint64_t>(tokens_ / kPageTokens));
    const float size = sharpness_ * 4 / std::sqrt(static_cast<float>(n));
    for (int64_t c = 0; c < n; ++c)
      q[c] += size * ProceduralPages::topic(order_.back(), page, head, c);
  }
  asked_ += shape_.kv_heads;
  std::vector<float> qkv;
  out_.resize(rows * shape_.heads * n);
  double seconds = 0;
  const bool exact = mode_.kind == AttentionMode::Kind::kExact;
  store_.begin_pass(order_, !exact);
  for (const int64_t layer : order_) {
    qkv = queries_;
    std::vector<AttentionSegment> segments;
    for (int64_t r = 0; r < rows; ++r) {
      const KvView view = store_.view(forks_[r], layer);
      AttentionSegment& segment = segments.emplace_back();
      segment.first_row = r;
      segment.rows = 1;
      segment.position = store_.length(forks_[r]);
      segment.first_position = view.first_position;
      segment.sealed = view.sealed;
      segment.stream = view.stream;
      segment.key_scales = view.key_scales;
      if (!exact) {
        segment.mode = &mode_;
        segment.report = &report_;
      }
      segment.first_open = view.first_open;
      segment.open = view.open;
    }
    AttentionInput input;
    input.qkv = {qkv.data(), rows, cols};
    input.heads = shape_.heads;
    input.layout = store_.geometry().layout;
    if (store_.geometry().global(static_cast<size_t>(layer)))
      input.sealed = store_.geometry().sealed_layout();
    input.segments = segments;
    seconds +=
        seconds_of([&] { backend_.attention({out_.data(), rows, shape_.heads * n}, input); });
  }
  if (check_next_) check();
  store_.commit(plan);
  return seconds;
}

int64_t ProceduralCache::checksum() const {
  return crc32c(out_.data(), out_.size() * sizeof(float));
}

double ProceduralCache::check_step() {
  check_next_ = true;
  step(1);
  check_next_ = false;
  return worst_;
}

KvStore::Append ProceduralCache::extend(KvStore::Sequence sequence, int64_t count) {
  KvStore::Append append{sequence, count, {}};
  const auto length = static_cast<size_t>(store_.length(sequence) + count);
  if (ids_.size() < length) ids_.resize(length, 1);
  append.text.tokens = ids_;
  return append;
}

void ProceduralCache::check() {
  const int64_t n = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
  const int64_t head = shape_.kv_heads - 1, layer = order_.back();
  std::vector<std::vector<double>> q(group, std::vector<double>(n));
  for (int64_t g = 0; g < group; ++g)
    for (int64_t c = 0; c < n; ++c)
      q[g][c] = queries_[(head * group + g) * n + c] / std::sqrt(static_cast<double>(n));
  const KvView view = store_.view(forks_[0], layer);
  std::vector<DoubleAttention> parts(pool_.lanes(), DoubleAttention(group, n));
  std::vector<int64_t> differing(pool_.lanes());
  pool_.run([&](Lane& lane) {
    std::vector<uint64_t> page(pages_.bytes() / 8);
    const Part part = lane.part(tokens_ / kPageTokens);
    for (int64_t index = part.begin; index < part.end; ++index) {
      pages_.fill(page.data(), layer, index);
      const void* held = view.sealed[index];
      differing[lane.id()] +=
          held != nullptr && std::memcmp(held, page.data(), pages_.bytes()) != 0;
      parts[lane.id()].add(
          q, kPageTokens, [&](int64_t t, int64_t c) { return pages_.key(page.data(), head, t, c); },
          [&](int64_t t, int64_t c) { return pages_.value(page.data(), head, t, c); });
    }
  });
  const int64_t changed = std::accumulate(differing.begin(), differing.end(), int64_t{0});
  if (changed != 0)
    fail(ErrorCode::kInternal, "[kv-decode] ", changed, " pages are not as they were written");
  const KvPageLayout& open = store_.geometry().layout;
  const void* own = view.open[tokens_ / kPageTokens - view.first_open];
  parts[0].add(
      q, store_.length(forks_[0]) + 1 - tokens_,
      [&](int64_t t, int64_t c) {
        return ProceduralPages::element(own, open.key_offset(head), open.key_index(t, c));
      },
      [&](int64_t t, int64_t c) {
        return ProceduralPages::element(own, open.value_offset(head), open.value_index(t, c));
      });
  worst_ = 0;
  for (int64_t g = 0; g < group; ++g) {
    for (size_t i = 1; i < parts.size(); ++i)
      if (parts[i].l[g] > 0) parts[0].merge(g, parts[i].m[g], parts[i].l[g], parts[i].o[g]);
    for (int64_t c = 0; c < n; ++c)
      worst_ = std::max(
          worst_, std::fabs(out_[(head * group + g) * n + c] - parts[0].o[g][c] / parts[0].l[g]));
  }
}

DiskReads::DiskReads(const std::string& directory) {
  constexpr uint64_t kPiece = uint64_t{1} << 20;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory)) {
    if (!entry.is_regular_file() || entry.file_size() < kPiece) continue;
    const uint64_t size = entry.file_size() / kPageAlignment * kPageAlignment;
    for (uint64_t at = 0; at < size; at += kPiece) {
      pieces_.push_back({paths_.size(), at, static_cast<size_t>(std::min(kPiece, size - at))});
      bytes_ += static_cast<int64_t>(pieces_.back().bytes);
    }
    paths_.push_back(entry.path().string());
  }
  if (pieces_.empty()) fail(ErrorCode::kInvalidRequest, directory, " has no files to read from");
}

void DiskReads::sample(int64_t bytes) {
  // As many pieces as the store's ring has, in one piece of memory.
  constexpr size_t kPlaces = 32, kPlaceBytes = size_t{1} << 20;
  const Memory memory(kPlaces * kPlaceBytes);
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<char*> free;
  for (size_t i = 0; i < kPlaces; ++i)
    free.push_back(static_cast<char*>(memory.data()) + i * kPlaceBytes);
  std::exception_ptr failure;
  int64_t read = 0;
  const auto queue = make_read_queue();
  std::shared_ptr<File> file;
  size_t open = paths_.size();
  const int64_t wanted = bytes > 0 ? bytes : bytes_;
  const double seconds = seconds_of([&] {
    while (read < wanted) {
      const Piece piece = pieces_[next_];
      next_ = (next_ + 1) % pieces_.size();
      if (piece.file != open) {
        file = system_files().open(paths_[piece.file], OpenMode::kReadDirect);
        open = piece.file;
      }
      char* place = nullptr;
      {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return !free.empty(); });
        place = free.back();
        free.pop_back();
      }
      queue->submit({file, place, piece.bytes, piece.offset, [&, place](std::exception_ptr error) {
                       const std::lock_guard guard(mutex);
                       if (error) failure = error;
                       free.push_back(place);
                       changed.notify_one();
                     }});
      read += static_cast<int64_t>(piece.bytes);
    }
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return free.size() == kPlaces; });
  });
  if (failure) std::rethrow_exception(failure);
  rates_.push_back(static_cast<double>(read) / seconds);
}

double DiskReads::median_rate() const { return median(rates_); }

}  // namespace puna::bench
