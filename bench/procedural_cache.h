// A long cache of procedural keys and values, and steps of decoding over it.
//
// The contents of a page are a function of its layer and place, so that any page can be made again:
// all pages that lie in memory are held against that, and one KV head of the last layer is computed
// in double.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_layout.h"
#include "bench.h"
#include "kv/kv_store.h"
#include "platform/thread_pool.h"

namespace puna::bench {

struct Geometry {
  const char* name;
  int64_t heads, kv_heads, head_dim;
};
const Geometry& geometry_named(const std::string& name);  // "scout", "ledger"
KvSeal seal_named(const std::string& name);               // "bf16", "int8", "int4"

// Pages as attention reads them before a row's own.
class ProceduralPages {
 public:
  // `topical`: the keys of a page and head, which must be sealed, lie around a topic, a number of
  // half a unit and any sign in each channel.
  explicit ProceduralPages(const KvGeometry& geometry, bool topical = false)
      : open_(geometry.layout),
        sealed_(geometry.sealed_layout()),
        bytes_(geometry.sealed_bytes()),
        topical_(topical) {}

  size_t bytes() const { return bytes_; }
  void fill(void* page, int64_t layer, int64_t index) const;
  double key(const void* page, int64_t head, int64_t t, int64_t c) const;
  double value(const void* page, int64_t head, int64_t t, int64_t c) const;
  static double element(const void* page, size_t offset, int64_t index);
  static float topic(int64_t layer, int64_t index, int64_t head, int64_t c);
  bool topical() const { return topical_; }

 private:
  KvPageLayout open_;
  KvSealedLayout sealed_;
  size_t bytes_;
  bool topical_;
};

class ProceduralCache {
 public:
  // Layers with attention chunks keep what memory holds; only layers that keep everything are
  // filled. The last one must be such a layer.
  ProceduralCache(const Geometry& shape, const KvGeometry& geometry, int64_t budget,
                  KvStoreOptions options, Backend& backend, ThreadPool& pool, bool topical = false);

  KvStore& store() { return store_; }
  KvStore::Sequence base() const { return base_; }

  // With `session`, all whole chunks are in a session there when this returns.
  void fill(int64_t tokens, const std::string& session = "");
  // Goes on from a session of fill().
  void open(const std::string& session);
  // Of the steps that follow. `sharpness`: each KV head asks for one page's topic, whose keys score
  // so much, where others score 0 on average. What its attention leaves out is in report().
  void ask(const AttentionMode& mode, float sharpness);
  const AttentionReport& report() const { return report_; }
  // One new token of each of `rows` forks, in all layers; returns the seconds of attention.
  double step(int64_t rows);
  // Of the last step's outputs in the last layer: equal for equal steps, wherever pages lie.
  int64_t checksum() const;
  // The largest difference of the next step's outputs from double, for the queries of one KV head.
  double check_step();
  // What a value may be off by, of a magnitude of 2 at most: by the whole numbers of queries and
  // weights in sealed pages (kernels/kernel_table.h: some of 2^-15), by roundings of fp32 in open
  // ones.
  double bound() const { return store_.geometry().seal == KvSeal::kNone ? 0x1p-17 : 0x1p-13; }

  int64_t page_bytes() const { return static_cast<int64_t>(pages_.bytes()); }
  KvStatistics statistics() const { return store_.statistics(); }

 private:
  KvStore::Append extend(KvStore::Sequence sequence, int64_t count);
  // The last step's first row in the last layer, before it is committed.
  void check();

  Geometry shape_;
  ProceduralPages pages_;
  KvStore store_;
  Backend& backend_;
  ThreadPool& pool_;
  KvStore::Sequence base_;
  std::vector<KvStore::Sequence> forks_;
  std::vector<int64_t> order_;
  std::vector<int32_t> ids_;
  std::vector<float> queries_, out_;
  std::mt19937 random_{1};
  int64_t tokens_ = 0;
  bool check_next_ = false;
  double worst_ = 0;
  AttentionMode mode_;
  AttentionReport report_;
  float sharpness_ = 0;
  int64_t asked_ = 0;  // pages
};

// How fast files can be read, without doing anything with what is read: as the store reads, by
// direct I/O, a MiB at a time, several at once.
class DiskReads {
 public:
  // Of the files of a MiB or more below a directory. Throws if there are none.
  explicit DiskReads(const std::string& directory);
  // Reads the next `bytes` of them, and then the first again; 0: all of them once.
  void sample(int64_t bytes);
  double median_rate() const;  // bytes a second
  int64_t bytes() const { return bytes_; }

 private:
  struct Piece {
    size_t file;
    uint64_t offset;
    size_t bytes;
  };
  std::vector<std::string> paths_;
  std::vector<Piece> pieces_;
  size_t next_ = 0;
  int64_t bytes_ = 0;
  std::vector<double> rates_;
};

}  // namespace puna::bench
