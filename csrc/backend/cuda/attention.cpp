// Attention: what the host knows of segments and pages becomes tables for the kernels.
#include <algorithm>
#include <cmath>

#include "backend/checks.h"
#include "backend/cuda/implementation.h"
#include "base/error.h"

namespace puna {
namespace {

// Of the states of pages at once. A row of Scout over 8,192 tokens has 0.7 MB of them, over a
// million 85 MB.
constexpr int64_t kStateBytes = int64_t{256} << 20;
// A device's limit for all but the first direction of a grid.
constexpr int64_t kMostTiles = 65535;
// What a multiprocessor of an H200 takes for a page, in microseconds, as measured: with a tile of
// kAttendPages (when a block had a single page), and with one of kAttendGroups.
constexpr double kPagesMicroseconds = 8, kGroupsMicroseconds = 9;
// Blocks of kAttendPages on a multiprocessor; what one takes to begin and to end, in pages.
constexpr int64_t kPagesBlocks = 2;
constexpr double kRunOverhead = 0.5;

cuda::OpenPages open_pages(const KvPageLayout& layout) {
  return {static_cast<int64_t>(layout.head_bytes()), static_cast<int64_t>(layout.part_bytes()),
          layout.dtype == DType::kF32 ? cuda::kPageF32 : cuda::kPageBF16};
}

// What pages that are seen as wholes look like.
cuda::SealedPages closed_pages(const AttentionInput& input) {
  const KvSealedLayout& layout = input.sealed;
  cuda::SealedPages pages = {};
  pages.form = open_pages(input.layout).form;
  if (layout.format == KvSeal::kNone) return pages;
  pages.form = layout.format == KvSeal::kInt8 ? cuda::kPageInt8 : cuda::kPageInt4;
  pages.bits = layout.bits();
  pages.plane_bytes = static_cast<int64_t>(layout.plane_bytes());
  pages.code_bytes = static_cast<int64_t>(layout.code_bytes());
  pages.key_scale_bytes = static_cast<int64_t>(layout.key_scale_bytes());
  pages.value_scale_bytes = static_cast<int64_t>(KvSealedLayout::value_scale_bytes());
  pages.lower = static_cast<int64_t>(layout.lower_offset(0));
  pages.values = static_cast<int64_t>(layout.value_offset(0));
  pages.key_scales = static_cast<int64_t>(layout.key_scale_offset(0));
  pages.value_scales = static_cast<int64_t>(layout.value_scale_offset(0));
  pages.page_bytes = static_cast<int64_t>(layout.page_bytes());
  return pages;
}

cuda::Heads heads_of(const AttentionInput& input) {
  return {static_cast<int32_t>(input.heads), static_cast<int32_t>(input.layout.kv_heads),
          static_cast<int32_t>(input.layout.head_dim)};
}

bool seals(const AttentionInput& input) { return input.sealed.format != KvSeal::kNone; }

void* open_page(const AttentionSegment& segment, int64_t page) {
  return segment.open[static_cast<size_t>(page - segment.first_open)];
}

// Page `index` as rows of later pages see it; null: it comes through the segment's stream.
const void* closed_page(const AttentionInput& input, const AttentionSegment& segment,
                        int64_t index) {
  if (!seals(input) && index >= segment.first_open) return open_page(segment, index);
  return segment.sealed[static_cast<size_t>(index)];
}

size_t closed_bytes(const AttentionInput& input) {
  return seals(input) ? input.sealed.page_bytes() : input.layout.page_bytes();
}

// Cuts runs of pairs into tiles for the kinds of kernels, whichever takes less time.
void divide(std::span<const cuda::AttentionTile> runs, const cuda::AttendCall& call,
            int multiprocessors, std::span<std::vector<cuda::AttentionTile>> tiles) {
  const auto tiles_of = [](const cuda::AttentionTile& run, cuda::AttendKind kind) {
    return (run.pairs + cuda::kMostPairs[kind] - 1) / cuda::kMostPairs[kind];
  };
  const auto cut = [&](const cuda::AttentionTile& run, cuda::AttendKind kind, int32_t unit) {
    for (int32_t begin = 0; begin < run.pairs; begin += unit)
      for (int32_t first = begin; first < begin + unit && first < run.pairs;
           first += cuda::kMostPairs[kind]) {
        cuda::AttentionTile& tile = tiles[kind].emplace_back(run);
        tile.first = first;
        tile.pairs = std::min({cuda::kMostPairs[kind], begin + unit - first, run.pairs - first});
      }
  };
  if (!cuda::on_tensor_cores(call.open.form, call.heads.dim)) {
    for (const cuda::AttentionTile& run : runs)  // tiles are of one query
      cut(run, cuda::kAttendPlain, call.heads.query / call.heads.key_value);
    return;
  }
  const auto is_wide = [&](const auto& run) { return tiles_of(run, cuda::kAttendPages) > 1; };
  double by_pages = 0, by_groups = 0, longest = 0;
  for (const cuda::AttentionTile& run : runs) {
    if (!is_wide(run)) continue;
    const double pages = static_cast<double>((run.before + 1) * call.heads.key_value);
    by_pages += tiles_of(run, cuda::kAttendPages) * pages * kPagesMicroseconds;
    by_groups += tiles_of(run, cuda::kAttendGroups) * pages * kGroupsMicroseconds;
    longest = std::max(longest,
                       static_cast<double>(std::min<int64_t>(run.before + 1, cuda::kGroupPages)) *
                           kGroupsMicroseconds);
  }
  const bool groups = by_groups / multiprocessors + longest < by_pages / multiprocessors;
  for (const cuda::AttentionTile& run : runs)
    cut(run, groups && is_wide(run) ? cuda::kAttendGroups : cuda::kAttendPages, run.pairs);
}

// Pages that a block of kAttendPages takes in a row. Of long runs little is lost to their ends,
// where nothing is on its way; but there must be as many as blocks find a place, and none be late.
int32_t run_pages(std::span<const cuda::AttentionTile> tiles, const cuda::AttendCall& call,
                  int multiprocessors) {
  const auto turns = [&](int64_t run) {
    int64_t blocks = 0, longest = 0;
    for (const cuda::AttentionTile& tile : tiles) {
      const int64_t pages =
          std::clamp<int64_t>(tile.before + 1 - call.first_page, 0, call.page_count);
      blocks += (pages + run - 1) / run * call.heads.key_value;
      longest = std::max(longest, std::min(run, pages));
    }
    const int64_t places = multiprocessors * kPagesBlocks;
    return static_cast<double>((blocks + places - 1) / places) *
           (static_cast<double>(longest) + kRunOverhead);
  };
  int64_t best = 1;
  for (int64_t run = 2; run <= cuda::kGroupPages; run *= 2)
    if (turns(run) < turns(best)) best = run;
  return static_cast<int32_t>(best);
}

}  // namespace

void CudaBackend::append(const AttentionInput& input) {
  const int64_t rows = input.qkv.rows, pairs = input.layout.head_dim / 2;
  std::vector<cuda::AppendedRow> to;
  for (const AttentionSegment& segment : input.segments)
    for (int64_t i = 0; i < segment.rows; ++i) {
      const int64_t token = segment.position + i - segment.first_position;
      to.push_back({open_page(segment, token / kPageTokens), token % kPageTokens});
    }
  const auto sent = [&](const float* values, int64_t count) {
    return device_->table(std::span(values, static_cast<size_t>(values != nullptr ? count : 0)));
  };
  cuda::AppendCall call = {};
  call.qkv = device_rows(input.qkv);
  call.rows = rows;
  call.heads = heads_of(input);
  call.open = open_pages(input.layout);
  call.to = device_->table(std::span<const cuda::AppendedRow>(to));
  call.cos = sent(input.cos, rows * pairs);
  call.sin = sent(input.sin, rows * pairs);
  call.temperature = sent(input.temperature, rows);
  call.norm = input.qk_norm;
  call.norm_eps = input.qk_norm_eps;
  call.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(input.layout.head_dim)));
  device_->run("append", &cuda::DeviceTable::append, call);
}

