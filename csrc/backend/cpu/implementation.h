// The class behind make_cpu_backend(). Its operations are in cpu_backend.cpp (memory, rows, vision
// layout), products.cpp, moe.cpp, attention.cpp and vision_attention.cpp.
//
// How work is shared: output panels, rows and heads go to lanes; the sum over k of one element is
// always one kernel call, so no result depends on the number of lanes. Scratch memory grows to what
// the largest call needed and stays.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "backend/cpu/attention_plan.h"
#include "backend/cpu/page_choice.h"
#include "backend/host_backend.h"
#include "backend/routing.h"
#include "kernels/kernel_table.h"
#include "platform/memory.h"
#include "platform/thread_pool.h"

namespace puna {

class CpuBackend final : public HostBackend {
 public:
  explicit CpuBackend(const BackendOptions& options);

  const char* name() const override { return "cpu"; }
  std::string description() const override;

  Buffer allocate(size_t bytes) override;
  void copy(void* to, const void* from, size_t bytes) override;
  WeightRef load_matrix(std::span<const MatrixSource> parts, const MatrixOptions& options) override;
  WeightRef adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                         std::shared_ptr<const void> data) override;
  VectorRef load_vector(std::span<const TensorRef> parts) override;
  void to_host(float* out, ConstRows x) override;
  void from_host(Rows out, const float* x) override;

