// What a device must be able to do to run Llama 4: about a dozen fused operations on fp32
// activations.
//
// Every operation checks its shapes and throws Error before it computes. Results obey the
// determinism rule of DESIGN decision 3: a row depends on nothing but its own inputs, so it does
// not matter which other rows are in the call, on how many threads it runs, or how a prompt was cut
// into calls. A backend serves one caller at a time (the engine's scheduler holds a lock around a
// forward pass).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/buffer.h"
#include "backend/kv_layout.h"
#include "base/attention_mode.h"
#include "base/candidate.h"
#include "base/tensor.h"

namespace puna {

struct MatmulOptions {
  const VectorRef* bias = nullptr;  // [out.cols], added to each row
  bool gelu = false;                // exact (erf) GELU after the bias
  bool accumulate = false;          // out += instead of out =
  // For matrices whose calls have many rows. It may change bits, which then, too, depend on no
  // other row: a matrix should have it always or never.
  bool many_rows = false;
  // Nobody reads `out` but the very next matmul, as its x: afterwards it may hold anything.
  bool passing = false;
};

// Sealed pages on their way through memory from a slower medium, in order.
class KvStream {
 public:
  // Pages that a reader may hold at once: it waits for page `i` only after passed(i + 1 - kHeld) or
  // beyond, so a stream needs room for as many, and for what it reads ahead.
  static constexpr int64_t kHeld = 32;
  virtual ~KvStream() = default;
  // Page `index` of the segment's sealed pages, readable until passed() goes beyond it; waits for
  // it. Each index once, in ascending order; one caller at a time. Throws Error if the medium
  // fails.
  virtual const void* wait(int64_t index) = 0;
  // Pages before `index` are not needed any more in this pass, unless it is restarted.
  virtual void passed(int64_t index) = 0;
  // Begins again, at the first page; only those whose `wanted` is not 0 will be waited for. Every
  // page that was handed out is passed.
  virtual void restart(std::span<const uint8_t> wanted) = 0;
  // Pages before this index stay where they are to the end of the pass, passed or not.
  virtual int64_t lasting() const { return 0; }
};

// The rows of one sequence in a batch, and the pages that hold its keys and values in one layer.
//
// Pages count from that of `first_position`. A row in page b attends to pages 0 .. b - 1 as wholes
// and, causally, to its own page b, which is always an open one. Where the layer seals its pages
// (AttentionInput::sealed), the earlier ones are read in their sealed form even if this very call
// fills them: a row's result depends on its position, not on how a prompt was cut into calls.
struct AttentionSegment {
  int64_t first_row = 0, rows = 0;
  int64_t position = 0;        // absolute position of the first row; rows are consecutive
  int64_t first_position = 0;  // position of token 0 of page 0; row p sees first_position..p
  // Pages [0, sealed.size()). With a sealed form, these are all pages that are full after this
  // call, and the call writes those that it fills (from that of `position` on); without one, the
  // pages before first_open, as they were when open. A null entry comes through `stream`, which
  // hands out memory of the host.
  std::span<void* const> sealed;
  KvStream* stream = nullptr;  // segments of one call that share it share its pages, too
  // Of sealed pages that come through the stream, the keys' scales and zero points of all heads as
  // they lie in the page, null where they are not known: what is not exact leaves out pages by them
  // that it then need not read. Empty: of none.
  std::span<const void* const> key_scales;
  int64_t first_open = 0;  // at most the page of `position`
  // Pages [first_open, first_open + open.size()): written and read, up to the last row's page.
  std::span<void* const> open;
  // Null: exact. Otherwise `report` is added to.
  const AttentionMode* mode = nullptr;
  AttentionReport* report = nullptr;
};

struct AttentionInput {
  // [rows][(heads + 2 * kv_heads) * head_dim]: queries, keys, values; overwritten as scratch.
  // Query head j uses KV head j / (heads / kv_heads).
  Rows qkv;
  int64_t heads = 0;
  KvPageLayout layout;    // of open pages
  KvSealedLayout sealed;  // of sealed ones
  // Rows whose attention is wanted, ascending; none: all. `out` has a row for each of them, while
  // keys and values of every row are stored.
  std::optional<std::span<const int32_t>> queries;
  const float* cos = nullptr;  // [rows][head_dim / 2], null on layers without RoPE
  const float* sin = nullptr;
  bool qk_norm = false;  // weightless RMS norm of each head of q and k, after RoPE
  float qk_norm_eps = 0;
  const float* temperature = nullptr;  // [rows] factor of q, or null
  std::span<const AttentionSegment> segments;
};

struct MoeWeights {
  WeightRef router;  // [experts][hidden], kept in fp32
  WeightRef shared_gate_up,
      shared_down;  // [2 * width][hidden] (gate rows, then up rows), [hidden][width]
  std::vector<WeightRef> gate_up, down;  // the same per expert
  int64_t top_k = 1;
  bool experts_on_host = false;  // gate_up and down are of the backend's host()
  // Of a call with many rows they may come to the backend's own memory all the same, which then has
  // room for so many of the matrices at a time, and the host's for so many bytes on their way.
  bool experts_are_sent = false;
  static constexpr int64_t kSentMatrices = 2, kStagedBytes = int64_t{16} << 20;
};

struct MatrixOptions {
  // What the matrix is packed as; none: as stored (GGUF's blocked types as the format that holds
  // them exactly, float16 as float32).
  std::optional<WeightFormat> format;
  // How much an error in each column weighs when it is quantised, [cols]; null: all the same.
  const float* importance = nullptr;
};

// What a token is drawn from in place of a whole row of logits.
struct Candidates {
  // The row's largest elements, in whatever order: each of the others is smaller than all of them.
  // Empty: there are too many that are near the largest, or the row holds what is no number.
  std::vector<Candidate> largest;
  // The sum of exp((x - the largest) / temperature) over the whole row, in double: of any order and
  // any exp() that is right within its last places, as a share of the sum within `error`.
  double total = 0, error = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const char* name() const = 0;         // "cpu", "ref", ...
  virtual std::string description() const = 0;  // for people: "cpu (avx512_vnni_bf16, 2 threads)"