void CudaBackend::seal(const AttentionInput& input) {
  if (!seals(input)) return;
  std::vector<cuda::SealedPage> pages;
  for (const AttentionSegment& segment : input.segments) {
    const int64_t first = segment.position - segment.first_position;
    for (int64_t page = first / kPageTokens; page < (first + segment.rows) / kPageTokens; ++page)
      pages.push_back({segment.sealed[static_cast<size_t>(page)], open_page(segment, page)});
  }
  if (pages.empty()) return;
  device_->run(
      "seal", &cuda::DeviceTable::seal,
      cuda::SealCall{device_->table(std::span<const cuda::SealedPage>(pages)), std::ssize(pages),
                     heads_of(input), open_pages(input.layout), closed_pages(input)});
}

void CudaBackend::attend(Rows out, const AttentionInput& input) {
  if (out.rows == 0) return;
  std::vector<cuda::AttentionQuery> queries;
  std::vector<const void*> pages;         // of the segments, one after the other
  std::vector<cuda::AttentionTile> runs;  // of all queries in a row that have the same own page
  const int64_t group = input.heads / input.layout.kv_heads;
  PageWindow window(*device_, window_, input.segments, closed_bytes(input));
  const AttentionSegment* segment = nullptr;
  int64_t first_page = 0;
  for (int64_t i = 0; i < out.rows; ++i) {
    const int64_t row = input.queries ? (*input.queries)[static_cast<size_t>(i)] : i;
    if (segment == nullptr || row >= segment->first_row + segment->rows) {
      if (segment == nullptr) segment = input.segments.data();
      while (row >= segment->first_row + segment->rows) ++segment;
      first_page = std::ssize(pages);
    }
    const int64_t token = segment->position + row - segment->first_row - segment->first_position;
    const int64_t own = token / kPageTokens;
    for (int64_t page = std::ssize(pages) - first_page; page < own; ++page) {
      const void* const there = closed_page(input, *segment, page);
      pages.push_back(there != nullptr ? there : window.place(segment->stream, page));
    }
    queries.push_back({row, token % kPageTokens + 1});
    const void* const own_page = open_page(*segment, own);
    if (runs.empty() || runs.back().own != own_page)
      runs.push_back({own_page, first_page, own, i, 0, 0});
    runs.back().pairs += static_cast<int32_t>(group);
  }
  cuda::AttendCall call = {};
  call.out = device_rows(out);
  call.qkv = device_rows(ConstRows(input.qkv));
  call.queries = device_->table(std::span<const cuda::AttentionQuery>(queries));
  call.pages = device_->table(std::span<const void* const>(pages));
  call.heads = heads_of(input);
  call.open = open_pages(input.layout);
  call.closed = closed_pages(input);
  std::vector<cuda::AttentionTile> tiles[std::size(cuda::kMostPairs)];
  divide(runs, call, device_->multiprocessors(), tiles);
  const bool at_once = std::ranges::count_if(tiles, [](auto& of) { return !of.empty(); }) == 1;
  call.rows = at_once && !window.used() ? out.rows : 0;
  // What has to happen to qkv before, if nothing comes between: rows that each have a tile, and so
  // a page, to themselves need no kernel for it. A row's page is seen by those that follow it in
  // its segment, also where they have the next page.
  const cuda::AppendCall* const append = device_->last(&cuda::DeviceTable::append);
  const auto is_alone = [](const AttentionSegment& of) { return of.rows <= 1; };
  if (append != nullptr && std::ssize(runs) == append->rows &&
      std::ssize(tiles[cuda::kAttendPages]) == append->rows &&
      std::ranges::all_of(input.segments, is_alone)) {
    call.append = *append;
    device_->drop_last();
  }
  for (int32_t kind = 0; kind < static_cast<int32_t>(std::size(tiles)); ++kind) {
    call.kind = kind;
    attend_tiles(call, tiles[kind], window);
  }
}

