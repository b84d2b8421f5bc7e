// The contract between the CUDA backend and its kernels: a C table of functions, which
// libpuna_cuda.so hands out and, in the tests, the emulator. Freestanding.
//
// All functions of a Device but send() are carried out in the order of the calls, asynchronously
// unless said otherwise; pointers are to device memory unless said otherwise. They return 0 or a
// code for describe().
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/candidate.h"

namespace puna::cuda {

// Of this file: both sides must have been compiled with the same.
constexpr int32_t kTableVersion = 14;

struct DeviceInfo {
  char name[256];
  int32_t major, minor;  // compute capability
  int32_t multiprocessors;
  int64_t memory;
};

// Consecutive rows of fp32.
struct FloatRows {
  float* data;
  int64_t stride;
};
struct ConstFloatRows {
  const float* data;
  int64_t stride;
};

// --- products ------------------------------------------------------------------------------------

enum OperandKind : int32_t { kOperandF32, kOperandBF16, kOperandInt8 };

// Activations as products want them, written by prepare_operand and read by product:
//   f32   data float [rows][stride]
//   bf16  data uint16 [rows][stride], zero from the last column to the stride, which is a multiple
//         of kActivationGroup
//   int8  data int8 [rows][stride], likewise; scales [rows][spans] of kActivationGroup columns;
//         sums [rows][groups] of the codes of `group` columns (kernel_table.h: quantize_row)
struct Operand {
  void* data;
  float* scales;
  int32_t* sums;
  int64_t stride, spans, groups;
  int32_t kind, group;
};

// Row r of the operand is made of row index[r] (r if null) of x:
//   x * score[r] (x if null), or, gated, silu(x[c]) * x[cols + c].
struct OperandCall {
  Operand operand;
  ConstFloatRows x;
  int64_t rows, cols;
  const int32_t* index;
  const float* score;
  int32_t gated;
};

// Rows that belong to experts (routing_call): expert e multiplies rows [offsets[e], offsets[e + 1])
// with matrices[e].
struct ExpertRows {
  const int32_t* offsets;       // null: there are no experts
  const int32_t* occupied;      // [slots]: experts with rows, ascending, then -1
  const void* const* matrices;  // all packed alike
  int32_t slots;
};

// The expert that all rows have beside those of their own: a product of the same launch, with a
// matrix that is packed like the others.
struct SharedExpert {
  const void* weights;
  Operand x;
  int64_t count;  // rows of x; 0: there is none
  FloatRows out;
  int32_t accumulate;
};

// How weights are packed, in panels of kPanelRows rows (quant/format.h).
enum WeightKind : int32_t { kWeightsF32, kWeightsBF16, kWeightsFP8, kWeightsQuantized };

// By which instructions products are computed. With quantised weights no bit depends on it, and it
// is for products of many rows; with bfloat16 bits may, and it is for any number of rows, but not
// for experts.
enum ProductForm : int32_t {
  kProductOfWarps,
  kProductOfWarpgroups,  // where the device has them
};

// out = x W^T: + bias, then GELU, then + out.
struct ProductCall {
  int32_t kind;
  int32_t format;  // of kWeightsQuantized: its place in quant/formats.inc
  int32_t gelu, accumulate;
  const void* weights;
  int64_t rows, cols;   // of W
  int64_t panel_bytes;  // of kPanelRows rows
  Operand x;
  int64_t count;  // rows of x
  FloatRows out;
  const float* bias;  // or null
  ExpertRows experts;
  SharedExpert shared;
  int32_t form;
  // Of kWeightsBF16 without experts: out, too, as an operand of products, of bfloat16 and with as
  // many columns as W has rows; none if its data is null. If there is one, `out` may not be wanted.
  Operand operand;
  int32_t passing;
};

// --- norms, and what experts made ----------------------------------------------------------------

// residual[r] += x[slot[r][0]], then + x[slot[r][1]], ...
struct AddExpertsCall {
  FloatRows residual;
  ConstFloatRows x;
  const int32_t* slot;
  int64_t rows, cols;
  int32_t top_k;
};

struct NormCall {
  FloatRows out;
  ConstFloatRows x;
  const float *weight, *bias;  // a bias makes it a layer norm
  int64_t rows, cols;
  float eps;
  Operand operand;       // out, too, as an operand of products; none if its data is null
  AddExpertsCall added;  // before, to x, which is its residual; nothing if it has no rows
};

// --- mixture of experts --------------------------------------------------------------------------

// Of few rows the router itself, as weights of fp32 in panels: many blocks multiply, and the one
// that comes last routes. A logit has the bits of the product with a router. `parts` has at most
// kMostRouterParts floats.
constexpr int64_t kMostRouterParts = 20480;
struct Router {
  const void* weights;  // null: the logits are there
  int64_t panel_bytes;
  float* parts;      // [rows][spans of kActivationGroup columns][experts]
  int32_t* arrived;  // one, 0
};

// From the router's logits [rows][experts]: the top_k experts of each row (ties: the lower index),
// and the rows by expert, in order. Slots number pairs of a row and one of its experts.
struct RoutingCall {
  float* logits;
  int64_t rows;
  int32_t experts, top_k;
  int32_t* row;       // [slots]: of each slot
  float* score;       // [slots]: sigmoid of the logit
  int32_t* offsets;   // [experts + 1]: first slot of each expert
  int32_t* occupied;  // [min(experts, slots)] as in ExpertRows
  int32_t* slot;      // [rows][top_k]: a row's slots by ascending expert
  ConstFloatRows x;   // of `cols` columns, for the two that follow
  int64_t cols;
  Router router;
  NormCall norm;    // makes x, with the router, which has it first; nothing if it has no rows
  Operand operand;  // rows times their scores, by slot; none if its data is null
};

// --- rows ----------------------------------------------------------------------------------------

// out[to[r]] = x[from[r]]; a null index counts from 0.
struct MoveCall {
  FloatRows out;
  ConstFloatRows x;
  const int32_t *to, *from;
  int64_t rows, cols;
};

// --- choosing tokens -----------------------------------------------------------------------------

constexpr int64_t kChoiceColumns = 2048;  // of a row, for each block
constexpr int64_t choice_blocks(int64_t cols) {
  return (cols + kChoiceColumns - 1) / kChoiceColumns;
}

// Of each row the column of its largest element, by the rule of base/argmax.h.
struct ArgmaxCall {
  ConstFloatRows x;
  int64_t rows, cols;
  uint64_t* parts;   // [rows][choice_blocks(cols)]
  int32_t* arrived;  // [rows]: zero before and after
  int32_t* out;      // [rows]
};

// Elements are counted by how far below the largest they are, in steps of 1 / kCandidateSteps; a
// row's candidates are those of the first so many steps that are not too many.
constexpr int32_t kCandidateSteps = 8, kCandidateBins = 256, kMostCandidates = 2048;
struct RowCandidates {
  double total;   // backend.h: Candidates
  int32_t count;  // 0: there are too many, or elements that are no numbers
  int32_t unused;
  Candidate at[kMostCandidates];
};
struct CandidatesCall {
  ConstFloatRows x;
  int64_t rows, cols;
  const int32_t* largest;     // [rows]: as ArgmaxCall has them
  const double* temperature;  // [rows]; 0: nothing is wanted of the row
  double* parts;              // [rows][choice_blocks(cols)]
  int32_t* counts;            // [rows][kCandidateBins]: zero before and after
  int32_t* arrived;           // [rows]: zero before and after
  int32_t* bins;              // [rows]
  RowCandidates* out;         // [rows]
};

// --- attention -----------------------------------------------------------------------------------

enum PageForm : int32_t { kPageF32, kPageBF16, kPageInt8, kPageInt4 };

// How pages lie in memory: offsets of one head's keys and values, in bytes (backend/kv_layout.h).
struct OpenPages {
  int64_t head_bytes, part_bytes;
  int32_t form;
};
struct SealedPages {
  int64_t plane_bytes, code_bytes;  // of one head
  int64_t key_scale_bytes, value_scale_bytes;
  int64_t lower, values, key_scales, value_scales;  // where the regions begin
  int64_t page_bytes;
  int32_t form;  // that of open pages: pages are not sealed
  int32_t bits;
};

struct Heads {
  int32_t query, key_value, dim;
};

// Where the key and value of a row go.
struct AppendedRow {
  void* page;
  int64_t token;  // of the page
};

// RoPE, QK norm and, for queries, temperature and softmax scale, in place; keys and values to their
// pages.
struct AppendCall {
  FloatRows qkv;
  int64_t rows;
  Heads heads;
  OpenPages open;
  const AppendedRow* to;                 // [rows]
  const float *cos, *sin, *temperature;  // [rows][dim / 2], [rows], or null
  int32_t norm;
  float norm_eps, scale;
};

struct SealedPage {
  void* sealed;
  const void* open;
};
struct SealCall {
  const SealedPage* pages;  // [count]
  int64_t count;
  Heads heads;
  OpenPages open;
  SealedPages sealed;
};

// A row of queries sees the pages before its own as wholes, in their closed form, and `seen` tokens
// of its own, open one.
struct AttentionQuery {
  int64_t row;  // of qkv
  int64_t seen;
};
// Some pairs of a query and a head: of neighbouring queries, whose own page is the same, and of the
// heads that share a KV head; for each KV head. Pair i is head i % group of query i / group.
struct AttentionTile {
  const void* own;
  int64_t first_page, before;  // they see pages[first_page .. first_page + before)
  int64_t query;               // that pair 0 belongs to
  int32_t first, pairs;        // pairs [first, first + pairs)
};

// How tiles are worked on. A pair has the same bits in both of the last two.
enum AttendKind : int32_t {
  kAttendPlain,   // in fp32: a block for each page; a tile is of one query
  kAttendPages,   // on the tensor cores: a block for some pages in a row
  kAttendGroups,  // on the tensor cores: a block for each group of pages
};
// Of one tile.
constexpr int kMostPairs[] = {8, 16, 128};
// The states of so many pages are added up, in order, to that of a group; then those of groups.
constexpr int kGroupPages = 16;

// out[i] = attention of queries[i]: of the pages [first_page, first_page + page_count) of each
// tile, a multiple of kGroupPages at either end but for the last. What other calls make of the
// other pages meets in the same states; the call that ends the last group gives the results.
struct AttendCall {
  FloatRows out;
  ConstFloatRows qkv;
  const AttentionQuery* queries;
  const AttentionTile* tiles;
  int64_t count;  // of tiles
  const void* const* pages;
  int64_t first_page, page_count;
  int64_t most_pages;  // at least as many as a tile sees, its own among them
  int64_t most_pairs;  // of a tile
  Heads heads;
  OpenPages open;
  SealedPages closed;
  int32_t kind;
  int32_t run_pages;  // of a block of kAttendPages, a power of two up to kGroupPages; else 1
  // The states of each page (kAttendGroups: none), then of each group of pages:
  // [count][KV heads][most_pairs][parts][kStateHead + dim, rounded up to 4].
  float* states;
  // [count][KV heads][groups + 1]: zero before and after.
  int32_t* arrived;
  // Of kAttendPages, if each row of qkv has a tile and no other tile sees its page: what this call
  // would have done is done here, but that qkv stays what it is; nothing if it has no rows.
  AppendCall append;
  int64_t rows;     // of out, if this call is for all of them; or 0
  Operand operand;  // out, too, of heads of kActivationGroup channels; none if its data is null
};
constexpr int kStateHead = 4;  // largest score, sum, two that are not used
constexpr int64_t groups_of(int64_t pages) { return (pages + kGroupPages - 1) / kGroupPages; }
constexpr int64_t parts_of(int32_t kind, int64_t most_pages) {
  return (kind == kAttendGroups ? 0 : most_pages) + groups_of(most_pages);
}
constexpr int64_t state_floats(int64_t dim) { return kStateHead + (dim + 3) / 4 * 4; }
// Whether kAttendPages and kAttendGroups are there for these heads and pages.
constexpr bool on_tensor_cores(int32_t open_form, int64_t dim) {
  return open_form == kPageBF16 && (dim == 64 || dim == 128);
}

// --- vision --------------------------------------------------------------------------------------

// q and k of qkv [tiles * tokens][3 * heads * dim] are turned in place, then attend within tiles:
// on the tensor cores, where all may be rounded to bfloat16, or in fp32.
constexpr int kMostVisionDim = 96;  // of the former; Llama 4 has 88
struct VisionAttentionCall {
  FloatRows out, qkv;  // with even strides
  int64_t tiles, tokens;
  int32_t heads, dim;
  const float *cos, *sin;  // [tokens][dim / 2]
  float scale;
  // [tiles][3][heads][tokens][kMostVisionDim], the rounded queries, keys and values; null: in fp32
  uint16_t* rounded;
  // In fp32: [tiles * tokens][heads][ceil(tokens / kPageTokens)][kStateHead + dim, rounded up to 4]
  float* states;
  // If rounded: out, too, as an operand of bfloat16 with as many columns; none if its data is null.
  Operand operand;
};
struct UnfoldCall {
  FloatRows out;
  const float* pixels;
  int64_t tiles, size, patch;
};
struct PixelShuffleCall {
  FloatRows out;
  ConstFloatRows x;
  int64_t tiles, grid, factor, cols;  // cols of x
};

// --- what the device can do at best --------------------------------------------------------------

enum Exercise : int32_t {
  kExerciseRead,
  kExerciseInt8,
  kExerciseBF16,
  kExerciseWarpgroupsInt8,  // by their products, where the device has them, and else by warps
  kExerciseWarpgroupsBF16,
};

// Nothing but reading `bytes` of memory, or `rounds` times kExerciseProducts products of the tensor
// cores, of exercise_operations() multiplications and additions each, by each warp, or as its share
// of a warpgroup's.
constexpr int32_t kExerciseProducts = 8;
constexpr bool is_of_warpgroups(int32_t kind) { return kind >= kExerciseWarpgroupsInt8; }
constexpr int64_t exercise_operations(int32_t kind) {
  const bool int8 = kind == kExerciseInt8 || kind == kExerciseWarpgroupsInt8;
  return 2 * 16 * (is_of_warpgroups(kind) ? 64 : 8) * (int8 ? 32 : 16);
}
struct ExerciseCall {
  const void* data;  // bytes is a multiple of 16
  int64_t bytes, rounds;
  int32_t* out;          // something that depends on all of it: one
  int32_t kind, blocks;  // of kExerciseWarps
};
constexpr int32_t kExerciseWarps = 8;

// A device does two things at a time: what is asked for otherwise, and copies of send(); each in
// its own order, and neither waits for the other but by events.
enum Queue : int32_t { kMainQueue, kSendQueue };

struct DeviceTable {
  int32_t version;