  // --- memory and weights ------------------------------------------------------------------------
  virtual Buffer allocate(size_t bytes) = 0;  // zeroed; OutOfMemory with the numbers
  // Bytes free of memory that the host cannot read; none: it is the host's own.
  virtual std::optional<int64_t> device_memory() const { return std::nullopt; }
  // The host's memory, of a kind that copies to and from that memory are fast with; not zeroed.
  virtual Buffer allocate_host(size_t bytes) { return allocate(bytes); }
  // Within both, in the order of the calls: the host sees it after to_host(), of nothing even.
  virtual void copy(void* to, const void* from, size_t bytes) = 0;
  // Packs weights into the host's memory, for what this one can leave there (MoeWeights).
  virtual Backend& host() { return *this; }
  // Packs the parts stacked by rows (all with the same cols and dtype) into one matrix.
  virtual WeightRef load_matrix(std::span<const MatrixSource> parts, const MatrixOptions& = {}) = 0;
  // A matrix that lies packed in memory already, as load_matrix() left it in a file. `data` holds
  // packed_bytes(format, rows, cols) and keeps the memory alive.
  virtual WeightRef adopt_matrix(WeightFormat format, int64_t rows, int64_t cols,
                                 std::shared_ptr<const void> data) = 0;
  // The parts joined end to end, as fp32.
  virtual VectorRef load_vector(std::span<const TensorRef> parts) = 0;
  virtual void to_host(float* out, ConstRows x) = 0;  // contiguous [rows][cols]
  virtual void from_host(Rows out, const float* x) = 0;