void CudaBackend::attend_tiles(cuda::AttendCall call, std::span<const cuda::AttentionTile> tiles,
                               PageWindow& window) {
  if (tiles.empty()) return;
  for (const cuda::AttentionTile& tile : tiles) {
    call.most_pages = std::max(call.most_pages, tile.before + 1);
    call.most_pairs = std::max<int64_t>(call.most_pairs, tile.pairs);
  }
  // The same for many steps of decoding, whose kernels then repeat.
  if (call.most_pages > cuda::kGroupPages)
    call.most_pages = cuda::groups_of(call.most_pages) * cuda::kGroupPages;
  const int64_t tile_floats = call.heads.key_value * call.most_pairs *
                              cuda::parts_of(call.kind, call.most_pages) *
                              cuda::state_floats(call.heads.dim);
  const int64_t each =
      std::clamp<int64_t>(kStateBytes / (tile_floats * static_cast<int64_t>(sizeof(float))), 1,
                          std::min(std::ssize(tiles), kMostTiles));
  const int64_t counters = call.heads.key_value * (cuda::groups_of(call.most_pages) + 1);
  call.states = states_.reserve<float>(*device_, each * tile_floats);
  call.arrived = arrived_.reserve<int32_t>(*device_, each * counters);
  const cuda::AttentionTile* const table = device_->table(tiles);
  if (each < std::ssize(tiles)) call.rows = 0;
  for (int64_t first = 0; first < std::ssize(tiles); first += each) {
    call.count = std::min(each, std::ssize(tiles) - first);
    call.tiles = table + first;
    try {
      window.each(call.most_pages, [&](int64_t first_page, int64_t count) {
        call.first_page = first_page;
        call.page_count = count;
        call.run_pages = call.kind == cuda::kAttendPages
                             ? run_pages(tiles.subspan(static_cast<size_t>(first),
                                                       static_cast<size_t>(call.count)),
                                         call, device_->multiprocessors())
                             : 1;
        device_->run("attend", &cuda::DeviceTable::attend, call);
      });
    } catch (...) {
      arrived_ = {};  // has counted what came before a page that could not be read
      throw;
    }
  }
}