  // --- devices: *count is 0 if there are none or no driver; the code says why
  int (*device_count)(int* count);
  // Takes nothing of the device, which may be in use by others, all of it.
  int (*device_info)(int ordinal, DeviceInfo* info);
  int (*free_memory)(int ordinal, int64_t* bytes);
  const char* (*describe)(int code);
  int (*stream_device)(void* stream, int* ordinal);  // a stream as CUDA has them: a cudaStream_t
  // Work of kMainQueue is asked for on `stream`, which must outlive the device; null: on one of its
  // own. A stream that is not of this device, see stream_device(), or a default one will not do.
  int (*open)(int ordinal, void* stream, void** device);
  void (*close)(void* device);
  int (*synchronise)(void* device);  // both queues
  // Waits for all that the device has been asked for, by whomever, in whatever stream.
  int (*await_everybody)(void* device);

  // --- memory
  int (*allocate)(void* device, size_t bytes, void** memory);  // zeroed
  int (*release)(void* device, void* memory);
  // From host memory, which may be changed once this returns.
  int (*upload)(void* device, void* to, const void* from, size_t bytes);
  // To host memory: `rows` of `bytes` each, one after the other. Waits.
  int (*download)(void* device, void* to, const void* from, size_t bytes, size_t stride,
                  int64_t rows);
  // Within the device's memory and that of allocate_host(), and from one to the other.
  int (*copy)(void* device, void* to, const void* from, size_t bytes);