  void embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) override;
  void gather(Rows out, ConstRows x, std::span<const int32_t> index) override;
  void scatter(Rows out, ConstRows x, std::span<const int32_t> index) override;
  void rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) override;
  void layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                  float eps) override;

  void matmul(Rows out, ConstRows x, const WeightRef& weight,
              const MatmulOptions& options) override;
  void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) override;
  void moe(Rows residual, ConstRows x, const MoeWeights& weights) override;
  void experts(Rows out, ConstRows x, const Routing& routing, std::span<const WeightRef> gate_up,
               std::span<const WeightRef> down) override;
  int threads() const override { return pool_.lanes(); }
  bool has_bits_of_devices() const override { return std::strcmp(kernels_.isa, "scalar") != 0; }

  void attention(Rows out, const AttentionInput& input) override;
  void vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                        const float* cos, const float* sin, DType operands) override;

  void unfold(Rows out, const float* pixels, int64_t tiles, int64_t size, int64_t patch) override;
  void pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid, int64_t factor) override;

 private:
  // Columns handled at once by elementwise steps, so that one row still occupies several lanes. A
  // multiple of every format's block and of kActivationGroup.
  static constexpr int64_t kPieceColumns = 1024;
  static int64_t pieces_of(int64_t columns) {
    return (columns + kPieceColumns - 1) / kPieceColumns;
  }

  class Scratch {
   public:
    template <class T>
    T* reserve(int64_t count) {
      return static_cast<T*>(reserve_bytes(static_cast<size_t>(count) * sizeof(T)));
    }

   private:
    void* reserve_bytes(size_t bytes);
    Memory memory_;
  };

  // Rows as the weights they are multiplied with want them: fp32, bfloat16, or quantised by the
  // groups of the weights' format.
  struct Operand {
    WeightFormat format = WeightFormat::kF32;
    void* data = nullptr;  // float, uint16_t or int8_t [rows][stride]
    int64_t cols = 0, stride = 0;
    float* scales = nullptr;  // [rows][spans]
    int32_t* sums = nullptr;  // [rows][groups]
    int64_t spans = 0, groups = 0;
  };
  // The gate_up and down products of some rows with one pair of weights.
  struct FeedForward {
    Operand x;
    float* hidden = nullptr;  // [rows][2 * width]; the gate half becomes the activation
    Operand activated;        // [rows][width], the input of down
    int64_t width = 0;

    int64_t pieces() const { return pieces_of(width); }  // of a row
  };
  // A part of a product: some rows by the columns of some panels.
  struct Tile {
    int64_t column, width;
    int64_t first, rows;
  };
  // How a product is cut into tiles. The blocks of rows of a strip of columns are neighbours, so
  // that its weights are read from memory once.
  struct Tiling {
    int64_t rows, columns;              // of the product
    int64_t block_rows, strip_columns;  // of a tile; the latter are whole panels

    int64_t blocks() const { return (rows + block_rows - 1) / block_rows; }
    int64_t count() const { return (columns + strip_columns - 1) / strip_columns * blocks(); }
    Tile at(int64_t index) const {
      const int64_t column = index / blocks() * strip_columns;
      const int64_t first = index % blocks() * block_rows;
      return {column, std::min(strip_columns, columns - column), first,
              std::min(block_rows, rows - first)};
    }
    // Elements of the largest tile.
    int64_t tile_size() const { return std::min(rows, block_rows) * strip_columns; }
  };
  // Calls body(begin, end) on pieces of [0, count): on all lanes if the elements touched are worth
  // waking them, else here.
  template <class Body>
  void for_rows(int64_t count, int64_t elements_each, const Body& body) {
    // About 2 us of work for one lane, a few times the cost of a fork and join.
    constexpr int64_t kInlineElements = 32768;
    if (count * elements_each <= kInlineElements)
      body(int64_t{0}, count);
    else
      pool_.run([&](Lane& lane) {
        const Part part = lane.part(count);
        if (part.begin < part.end) body(part.begin, part.end);
      });
  }

  // Whether so many multiply-adds are not worth waking other lanes. These take one lane some 10 us,
  // and others save little of that; where the machine has other work to do, waiting for a lane that
  // must first get a core costs milliseconds.
  static bool small(int64_t multiply_adds) { return multiply_adds <= int64_t{1} << 18; }

  // As many rows only stream the weights.
  static constexpr int64_t kStreamedRows = 4;

  // Calls body(tile, lane) on all tiles of a product of `rows` rows, on all lanes or here alone.
  // Streaming, each lane reads one contiguous share, and the last tiles of another's if that is
  // slower. Otherwise tiles go to whoever is free, neighbours at the same time.
  template <class Body>
  void for_tiles(int64_t tiles, int64_t rows, bool alone, const Body& body) {
    const bool streams = rows <= kStreamedRows;
    TileCounter counter;
    if (streams) shares_.reset(tiles);
    pool_.run(
        [&](const Lane& lane) {
          for (int64_t tile; streams && (tile = shares_.next(lane)) >= 0;) body(tile, lane);
          for (int64_t tile; !streams && (tile = counter.next()) < tiles;) body(tile, lane);
        },
        alone);
  }

  // vision_attention.cpp
  template <class Operands>
  void attend_tiles(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                    const float* cos, const float* sin);

  // products.cpp
  // Room for `rows` rows that will be multiplied with weights of `format` and `cols` columns.
  static Operand reserve_operand(WeightFormat format, int64_t rows, int64_t cols, Scratch& scratch);
  // Columns [column, column + count) of a row; both ends at multiples of kPieceColumns, or at the
  // last column. `values` may be where an fp32 operand keeps them.
  void write_operand(const Operand& operand, int64_t row, int64_t column, const float* values,
                     int64_t count) const;
  Operand prepare(ConstRows x, const WeightRef& weight, Scratch& scratch);
  // Tiles that occupy the lanes: strips of several panels (kernel_table.h) where rows are many, and
  // all rows at once, unless there would be too few tiles.
  Tiling tiling(int64_t rows, int64_t columns) const;
  // Columns [tile.column, + tile.width) of x W^T for rows [tile.first, + tile.rows) of x; `out` is
  // the tile's corner.
  void multiply(float* out, int64_t out_stride, const Operand& x, const WeightRef& weight,
                const Tile& tile, const float* bias = nullptr) const;
  FeedForward plan_feed_forward(const Operand& x, int64_t rows, const WeightRef& gate_up,
                                const WeightRef& down, Scratch& hidden, Scratch& activated);
  void activate(const FeedForward& plan, int64_t piece) const;

  // moe.cpp
  // Of routed experts: a slot's input is its row times its score, as the weights want it.
  FeedForward plan_slots(int64_t slots, const WeightRef& gate_up, const WeightRef& down);
  void scale_input(const FeedForward& routed, const Routing& routing, ConstRows x,
                   int64_t piece) const;
  // From the inputs to what the products with down take; `rows` of x.
  void activate_experts(const FeedForward& routed, const Routing& routing,
                        std::span<const WeightRef> gate_up, int64_t rows, bool alone);
  // Calls body(expert, tile) on the tiles of a product of each expert's slots.
  template <class Body>
  void for_expert_tiles(const Routing& routing, int64_t columns, int64_t rows, bool alone,
                        const Body& body);

  // attention.cpp
  void append(const AttentionInput& input, const AttentionSegment& segment, int64_t i,
              int64_t kv_head) const;
  void turn_query(const AttentionInput& input, int64_t row, int64_t head) const;
  void prepare_attention(const AttentionInput& input, bool alone);

  KernelTable kernels_;
  ThreadPool pool_;
  // Operations follow one another closely; between passes workers fall asleep all the same.
  ThreadPool::SpinScope spin_{pool_};
  TileShares shares_{pool_.lanes()};

  Scratch rounded_, hidden_, activated_;  // products
  Scratch logits_, router_rows_, routed_rows_, routed_hidden_,
      routed_activated_;  // mixture of experts
  Scratch lanes_;         // a share for each lane
  Scratch leaves_;        // attention
  Routing routing_;
  AttentionPlan attention_plan_;
  PageChoice page_choice_;
};

}  // namespace puna