void CudaBackend::attention(Rows out, const AttentionInput& input) {
  check_attention(out, input);
  for (const AttentionSegment& segment : input.segments)
    if (segment.mode != nullptr)
      fail(ErrorCode::kUnsupported,
           "[attention] the CUDA backend does not leave pages out; leave attention= out, or load "
           "with device='cpu'");
  if (input.qkv.rows == 0) return;
  append(input);
  seal(input);
  attend(out, input);
}

void CudaBackend::vision_attention(Rows out, Rows qkv, int64_t tiles, int64_t tokens, int64_t heads,
                                   const float* cos, const float* sin, DType operands) {
  check_vision_attention(out, qkv, tiles, tokens, heads, cos, sin, operands);
  if (tiles == 0) return;
  const int64_t dim = qkv.cols / (3 * heads);
  const auto angles = static_cast<size_t>(tokens * (dim / 2));
  cuda::VisionAttentionCall call = {};
  call.out = device_rows(out);
  call.qkv = device_rows(qkv);
  call.tiles = tiles;
  call.tokens = tokens;
  call.heads = static_cast<int32_t>(heads);
  call.dim = static_cast<int32_t>(dim);
  call.cos = device_->table(std::span(cos, angles));
  call.sin = device_->table(std::span(sin, angles));
  call.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim)));
  if (operands == DType::kBF16 && dim <= cuda::kMostVisionDim) {
    call.rounded = states_.reserve<uint16_t>(
        *device_, tiles * 3 * heads * tokens * int64_t{cuda::kMostVisionDim});
  } else {
    const int64_t pages = pages_for(tokens);
    call.states =
        states_.reserve<float>(*device_, tiles * tokens * heads * pages * cuda::state_floats(dim));
  }
  device_->run("vision_attention", &cuda::DeviceTable::vision_attention, call);
}

}  // namespace puna