  // --- memory of the host that the device reads and writes by itself: an upload from it may read
  // it after the call, until something fetched later has arrived
  int (*allocate_host)(void* device, size_t bytes, void** memory);
  int (*release_host)(void* device, void* memory);
  // As download(), to such memory, and waits for nothing; it has arrived after await_fetched(),
  // which waits for no call after the last fetch().
  int (*fetch)(void* device, void* to, const void* from, size_t bytes, size_t stride, int64_t rows);
  int (*await_fetched)(void* device);

  // --- copies beside all else, and events that they and others wait for
  // From memory of allocate_host(), which is read after the call; in the order of kSendQueue.
  // Memory that was just allocated is there for it once an event says so that was recorded since.
  int (*send)(void* device, void* to, const void* from, size_t bytes);
  // Timed ones are for elapsed().
  int (*make_event)(void* device, int32_t timed, void** event);
  int (*release_event)(void* device, void* event);
  // The event will be when all that this queue has been asked for so far is done.
  int (*record_event)(void* device, void* event, int32_t queue);
  // What this queue is asked for from here on waits until the event is, as last recorded; if it
  // never was, for nothing.
  int (*wait_for_event)(void* device, void* event, int32_t queue);
  int (*await_event)(void* device, void* event);  // the host waits
  // From one event to another; both are.
  int (*elapsed)(void* device, void* from, void* to, float* milliseconds);

  // --- graphs: kernels that are started between begin and end are not carried out, but noted; and
  // all of them each time that start_graph() is called
  int (*begin_graph)(void* device);
  int (*end_graph)(void* device, void** graph);
  int (*start_graph)(void* device, void* graph);
  int (*release_graph)(void* device, void* graph);

  // --- kernels
#define PUNA_OPERATION(name, Call) int (*name)(void* device, const Call*);
#include "kernels/cuda/operations.inc"
#undef PUNA_OPERATION
};

}  // namespace puna::cuda

// What libpuna_cuda.so exports; null if it was compiled with another version.
#define PUNA_CUDA_ENTRY puna_cuda_table
#define PUNA_CUDA_ENTRY_NAME "puna_cuda_table"
extern "C" const puna::cuda::DeviceTable* PUNA_CUDA_ENTRY(int32_t version);