  // --- rows --------------------------------------------------------------------------------------
  // out[i] = table[ids[i]]; the table is a checkpoint tensor [vocab][hidden] in host memory.
  virtual void embed(Rows out, const TensorRef& table, std::span<const int32_t> ids) = 0;
  // out[i] = x[index[i]]
  virtual void gather(Rows out, ConstRows x, std::span<const int32_t> index) = 0;
  // out[index[i]] = x[i]
  virtual void scatter(Rows out, ConstRows x, std::span<const int32_t> index) = 0;
  virtual void rms_norm(Rows out, ConstRows x, const VectorRef& weight, float eps) = 0;
  virtual void layer_norm(Rows out, ConstRows x, const VectorRef& weight, const VectorRef& bias,
                          float eps) = 0;

  // --- products ----------------------------------------------------------------------------------
  // out = x W^T. With bfloat16 weights, x is rounded to bfloat16; with quantised ones to 8 bits per
  // group; sums are fp32.
  virtual void matmul(Rows out, ConstRows x, const WeightRef& weight,
                      const MatmulOptions& = {}) = 0;
  // residual += down(silu(gate(x)) * up(x)); gate_up holds the rows of gate, then those of up.
  virtual void mlp(Rows residual, ConstRows x, const WeightRef& gate_up, const WeightRef& down) = 0;
  // residual += shared(x) + sum over the top_k experts e by router logit (ties: the lower index) of
  // expert_e(sigmoid(logit_e) * x), added in the order of e. The router's product is fp32.
  virtual void moe(Rows residual, ConstRows x, const MoeWeights& weights) = 0;

  // --- attention ---------------------------------------------------------------------------------
  // RoPE, QK norm and temperature; keys and values written to their pages, full pages sealed;
  // causal attention of each row over its segment's pages; out [queries][heads * head_dim].
  virtual void attention(Rows out, const AttentionInput& input) = 0;
  // Bidirectional attention within each tile of `tokens` rows. qkv [tiles * tokens][3 * heads *
  // head_dim] is scratch afterwards; cos, sin [tokens][head_dim / 2] turn q and k. `operands`:
  // fp32, or bfloat16, to which what goes into the two products may then be rounded.
  virtual void vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                                const float* cos, const float* sin, DType operands) = 0;

  // --- choosing tokens ---------------------------------------------------------------------------
  // out[i] = the column of the largest element of row i (base/argmax.h); the host sees it at once.
  virtual void argmax(std::span<int32_t> out, ConstRows x);
  // Of each row by its temperature; of rows whose temperature is 0 nothing. None at all: rows are
  // at the host's hand as they are.
  virtual std::vector<Candidates> candidates(ConstRows x, std::span<const double> temperatures);

  // --- vision layout -----------------------------------------------------------------------------
  // pixels [tiles][3][size][size] -> out [tiles * (size / patch)^2][3 * patch^2]: column c *
  // patch^2 + y * patch + x, patches row-major.
  virtual void unfold(Rows out, const float* pixels, int64_t tiles, int64_t size,
                      int64_t patch) = 0;
  // x [tiles * grid^2][dim] -> out [tiles * (grid / factor)^2][factor^2 * dim]: neighbouring
  // patches, row-major, joined channel-wise.
  virtual void pixel_shuffle(Rows out, ConstRows x, int64_t tiles, int64_t grid,
                             int64_t factor) = 0;

  // --- sharing with others -----------------------------------------------------------------------
  // The GPU that memory of allocate() is of, as CUDA counts them; none: it is the host's.
  virtual std::optional<int> gpu() const { return std::nullopt; }
  // As allocate(), for memory that others use, too, in an order of their own: it is given back when
  // they have come to an end, and may be by any thread, and when the backend is gone.
  virtual Buffer allocate_shared(size_t bytes) { return allocate(bytes); }
};

struct BackendOptions {
  std::string isa;                    // "" = the best supported
  int threads = 0;                    // 0 = physical cores allowed to this process
  int ordinal = 0;                    // which one, of several devices
  std::shared_ptr<void> stream = {};  // of a GPU, as LoadOptions has it
};

// One line of backends.inc: how to make it, and whether it can be made here.
struct BackendStatus {
  std::string name;
  bool available = false;
  std::string why;  // what was found, or what is missing
};

// An instruction set of this build, and whether this processor can run it.
struct IsaStatus {
  std::string name;
  bool available = false;
};

}  // namespace puna
