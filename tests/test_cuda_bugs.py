"""Planted bugs in the CUDA kernels: the tests on the emulator must find every one.

Each bug is a change of one place of a kernel: a missing barrier, a wrong lane, a tail without its
guard; or of the backend where it and the host wait for one another. The file that has it is compiled
with the change and linked in the place of the right one, and the tests named beside it must fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cpp_programs import HAS_EMULATOR, ROOT

FORMATS = '#include "quant/formats.inc"'

pytestmark = pytest.mark.skipif(not HAS_EMULATOR, reason="the emulator's fibres are for x86-64")


@dataclass(frozen=True)
class Place:
    """Where bugs are: a file, the source that is compiled for it, and the tests that watch over it."""

    file: str
    source: str
    program: str
    tests: str
    formats: tuple[str, ...] = ()  # that are compiled, of the quantised ones
    folder: str = "kernels/cuda"

    @property
    def layer(self) -> str | None:
        """Of the host, whose library is one object."""
        name = self.folder.split("/")[0]
        return None if name == "kernels" else name

    def text(self, name: str) -> str:
        """Of a file of the same folder."""
        return (ROOT / "csrc" / self.folder / name).read_text()


@dataclass(frozen=True)
class Bug:
    """`before`, the first of its kind after `behind`, becomes `after`."""

    place: Place
    before: str
    after: str
    behind: str = ""

    @property
    def name(self) -> str:
        """For people."""
        change = f"{self.before} > {self.after}" if self.after else f"no {self.before}"
        return f"{self.place.file}: {' '.join(change.split())}"[:100]


PRODUCT = Place("product.cuh", "bf16_product.cu", "cuda_backend_test", "matmul")
FLOAT_PRODUCT = Place("product.cuh", "product.cu", "cuda_backend_test", "matmul")
EXPERTS = Place("product.cuh", "bf16_product.cu", "cuda_backend_test", "moe")
FEW = Place("few_product.cuh", "bf16_product.cu", "cuda_backend_test", "matmul")
BF16 = Place("bf16_product.cu", "bf16_product.cu", "cuda_backend_test", "matmul")
BF16_WARPGROUPS = Place(
    "bf16_warpgroups.cu", "bf16_warpgroups.cu", "cuda_backend_test", "by_warpgroups"
)
BF16_PAIRS = Place("bf16_weights.cuh", "bf16_warpgroups.cu", "cuda_backend_test", "by_warpgroups")
MADE_ROWS = Place(
    "bf16_warpgroups.cu", "bf16_warpgroups.cu", "cuda_backend_test", "where_they_are_made"
)
MADE_PATCHES = Place(
    "vision_attention.cu", "vision_attention.cu", "cuda_backend_test", "where_they_are_made"
)
MADE_APART = Place("bf16_product.cu", "bf16_product.cu", "cuda_backend_test", "where_they_are_made")
MADE_OPERANDS = Place(
    "products.cpp", "products.cpp", "cuda_backend_test", "where_they_are_made",
    folder="backend/cuda",
)  # fmt: skip
FLOATS = Place("product.cu", "product.cu", "cuda_backend_test", "matmul")
FLOAT8 = Place("product.cu", "product.cu", "cuda_product_test", "float8")
ROWS = Place("rows.cu", "rows.cu", "cuda_backend_test", "moe")
NORMS = Place("rows.cu", "rows.cu", "cuda_backend_test", "norms")
ROW_NORMS = Place("norm.cuh", "rows.cu", "cuda_backend_test", "norms")
ADDED_ROWS = Place("norm.cuh", "rows.cu", "cuda_backend_test", "moe")
ROUTER_NORMS = Place("routing.cu", "routing.cu", "cuda_product_test", "rows_normalised")
ROUTER_ROWS = Place("norm.cuh", "routing.cu", "cuda_product_test", "rows_normalised")
ROUTER_CALLS = Place(
    "products.cpp", "products.cpp", "cuda_product_test", "rows_normalised", folder="backend/cuda"
)
MOVES = Place("rows.cu", "rows.cu", "cuda_backend_test", "moves")
CHOICE = Place("choice.cu", "choice.cu", "cuda_backend_test", "argmax")
CHOSEN_ROWS = Place("reduce.cuh", "choice.cu", "cuda_backend_test", "argmax")
CANDIDATES = Place("choice.cu", "choice.cu", "cuda_backend_test", "candidates")
ROUNDED_ROWS = Place("rows.cu", "rows.cu", "cuda_backend_test", "rounded_by_a_norm")
ROUNDED_SPANS = Place("operand.cuh", "rows.cu", "cuda_backend_test", "matmul")
VISION = Place("rows.cu", "rows.cu", "cuda_backend_test", "vision")
OPERANDS = Place("rows.cu", "rows.cu", "cuda_product_test", "products_of_Int4")
CODES = Place("operand.cuh", "rows.cu", "cuda_product_test", "products_of_Int4")
ODD_CODES = Place("operand.cuh", "rows.cu", "cuda_product_test", "odd")
PASSES = Place("norm.cuh", "rows.cu", "cuda_backend_test", "passes")
ROUTED_PASSES = Place("routing.cu", "routing.cu", "cuda_backend_test", "passes")
SUMS = Place("reduce.cuh", "rows.cu", "cuda_backend_test", "norms")
ROUTING = Place("routing.cu", "routing.cu", "cuda_backend_test", "moe")
TURNS = Place("turn.cuh", "append.cu", "cuda_attention_test", "attention_is_near")
APPENDS = Place("append.cuh", "append.cu", "cuda_attention_test", "attention_is_near")
APPENDED_BATCHES = Place("append.cuh", "append.cu", "cuda_attention_test", "a_batch_gives")
LAYOUT = Place("append.cuh", "append.cu", "cuda_attention_test", "stated_layout")
APPENDED_ROWS = Place("append.cu", "append.cu", "cuda_attention_test", "rows_turned")
APPENDING = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_sealed_attention_test", "rows_appended"
)
TURNING = Place("tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "rows_turned")
APPENDING_CALLS = Place(
    "attention.cpp", "attention.cpp", "cuda_sealed_attention_test", "rows_appended",
    folder="backend/cuda",
)  # fmt: skip
PLAIN = Place("plain_attention.cuh", "attention.cu", "cuda_attention_test", "attention_is_near")
PLAIN_SEALED = Place(
    "plain_attention.cuh", "attention.cu", "cuda_sealed_attention_test", "sealed_attention"
)
PLAIN_PAGES = Place("attention.cu", "attention.cu", "cuda_attention_test", "attention_is_near")
PLAIN_BATCHES = Place("attention.cu", "attention.cu", "cuda_attention_test", "a_batch_gives")
SEALED = Place("attention.cu", "attention.cu", "cuda_sealed_attention_test", "sealed_attention")
PAIRS = Place("attention.cuh", "attention.cu", "cuda_attention_test", "attention_is_near")
TICKETS = Place("reduce.cuh", "attention.cu", "cuda_attention_test", "attention_is_near")
MANY_TICKETS = Place("reduce.cuh", "attention.cu", "cuda_attention_test", "many_leaves")
LONG = Place("attention.cuh", "attention.cu", "cuda_attention_test", "scores_may")
GROUPS = Place("attention.cuh", "attention.cu", "cuda_attention_test", "many_leaves")
TENSOR = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "attention_is_near"
)
TENSOR_CUT = Place("tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "any_cut")
TILE_PRODUCTS = Place(
    "tile_products.cuh", "tensor_attention.cu", "cuda_attention_test", "attention_is_near"
)
SEALED_PRODUCTS = Place(
    "tile_products.cuh", "tensor_attention.cu", "cuda_sealed_attention_test", "sealed_attention"
)
TENSOR_GROUPS = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "groups_of_pages"
)
OPEN_TILES = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_attention_test", "attention_is_near"
)
OPEN_NAN_TILES = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_attention_test", "groups_of_pages"
)
PARTS = Place(
    "page_parts.cuh", "tensor_attention.cu", "cuda_sealed_attention_test", "runs_of_pages"
)
RUNS = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_sealed_attention_test", "runs_of_pages"
)
RUN_STATES = Place(
    "attention.cuh", "tensor_attention.cu", "cuda_sealed_attention_test", "runs_of_pages"
)
UNSEALING = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_sealed_attention_test", "sealed_attention"
)
SEALED_TILES = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_sealed_attention_test", "runs_of_pages"
)
VISION_ROUNDINGS = Place(
    "vision_attention.cu", "vision_attention.cu", "cuda_attention_test", "roundings"
)
TILES = Place(
    "vision_attention.cu", "vision_attention.cu", "cuda_attention_test", "vision_attention"
)
SILU = Place("rows.cu", "rows.cu", "cuda_host_experts_test", "same_bits")
HOST_EXPERTS = Place(
    "host_experts.cpp", "host_experts.cpp", "cuda_host_experts_test", "same_bits",
    folder="backend/cuda",
)  # fmt: skip
EXPERT_WINDOW = Place(
    "expert_window.cpp", "expert_window.cpp", "cuda_expert_window_test", "the_window",
    folder="backend/cuda",
)  # fmt: skip
SENT_PLACES = Place(
    "sent_places.h", "expert_window.cpp", "cuda_expert_window_test", "the_window",
    folder="backend/cuda",
)  # fmt: skip
SENT_EXPERTS = Place(
    "products.cpp", "products.cpp", "cuda_host_experts_test", "", folder="backend/cuda"
)
SHARED = Place("device.cpp", "device.cpp", "cuda_interop_test", "shared", folder="backend/cuda")
SHARING = Place(
    "cuda_backend.cpp", "cuda_backend.cpp", "cuda_interop_test", "shared", folder="backend/cuda"
)
STREAMS = Place("device.cpp", "device.cpp", "cuda_interop_test", "stream", folder="backend/cuda")
WINDOW = Place(
    "page_window.cpp", "page_window.cpp", "cuda_kv_test", "pages_beyond", folder="backend/cuda"
)
WINDOW_TILES = Place("tensor_attention.cu", "tensor_attention.cu", "cuda_kv_test", "pages_beyond")
WINDOW_PAGES = Place("attention.cu", "attention.cu", "cuda_kv_test", "pages_beyond")
EXERCISES = Place("exercise.cu", "exercise.cu", "cuda_backend_test", "exercises_run")
SEALING = Place("seal.cu", "seal.cu", "cuda_sealed_attention_test", "sealed")


def quantized(
    *formats: str, file: str = "quantized_product.cu", source: str = "quantized_product.cu"
) -> Place:
    """Products with weights of these formats."""
    tests = f"products_of_{formats[0]}_"
    return Place(file, source, "cuda_product_test", tests, formats)


def tiled(file: str, *formats: str) -> Place:
    """The same where a place has more rows, as it is in the tiles of 32."""
    return quantized(*formats, file=file, source="quantized_small_tiles.cu")


def staged(*formats: str) -> Place:
    """Where weights come to a warp's stages."""
    return quantized(*formats, file="quantized_weights.cuh")


def one_row(*formats: str) -> Place:
    """The same for one row."""
    return quantized(*formats, file="quantized_one_row.cu", source="quantized_one_row.cu")


ONE_ROW_EXPERTS = Place(
    "quantized_one_row.cu",
    "quantized_one_row.cu",
    "cuda_product_test",
    "experts_of_one_row",
    ("Int8G32",),
)
LARGE = quantized("Int4G64", file="tiled_product.cuh", source="quantized_large_tiles.cu")
WARPGROUPS = quantized("Int4G64", file="quantized_warpgroups.cu", source="quantized_warpgroups.cu")
WARPGROUP_RING = quantized(
    "Int4G64", file="warpgroup_product.cuh", source="quantized_warpgroups.cu"
)
# Rows of thousands of columns: warps take several spans each.
LONG_PRODUCT = quantized("Int4G128", file="few_product.cuh")
BARRIER = "  __syncthreads();\n"

# The ones that every run of the slower checks plants; they are of all kinds.
SAMPLE = [
    Bug(FEW, "  " + BARRIER, "", behind="commit_copies();\n      stage"),
    Bug(LONG_PRODUCT, "wait_for_copies<kStages - 1>();", "wait_for_copies<kStages>();"),
    Bug(LARGE, "  " + BARRIER, "", behind="wait_for_copies<kStages - 2>();"),
    Bug(tiled("quantized_weights.cuh", "Int4G32"), "{first[0], first[1], last[0], last[1]}", "{first[0], last[0], first[1], last[1]}"),
    Bug(WARPGROUPS, "wait_for_products<1>(dots[0]);", "wait_for_products<2>(dots[0]);"),
    Bug(ROW_NORMS, "  __syncthreads();  // what was read of an earlier sum\n", ""),
    Bug(ROUTING, BARRIER, "", behind="places.chosen + r * call.top_k);"),
    Bug(PLAIN, BARRIER, "", behind="scores[t] = sums;"),
    Bug(TILE_PRODUCTS, "    __syncthreads();  // the tile is there, and the one before is not needed any more\n", ""),
]  # fmt: skip
OTHERS = [
    Bug(FEW, "part[j][2 * row + column]", "part[j][2 * column + row]"),
    Bug(SEALING, "(bits & 0xffffu) != 0 ? 1 : 0", "0", behind="bf16_above"),
    # --- product.cuh: shares of blocks, and what becomes of a sum
    Bug(PRODUCT, "if (call.bias != nullptr) sum += bias;", ""),
    Bug(PRODUCT, "accumulate ? before + sum : sum", "sum"),
    Bug(FLOAT_PRODUCT, "0.70710678118654752f", "0.7071f"),
    Bug(PRODUCT, "(rows + kTokens - 1) / kTokens", "rows / kTokens + (rows < kTokens)"),
    Bug(PRODUCT, "static_cast<int64_t>(tile) * kTokens", "static_cast<int64_t>(tile) * 8"),
    Bug(PRODUCT, "if (row < count)", "if (row + 1 < count)"),
    Bug(PRODUCT, "from += int64_t{kTurn} * row_bytes;", ""),
    Bug(PRODUCT, "const int chunk = 4 * pair + threadIdx.x % kWarp / 8;", "const int chunk = threadIdx.x % kWarp / 8;"),
    Bug(EXPERTS, "end - share->first < kTokens ? end - share->first : kTokens", "kTokens"),
    Bug(EXPERTS, "begin = call.experts.offsets[expert];", "begin = call.experts.offsets[expert + 1] - 1;"),
    Bug(EXPERTS, "if (expert < 0) return false;", "if (expert <= 0) return false;"),
    Bug(EXPERTS, "call.experts.occupied[slot]", "slot"),
    Bug(EXPERTS, "matrix = call.experts.matrices[expert];", "matrix = call.experts.matrices[0];"),
    Bug(EXPERTS, "      tile -= tiles;\n", ""),
    Bug(EXPERTS, "(call.count - slots) / kTokens + slots", "slots"),
    Bug(EXPERTS, "if (!shared) tile -= shared_tiles;", ""),
    Bug(EXPERTS, "shared ? call.shared.x : call.x", "call.x"),
    Bug(EXPERTS, "shared ? call.shared.out : call.out", "call.out"),
    Bug(EXPERTS, "shared ? call.shared.accumulate : call.accumulate", "call.accumulate"),
    # --- choice.cu
    Bug(CHOICE, "if (x != x) return place;", ""),
    Bug(CHOICE, "x + 0.0f", "x"),
    Bug(CHOICE, "static_cast<uint32_t>(~column)", "static_cast<uint32_t>(column)"),
    Bug(CHOICE, "end < cols ? end : cols", "end"),
    Bug(CHOSEN_ROWS, BARRIER, "", behind="scratch[threadIdx.x / kWarp] = value;"),
    Bug(CHOSEN_ROWS, "i < gridDim.x; i += kThreads", "i < 1; i += kThreads"),
    Bug(CANDIDATES, "__syncthreads();", "", behind="counts[threadIdx.x] = 0;"),
    Bug(CANDIDATES, "__syncthreads();", "", behind="until += counts[threadIdx.x - step];"),
    Bug(CANDIDATES, "exchange_shared(all_counts + threadIdx.x, 0)", "all_counts[threadIdx.x]"),
    Bug(CANDIDATES, "if (until > kMostCandidates) call.bins[r] = 0;", ""),
    Bug(CANDIDATES, "counts[threadIdx.x + 1] > kMostCandidates", "counts[threadIdx.x] > kMostCandidates"),
    Bug(CANDIDATES, "bin_of(x, largest) >= bins", "bin_of(x, largest) > bins"),
    Bug(CANDIDATES, "call.out[r].count = 0;", ""),
    # --- few_product.cuh
    Bug(FEW, "row + row_of(i) < call.rows", "true"),
    Bug(FEW, "call.bias[row + row_of(i)]", "call.bias[row_of(i)]"),
    Bug(FEW, "(call.rows + Weights::kRows - 1) / Weights::kRows", "call.rows / Weights::kRows + (call.rows < Weights::kRows)"),
    Bug(FEW, "(call.cols + kSpan - 1) / kSpan", "call.cols / kSpan"),
    Bug(FEW, "4 * g + 2 * j + row", "4 * t + 2 * j + row"),
    Bug(LONG_PRODUCT, "__syncwarp();  // the stage has been read", ""),
    Bug(LONG_PRODUCT, "const int next = span + kStages * kWarps;", "const int next = span + kWarps;"),
    Bug(LONG_PRODUCT, "stage == ring + (kStages - 1) * stage_bytes ?", "stage == ring ?"),
    Bug(LONG_PRODUCT, "if (end < spans) __syncthreads();", ""),
    Bug(LONG_PRODUCT, "begin += chunk) {", "begin += chunk + kWarps) {"),
    # --- tiled_product.cuh
    Bug(LARGE, "wait_for_copies<kStages - 2>();", "wait_for_copies<kStages - 1>();"),
    Bug(LARGE, "step % kStages * Tile::kStageBytes", "step % (kStages - 1) * Tile::kStageBytes"),
    Bug(LARGE, "row >= call.rows", "row > call.rows"),
    Bug(LARGE, "if (at >= share.count) continue;", ""),
    Bug(LARGE, "(half + h) * kHalf + 4 * g + i", "half * kHalf + 4 * g + i"),
    Bug(LARGE, "i % 2 * 2 + column", "column * 2 + i % 2"),
    Bug(LARGE, "warp / Shape::kRowWarps * Shape::kTokenTiles", "warp / Shape::kRowWarps"),
    # --- warpgroup_product.cuh, quantized_warpgroups.cu
    Bug(WARPGROUP_RING, "fence_shared_operands();", ""),
    Bug(WARPGROUP_RING, "step % kStages * Tile::kStageBytes", "step % (kStages - 1) * Tile::kStageBytes"),
    Bug(WARPGROUP_RING, "kAlignment = kSharedAlignment", "kAlignment = 16"),
    Bug(WARPGROUP_RING, "at >= share.count || row >= call.rows", "at >= share.count"),
    Bug(WARPGROUP_RING, "row + i % 4 / 2", "row + i % 2"),
    Bug(WARPGROUPS, "fence_products();", ";"),
    Bug(WARPGROUPS, "commit_products();", ";"),
    Bug(WARPGROUPS, "wait_for_products<0>(dots[1]);\n    fold_part(1);", "fold_part(1);\n    wait_for_products<0>(dots[1]);"),
    Bug(WARPGROUPS, "first / Of::kColumns + step);", "step);"),
    Bug(WARPGROUPS, "part * kWarpgroupColumns * kRowBytes", "0"),
    Bug(WARPGROUPS, "scales[i / 2]", "scales[i % 2]"),
    Bug(WARPGROUPS, "place.row % 4 * 4", "0"),
    Bug(WARPGROUPS, "i % 2 == 0 ? scale.x : scale.y", "scale.x"),
    # --- bf16_product.cu
    Bug(BF16, "{words[0].x, words[0].y, words[1].x, words[1].y}", "{words[0].x, words[1].x, words[0].y, words[1].y}"),
    Bug(BF16, "(call.cols + 1) / 2 * 2", "call.cols / 2 * 2"),
    Bug(BF16, "t + 4 * i) * kHalfBytes", "t) * kHalfBytes"),
    Bug(BF16, "part * rows_bytes", "0"),
    Bug(BF16, "pair / 2 * rows_bytes", "0"),
    Bug(BF16, "t + 4 * i) * kPairBytes", "t) * kPairBytes"),
    Bug(BF16, "(half + h) % 2 * (kHalf / 4) + g", "g"),
    Bug(BF16, "part[h][j][n][i] = 0;", ""),
    # --- bf16_warpgroups.cu, bf16_weights.cuh
    Bug(BF16_WARPGROUPS, "static constexpr int kAhead = kPieces - 2;", "static constexpr int kAhead = kPieces - 1;"),
    Bug(BF16_WARPGROUPS, "wait_for_copies<kAhead - 1>();", "wait_for_copies<kAhead>();"),
    Bug(BF16_WARPGROUPS, "      fence_shared_operands();\n", ""),
    Bug(BF16_WARPGROUPS, "      __syncthreads();  // the piece is there", "      // the piece is there"),
    Bug(BF16_WARPGROUPS, "          wait_for_products<0>(dots[1]);\n          add(kParts - 1);\n", "          add(kParts - 1);\n          wait_for_products<0>(dots[1]);\n"),
    Bug(BF16_WARPGROUPS, "if (span > 0) {", "if (span > 1) {"),
    Bug(BF16_WARPGROUPS, "fence_products();", ";"),
    Bug(BF16_WARPGROUPS, "commit_products();", ";"),
    Bug(BF16_WARPGROUPS, "wait_for_products<1>(dots[(part - 1) % 2]);", "wait_for_products<2>(dots[(part - 1) % 2]);"),
    Bug(BF16_WARPGROUPS, "if (step == 0)", "if (step < 0)"),
    Bug(BF16_WARPGROUPS, ".after(step % kEach)", ".after(0)"),
    Bug(BF16_WARPGROUPS, "step / kEach * kHalfBytes", "0"),
    Bug(BF16_WARPGROUPS, "span + (part + kAhead) / kParts", "span + kAhead / kParts"),
    Bug(BF16_WARPGROUPS, "row / 4 ^ 2 * t", "row / 4"),
    Bug(BF16_WARPGROUPS, "row % 4 * 4;", "0;"),
    Bug(BF16_WARPGROUPS, "to[step][2 * i + 1] = two.y;", "to[step][2 * i + 1] = two.x;"),
    Bug(BF16_WARPGROUPS, "(span, part) + half * kHalfBytes", "(span, part)"),
    Bug(BF16_WARPGROUPS, "+ half * kRowBytes);", ");"),
    Bug(BF16_WARPGROUPS, "rows + int64_t{first} * row_bytes", "rows"),
    Bug(BF16_WARPGROUPS, "sums[4 * n + 2 + column]", "sums[4 * n + 1 + column]"),
    Bug(BF16_WARPGROUPS, "  __syncwarp();\n", "", behind="sums[4 * n + 2 + column]"),
    Bug(BF16_WARPGROUPS, "  __syncwarp();\n}", "}", behind="to[i] = result[i];"),
    Bug(BF16_WARPGROUPS, "if (token >= count) break;", ""),
    Bug(BF16_WARPGROUPS, "row + 4 <= call.rows && ", ""),
    Bug(BF16_WARPGROUPS, "if (row + i < call.rows) to[i]", "to[i]"),
    Bug(BF16_WARPGROUPS, "if (call.accumulate && whole) before =", "if (false) before ="),
    Bug(BF16_WARPGROUPS, "apart ? to[i] : was[i]", "was[i]"),
    Bug(MADE_ROWS, "bf16_pair(result[0], result[1])", "bf16_pair(result[1], result[0])"),
    Bug(MADE_ROWS, "(first_token + token) * call.operand.stride", "token * call.operand.stride"),
    Bug(MADE_PATCHES, "operand + 8 * n) =", "operand) ="),
    Bug(MADE_APART, "if (error != 0 || call.operand.data == nullptr) return error;", "return error;"),
    Bug(MADE_OPERANDS, "if (product->x.data == operand.data)", "if (false)"),
    Bug(MADE_OPERANDS, "product->operand = operand;", ""),
    Bug(MADE_OPERANDS, "passing_ == product->out.data", "true"),
    Bug(BF16_WARPGROUPS, "(call.cols + 1) / 2 * 2", "call.cols / 2 * 2"),
    Bug(BF16_PAIRS, "2 * first < left", "true"),
    Bug(BF16_PAIRS, "if (panel < there)", "if (panel < 1)"),
    Bug(BF16_PAIRS, "chunk ^ 2 * (pair % 4)", "chunk"),
    # --- product.cu: weights that are floats, without the tensor cores
    Bug(FLOATS, "i * (kWarp / kLanes) + lane / kLanes", "i * (kWarp / kLanes)"),
    Bug(FLOATS, "if (span * kSpan + own >= cols) break;", ""),
    Bug(FLOATS, "mask = kLanes; mask < kWarp", "mask = kLanes; mask < kWarp / 2"),
    Bug(FLOATS, "kPanel + first_row) *", "kPanel) *"),
    Bug(FLOATS, "x + token * stride + column", "x + column"),
    Bug(FLOAT8, "(exponent + 120) << 23", "(exponent + 119) << 23"),
    Bug(FLOAT8, "if (exponent != 0)", "if (true)"),
    Bug(FLOAT8, "panel + Column::kHeader +", "panel +"),
    Bug(FLOAT8, "Column::factor(panel, first_row + at)", "Column::factor(panel, first_row)"),
    # --- quantized_weights.cuh: codes, scales and offsets
    Bug(tiled("quantized_weights.cuh", "Int8G32"), "step = kBits == 8 ? 4 : 1", "step = 1"),
    Bug(tiled("quantized_weights.cuh", "Int2K"), "bits_at<3>(last, 2 * t)", "bits_at<3>(first, 2 * t)"),
    Bug(tiled("quantized_weights.cuh", "Int5G32"), "bits_at<1>(first, t + 4)", "bits_at<1>(first, t)"),
    Bug(tiled("quantized_weights.cuh", "Int6K"), "codes.high[row] |= upper.high[row] << kLow;", ""),
    Bug(tiled("quantized_weights.cuh", "Int3K"), "kLow = kLowBits<kBits>", "kLow = kBits == 3 ? 1 : 4"),
    Bug(tiled("quantized_weights.cuh", "Int5K"), "read(kLow + plane)", "read(plane)"),
    Bug(tiled("quantized_weights.cuh", "Table4G32"), "(codes >> 1 & 0x44444444u) | ", ""),
    Bug(tiled("quantized_weights.cuh", "Table4K"), "0x7531", "0x6420"),
    Bug(tiled("quantized_weights.cuh", "Int6K"), "last[0], last[1], high, c", "last[0], last[1], low, c"),
    Bug(tiled("quantized_weights.cuh", "Int4G32"), "codes.high + 2 * j", "codes.high"),
    Bug(tiled("quantized_weights.cuh", "Int4G32"), "static_cast<uint32_t>(Format::kZero) *", "0u *"),
    Bug(tiled("quantized_weights.cuh", "Int4G32"), "16 * (row % 2)", "16 * (row / 2)"),
    Bug(tiled("quantized_weights.cuh", "Int4K"), "static_cast<Number>(numbers >> 8 * row)", "static_cast<Number>(numbers)"),
    Bug(tiled("quantized_weights.cuh", "Int4MinG32"), "if constexpr (Format::kOffset) part = fmaf", "if constexpr (false) part = fmaf"),
    # --- quantized_weights.cuh: stages of a warp
    Bug(staged("Int4G64"), "step / kBlockSteps * static_cast<unsigned>(Layout::kBytes)", "0u"),
    Bug(staged("Int4G128"), "Of::kStepBytes + half * kStepBytes;", "Of::kStepBytes;"),
    Bug(staged("Int4G128"), "block + Layout::kScale + half * kFactorBytes", "block + Layout::kScale"),
    Bug(staged("Int4MinG64"), "block + Layout::kOffsets + half", "block + Layout::kScale + half"),
    Bug(staged("Int4K"), "Layout::kSub + half * kNumberBytes", "Layout::kSub"),
    Bug(staged("Int4K"), "block + Layout::kCodes + within / Of::kColumns * Of::kStepBytes", "block + Layout::kCodes"),
    Bug(staged("Int4G32"), "stage + step * kStepBytes + g / 4", "stage + g / 4"),
    # --- quantized_product.cu
    Bug(quantized("Int4G32"), "token < tokens && group < groups", "token + 1 < tokens && group < groups"),
    Bug(quantized("Int4G32"), "if (span * kSpan + first >= limit) break;", ""),
    Bug(quantized("Int4G32"), "first / Of::kGroup + each]", "each]"),
    # --- quantized_one_row.cu
    Bug(one_row("Int4G32"), "4 * span + group / kOwn * 2", "4 * span"),
    Bug(one_row("Int4G64"), "column / 4 * kSpanSteps + group", "group"),
    Bug(one_row("Int6K"), "lane * kOwn : column % 4", "0 : column % 4"),
    Bug(one_row("Int6K"), "/ Of::kGroup % kOwn / 2;", "/ Of::kGroup / 4;"),
    Bug(one_row("Int4G32"), "Column::kLanes > 1 ? t % 2 * kOwn : 0", "0"),
    Bug(one_row("Int4G64"), "sums[(2 * set + i % 2) % kOwn]", "sums[0]"),
    Bug(one_row("Int4G32"), "if (i < groups)", "if (true)"),
    Bug(one_row("Int4G32"), "sum = __shfl_xor_sync(kAllLanes, sum, 1);", "sum = 0;"),
    Bug(one_row("Int4G128"), "t % 2 == Column::kLanes - 1", "t % 2 == 1"),
    Bug(one_row("Int4G32"), "(unit * kUnitSpans + span) * kHalf + 4 * g", "(unit * kUnitSpans + span) * kHalf + 4 * t"),
    Bug(one_row("Int4G32"), "wait_for_copies<kStages - 1>();", "wait_for_copies<kStages>();"),
    Bug(one_row("Int4G32"), "    wait_for_copies<0>();\n  else", "    wait_for_copies<1>();\n  else"),
    Bug(one_row("Int4G128"), "__syncwarp();  // the stage has been read", ""),
    Bug(one_row("Int4G128"), "    after_earlier_kernels();\n    request_row();", "    request_row();\n    after_earlier_kernels();"),
    Bug(one_row("Int4G128"), "(kHalf + 1 + kGroups) * 4", "(kHalf + kGroups) * 4"),
    Bug(one_row("Int4G32"), BARRIER, "", behind="wait_for_copies<kStages>();"),
    Bug(one_row("Int4G32"), BARRIER, "", behind="commit_copies();\n    stage ="),
    Bug(one_row("Int4G32"), "row + lane < call.rows", "true"),
    Bug(one_row("Int4G32"), "call.bias[row + lane]", "call.bias[lane]"),
    Bug(ONE_ROW_EXPERTS, "    wait_for_copies<kStages>();", "    wait_for_copies<kStages + 1>();"),
    Bug(ONE_ROW_EXPERTS, "share.accumulate ? *out : 0.0f", "0.0f"),
    Bug(ONE_ROW_EXPERTS, "if (!known) after_earlier_kernels();", ""),
    # --- quantized_tiles.cuh: stages of a block
    Bug(tiled("quantized_tiles.cuh", "Int4G64"), "panel * panel_bytes + block * Layout::kBytes", "panel * panel_bytes"),
    Bug(tiled("quantized_tiles.cuh", "Int4K"), "chunk.is_code ? codes : 0", "0"),
    Bug(tiled("quantized_tiles.cuh", "Int4G32"), "int64_t{thread} * spans + column / kSpan", "int64_t{thread} * spans"),
    Bug(tiled("quantized_tiles.cuh", "Int4G32"), "row_sums + int64_t{at} * groups + group", "row_sums + int64_t{at} * groups"),
    Bug(tiled("quantized_tiles.cuh", "Int4G32"), "i % 2 == 0 ? scale.x : scale.y", "scale.x"),
    Bug(tiled("quantized_tiles.cuh", "Int4K"), "(column % Of::kBlock + first % Of::kBlock) / Of::kGroup + each", "first % Of::kBlock / Of::kGroup + each"),
    Bug(tiled("quantized_tiles.cuh", "Int4G64"), "first % Of::kBlock / Of::kColumns + step", "first % Of::kBlock / Of::kColumns"),
    Bug(tiled("quantized_tiles.cuh", "Int4G32"), "group * kTokens + token", "token"),
    Bug(tiled("quantized_tiles.cuh", "Int4G32"), "at % 2 * kHalf + 4 * g", "4 * g"),
    # --- rows.cu
    Bug(CODES, "fmaxf(most, fabsf(value))", "fmaxf(most, value)"),
    Bug(CODES, "rintf(x * inverse)", "truncf(x * inverse)"),
    Bug(CODES, "if (to.group > 32) sums", "if (to.group > 64) sums"),
    Bug(CODES, "(column & (to.group - 1)) == 0", "lane == 0"),
    Bug(OPERANDS, "first + i < call.cols ?", "true ?"),
    Bug(CODES, "static_cast<uint8_t>(code)) << 8 * i", "static_cast<uint8_t>(code)) << 8 * (3 - i)"),
    Bug(OPERANDS, "if (span * kOperandSpan >= to.stride) return;",
        "if (span * kOperandSpan + kOperandSpan >= to.stride && span) return;"),
    Bug(ODD_CODES, "most < 0x1p-100f", "most < 0x1p-120f"),
    Bug(ODD_CODES, "(zeros ? 0.0f : most / 127.0f) + poison", "zeros ? 0.0f : most / 127.0f"),
    Bug(ROWS, "call.score[r] * x[c]", "x[c]"),
    Bug(ROWS, "silu(x[c]) * x[call.cols + c]", "x[c] * silu(x[call.cols + c])"),
    Bug(ROWS, "call.index != nullptr ? call.index[r] : r", "r"),
    Bug(ROWS, "for (int i = 0; i < call.top_k; ++i)", "for (int i = 0; i < 1; ++i)"),
    Bug(ROWS, "float sum = *residual;", "float sum = 0;"),
    Bug(ADDED_ROWS, "call.slot[r * call.top_k + i]", "call.slot[r + i]"),
    Bug(ROW_NORMS, "/ count + call.eps", "/ count"),
    Bug(ROW_NORMS, "fmaf(at - mean, at - mean, sum)", "fmaf(at, at, sum)"),
    Bug(ROW_NORMS, "four.at[i] += call.bias[first + i];", ";"),
    Bug(NORMS, "fmaf(at - mean, at - mean, sum)", "fmaf(at, at, sum)"),
    Bug(NORMS, "static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp", "blockIdx.x", behind="layer_norm_kernel"),
    Bug(NORMS, "if (first + i < cols) sum = term(sum, values[span].at[i]);", "sum = term(sum, values[span].at[i]);"),
    Bug(NORMS, "squares + call.eps", "squares", behind="layer_norm_kernel"),
    Bug(NORMS, "* weight.at[i] + bias.at[i];", "* weight.at[i];"),
    Bug(NORMS, "(call.rows + kWarps - 1) / kWarps", "call.rows / kWarps"),
    Bug(ROUNDED_ROWS, "if (span * kOperandSpan >= end) return;", ";", behind="layer_norm_kernel"),
    Bug(ROUNDED_SPANS, "bf16_pair(x[2], x[3])", "bf16_pair(x[3], x[2])"),
    Bug(PASSES, "store_four(residual, first, cols, values[k]);", ""),
    Bug(PASSES, "i < call.added.top_k", "i < 1"),
    Bug(MOVES, "if (c < call.cols) out[c]", "if (c <= call.cols) out[c]"),
    Bug(MOVES, "call.to != nullptr ? call.to[r] : r", "r"),
    Bug(VISION, "tile * 3 + channel", "tile + channel"),
    Bug(VISION, "c / call.patch % call.patch;", "c % call.patch;"),
    Bug(VISION, "neighbour / call.factor;", "neighbour % call.factor;"),
    # --- pages that come through a window
    Bug(WINDOW, "device_.await(memory_.come[half]);", ";"),
    Bug(WINDOW, "device_.record(memory_.come[half], cuda::kMainQueue);", ";"),
    Bug(WINDOW, "index % KvStream::kHeld", "index % (KvStream::kHeld / 2)"),
    Bug(WINDOW, "static_cast<int64_t>(stream) * KvStream::kHeld +", ""),
    Bug(WINDOW, "of.stream->restart(of.wanted);", ";"),
    Bug(WINDOW, "if (used()) pass(last_);", ""),
    Bug(WINDOW_TILES, "call.first_page + static_cast<int64_t>(blockIdx.x)", "static_cast<int64_t>(blockIdx.x)"),
    Bug(WINDOW_TILES, "call.first_page / kGroupPages + blockIdx.z", "blockIdx.z"),
    Bug(WINDOW_PAGES, "call.first_page + blockIdx.x", "blockIdx.x"),
    # --- experts in the host's memory
    Bug(SILU, "x / (1.0f + exp_like_cpu(-x))", "x * (1.0f / (1.0f + exp_like_cpu(-x)))"),
    Bug(HOST_EXPERTS, "  device_->await_fetched();\n", ""),
    Bug(HOST_EXPERTS, "routing.offsets + routing.experts + 1", "routing.offsets + routing.experts"),
    Bug(HOST_EXPERTS, "feed_forward(residual, operand, weights.shared_gate_up, weights.shared_down);", ""),
    Bug(HOST_EXPERTS, "static_cast<size_t>(x.stride) * sizeof(float)", "static_cast<size_t>(x.cols) * sizeof(float)"),
    Bug(HOST_EXPERTS, "  device_->upload(sent, made.data, slots * static_cast<size_t>(x.cols) * sizeof(float));\n", ""),
    # --- and sent to the device
    Bug(EXPERT_WINDOW, "    device.await(left_[piece_]);\n", ""),
    Bug(SENT_PLACES, "    device.wait_for(sent, cuda::kMainQueue);\n", ""),
    Bug(SENT_PLACES, "    device.wait_for(read, cuda::kSendQueue);\n", ""),
    Bug(SENT_PLACES, "device.record(place.read, cuda::kMainQueue);", ";"),
    Bug(SENT_PLACES, "device.record(read, cuda::kMainQueue);  // starts", "; // starts"),
    Bug(EXPERT_WINDOW, "begin_ + place_ * place_bytes_", "begin_"),
    Bug(EXPERT_WINDOW, "device.send(to + at,", "device.send(to,"),
    Bug(SENT_EXPERTS, "number + e", "number"),
    Bug(SENT_EXPERTS, " || !host_->has_bits_of_devices()", ""),
    # --- reduce.cuh
    Bug(SUMS, "mask < kLanes; mask *= 2)", "mask < kLanes / 2; mask *= 2)"),
    Bug(SUMS, BARRIER, "", behind="scratch[threadIdx.x / kWarp] = value;"),
    Bug(SUMS, "scratch[threadIdx.x % kWarps]", "scratch[threadIdx.x % (kWarps / 2)]"),
    # --- routing.cu
    Bug(ROUTING, "a > b || (b != b && a == a)", "a >= b"),
    Bug(ROUTING, "a > b || (b != b && a == a)", "a > b"),
    Bug(ROUTING, "return i < j && (a == b", "return i > j && (a == b"),
    Bug(ROUTING, "(k == 0 || before(last_logit, last, logits[e], e)) &&", ""),
    Bug(ROUTING, "mask < kWarp; mask *= 2", "mask < 4; mask *= 2"),
    Bug(ROUTING, "first[e + 1] += first[e];", ""),
    Bug(ROUTING, BARRIER, "", behind="first[e + 1] = count;"),
    Bug(ROUTING, BARRIER, "", behind="call.occupied[occupied++] = -1;"),
    Bug(ROUTING, "if (first[e + 1] > 0)", "if (first[e + 1] > 1)"),
    Bug(ROUTED_PASSES, "places.score[slot] * load_number", "load_number"),
    Bug(ROUTED_PASSES, "places.row[slot] * call.x.stride", "slot * call.x.stride"),
    Bug(ROUTING, "unit / groups % spans", "unit % spans"),
    Bug(ROUTING, "begin + i * kColumnsApart", "begin + i * kColumnsApart / 2"),
    Bug(ROUTING, "if (column >= cols) break;", ""),
    Bug(ROUTING, "mask = 4; mask < kWarp", "mask = 8; mask < kWarp"),
    Bug(ROUTING, "if (!is_last(router.arrived, gridDim.x, first)) return;", "if (blockIdx.x > 0) return;"),
    Bug(ROUTING, BARRIER, "", behind="load_number_shared_by_blocks(router.parts + i)"),
    Bug(ROUTING, BARRIER, "", behind="logit[i] = sum;"),
    # --- and its norm
    Bug(ROUTER_NORMS, BARRIER, "", behind="store_four(row, first, cols, four); });"),
    Bug(ROUTER_NORMS, "of * spans * groups < begin_unit + kWarps", "of == begin_unit / (spans * groups)"),
    Bug(ROUTER_NORMS, "if (of != r) continue;", ""),
    Bug(ROUTER_NORMS, "if (unit % groups == 0) store_span", "if (unit == 0) store_span"),
    Bug(ROUTER_NORMS, "store_four(call.out.data + r * call.out.stride, first, cols, four);", ""),
    Bug(ROUTER_NORMS, "routing > norm ? routing : norm", "routing"),
    Bug(ROUTER_NORMS, "scratch + kNormWarps", "scratch"),
    Bug(ROUTER_ROWS, "first_of_norm() + kKept * kNormStep", "first_of_norm() + (kKept + 1) * kNormStep"),
    Bug(ROUTER_CALLS, "norm->x.data != norm->out.data", "true"),
    Bug(ROUTER_CALLS, "norm->added.rows == 0", "true"),
    Bug(ROUTING, "places.row[middle] <= r", "places.row[middle] < r"),
    Bug(ROUTING, "1.0 + exp(-logit)", "1.0 + exp(logit)"),
    # --- append.cu, append.cuh, turn.cuh
    Bug(TURNS, "angle[i].x, -(x[i].y * angle[i].y))", "angle[i].x, x[i].y * angle[i].y)"),
    Bug(TURNS, "int pair = lane; 2 * pair < dim;", "int pair = lane; pair < dim;"),
    Bug(TURNS, "sum_lanes(squares) / static_cast<float>(dim)", "sum_lanes(squares)"),
    Bug(TURNS, "mean = sum_lanes(squares)", "mean = squares"),
    Bug(APPENDS, "call.temperature[r] * call.scale", "call.scale"),
    Bug(APPENDED_BATCHES, "call.cos + r * (dim / 2)", "call.cos"),
    Bug(LAYOUT, "(to.token / kKeyBlock * dim + c) * kKeyBlock", "(to.token / kKeyBlock + c) * kKeyBlock"),
    Bug(LAYOUT, "kv_head * call.open.head_bytes", "0", behind="append_key"),
    Bug(LAYOUT, "kv_head * call.open.head_bytes", "0", behind="append_value"),
    Bug(APPENDED_ROWS, "  __syncwarp();\n", ""),
    # --- and by attention
    Bug(APPENDING, BARRIER, "", behind="key + call.heads.key_value, kDim));"),
    Bug(APPENDING, "      __syncwarp();\n", "", behind="turn_head(append, row, key,"),
    Bug(APPENDING, "if (appends) __syncthreads();", ""),
    Bug(APPENDING, "append.to[row]", "append.to[0]", behind="append_key"),
    Bug(APPENDING, "append.to[row]", "append.to[0]", behind="append_value"),
    Bug(APPENDING, "key + call.heads.key_value", "key + 1"),
    Bug(APPENDING, "row = call.queries[tile.query].row", "row = 0"),
    Bug(APPENDING, "kv_head * group + pair, kDim", "pair, kDim"),
    Bug(APPENDING, "appends && pair < tile.pairs;", "appends && pair < tile.pairs && pair < kTileWarps;"),
    Bug(APPENDING, "if (appends && has_own)", "if (appends && count == 1)"),
    Bug(TURNING, "const int key = call.heads.query + kv_head;", "const int key = kv_head;"),
    Bug(APPENDING_CALLS, "std::ssize(runs) == append->rows", "true"),
    Bug(APPENDING_CALLS, "std::ssize(tiles[cuda::kAttendPages]) == append->rows", "true"),
    Bug(APPENDING_CALLS, "std::ranges::all_of(input.segments, is_alone)", "true"),
    # --- attention.cu, plain_attention.cuh
    Bug(PLAIN_PAGES, "page > tile.before", "page >= tile.before"),
    Bug(PLAIN_PAGES, "pair_of(call, tile, kv_head, 0).seen : kPageTokens", "kPageTokens : kPageTokens"),
    Bug(PLAIN_BATCHES, "call.pages[tile.first_page + page]", "call.pages[page]"),
    Bug(PLAIN_PAGES, BARRIER, "", behind="const auto attend = [&]"),
    Bug(PLAIN, "sum += scores[t].of[i] = power_of_2", "sum += power_of_2"),
    Bug(PLAIN, "most = max_lanes(most);", ""),
    Bug(PLAIN, BARRIER, "", behind="states[i * stride + 1] = sum;"),
    Bug(PLAIN, "if (j >= there) break;", "", behind="page.values(t, c, there)"),
    Bug(PLAIN_SEALED, "half(high, i) << 4 | half(low, i)", "half(high, i) << 4"),
    Bug(PLAIN_SEALED, "i % 4 * 8 + i / 4 * 4", "i % 4 * 8"),
    Bug(PLAIN_SEALED, "key_scales[padded + c + i]", "key_scales[c + i]"),
    Bug(PLAIN_SEALED, "value_scales[kPageTokens + t + i]", "value_scales[t + i]"),
    Bug(PLAIN_SEALED, "i < 4 ? first : second", "first"),
    Bug(PLAIN_SEALED, "c / kLineRows * (kPageTokens / kTokens)", "c / kLineRows"),
    Bug(SEALED, "bytes + at.values + head * at.code_bytes", "bytes + at.values"),
    # --- attention.cuh: pairs and states
    Bug(PAIRS, "query = tile.query + (tile.first + i) / group", "query = tile.query"),
    Bug(PAIRS, "(tile.first + i) % group", "i % group"),
    Bug(PAIRS, "of.row * call.qkv.stride", "query * call.qkv.stride * 0"),
    Bug(LONG, "const float top = fmaxf(most, state_most);", "const float top = state_most;"),
    Bug(PAIRS, "fmaf(sum, old_one, ", "fmaf(sum, 1.0f, "),
    Bug(TICKETS, "if (*slot) *arrived = 0;", ""),
    Bug(MANY_TICKETS, "+ 1 == count", "+ 1 == 2"),
    Bug(TICKETS, BARRIER, "", behind="if (*slot) *arrived = 0;"),
    Bug(PAIRS, "  __syncthreads();  // for the only group's block, which reads what its threads wrote\n", ""),
    Bug(GROUPS, "first = group * kGroupPages;", "first = 0;"),
    Bug(GROUPS, "count = left < kGroupPages ? left : kGroupPages", "count = kGroupPages"),
    Bug(GROUPS, "call.most_pages + group", "call.most_pages"),
    Bug(GROUPS, "state[1] = static_cast<float>(merged.total)", "state[1] = sums[0]"),
    # --- device.cpp
    Bug(STREAMS, "table.open(ordinal, stream_.get(), &handle_)", "table.open(ordinal, nullptr, &handle_)"),
    Bug(STREAMS, "if (of != ordinal)", "if (false)"),
    Bug(SHARED, "table_.await_everybody(handle_) == 0", "true"),
    Bug(SHARED, "given_back_by_others_.insert(given_back_by_others_.end(), others.begin(), others.end());", ""),
    Bug(SHARED, "if (at_once) release_memory();", ""),
    Bug(SHARED, "retired_ = true;", ""),
    Bug(SHARING, "device_->allocate_shared(bytes)", "device_->allocate(bytes)"),
    Bug(STREAMS, "table_.close(handle_);", "stream_.reset(); table_.close(handle_);"),
    # --- tensor_attention.cu
    Bug(TENSOR, "to += kStateHead + 8 * kCount * warp;", "to += kStateHead;"),
    Bug(TENSOR, "if (pair < pairs)\n", "if (pair + 1 < pairs)\n"),
    Bug(TENSOR, "first + lane % 16, 2 * step + lane / 16", "first + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2"),
    Bug(TILE_PRODUCTS, "2 * t + i % 2 >= seen[i / 2]", "2 * t + i % 2 > seen[i / 2]"),
    Bug(TILE_PRODUCTS, "2 * t + i % 2 >= seen[i / 2]", "2 * t >= seen[i / 2]"),
    Bug(TILE_PRODUCTS, "most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));", ""),
    Bug(TILE_PRODUCTS, "total[row] *= factor[row];", ""),
    Bug(TILE_PRODUCTS, "sums[n][i] *= factor[i / 2]", "sums[n][i] *= factor[i % 2]"),
    Bug(TILE_PRODUCTS, "total[1] = totals[2];", "total[1] = totals[1];"),
    Bug(TENSOR, "Parts::kOpen && has_own && page + 1 == count", "false"),
    Bug(TENSOR_CUT, "seen_by(call, tile, kv_head, g + 8 * row)", "seen_by(call, tile, kv_head, g)"),
    Bug(TENSOR_CUT, "most[tile * kTileUnits + i]", "most[tile * kTileUnits]"),
    Bug(TENSOR, "      __syncthreads();  // the largest are known\n", ""),
    Bug(TENSOR, "      __syncthreads();  // the part is there, and the one before is not needed any more\n", ""),
    Bug(RUNS, "fmaxf(so_far.most[row], top[row])", "top[row]"),
    Bug(RUNS, "  __syncthreads();\n", "", behind="has_own && i + 1 == count"),
    Bug(RUNS, "wait_for_copies<Ring::kPlaces - 2>", "wait_for_copies<Ring::kPlaces - 1>"),
    Bug(RUNS, "      __syncthreads();  // the part is there, and the one before is not needed any more\n", ""),
    Bug(RUNS, "i + 1 < Ring::kPlaces; ++i) request()", "i < Ring::kPlaces; ++i) request()"),
    Bug(RUNS, "place_asked + 1 == Ring::kPlaces ? 0", "place_asked + 1 == Ring::kPlaces ? 1"),
    Bug(RUNS, "place + 1 == Ring::kPlaces ? 0", "place + 2 == Ring::kPlaces ? 0", behind="const auto next_part"),
    Bug(RUNS, "last ? last_parts : kPageParts", "kPageParts"),
    Bug(RUNS, "last ? tokens : kPageTokens}", "tokens}"),
    Bug(RUNS, "part_asked - (values ? there : 0)", "part_asked % kPageParts"),
    Bug(RUNS, "      __syncthreads();  // the places of closed pages are not needed any more\n", ""),
    Bug(RUNS, "8 * (i - i % 2) + 4 * t + i % 2 * 2", "8 * i + 2 * t"),
    Bug(RUNS, "tile.own : call.pages[tile.first_page + first + i]", "tile.own : call.pages[first + i]"),
    Bug(RUNS, "left < call.run_pages ? left : call.run_pages", "call.run_pages"),
    Bug(RUN_STATES, "(count + call.run_pages - 1) / call.run_pages", "count"),
    Bug(RUN_STATES, "(count + call.run_pages - 1) / call.run_pages", "count / call.run_pages"),
    Bug(RUN_STATES, "__syncthreads();  // the block reads what its threads wrote", ";"),
    Bug(TENSOR, "from.page == tile.own", "false"),
    Bug(TENSOR, "from.number * kTileTokens", "0", behind="attend_groups_kernel"),
    Bug(TENSOR, "from.number + 1 < tiles_of(from.tokens)", "from.number + 1 < kPageTiles"),
    Bug(TENSOR, "step % kPageTiles", "step"),
    Bug(TENSOR_GROUPS, "first + threadIdx.x < tile.before", "first + threadIdx.x + 1 < tile.before"),
    Bug(TENSOR_GROUPS, "left < kGroupPages ? left : kGroupPages", "kGroupPages"),
    Bug(TENSOR_GROUPS, "if (left < kGroupPages) {", "if (left <= kGroupPages) {"),
    # --- page_tiles.cuh
    Bug(TILE_PRODUCTS, "column * kColumn + row * 16", "column * kColumn + row / 2 * 32"),
    Bug(SEALED_PRODUCTS, "n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2", "n + lane % 16, k / 8 + lane / 16"),
    Bug(OPEN_TILES, "2 * block + half)", "2 * block + 1 - half)"),
    Bug(OPEN_NAN_TILES, "of.number * kTileTokens + token < of.tokens)", "true)"),
    Bug(OPEN_TILES, "wait_for_copies<kLeft>();", "wait_for_copies<kLeft + 1>();"),
    Bug(UNSEALING, "kMinusHalf = 0xbf00bf00u", "kMinusHalf = 0xbf80bf80u"),
    Bug(UNSEALING, "kLastBytes = 0x4342u", "kLastBytes = 0x4243u"),
    Bug(SEALED_TILES, "joined_halves(upper, lower >> 4)", "joined_halves(upper, lower)"),
    Bug(SEALED_TILES, "kNeighbours = 0x3120u", "kNeighbours = 0x3210u"),
    Bug(SEALED_TILES, "word >> 4, scale.z, zero.z", "word >> 4, scale.z, zero.y"),
    Bug(SEALED_TILES, "scales + octet * 16", "scales + warp * 16"),
    Bug(SEALED_TILES, "values_of_bytes(second, kFirstBytes", "values_of_bytes(first, kFirstBytes"),
    Bug(SEALED_TILES, "line += call.closed.lower", "line += 0"),
    Bug(SEALED_TILES, "(of.number * kTileTokens + warp * 8) * 2;", "(of.number * kTileTokens) * 2;"),
    # --- page_parts.cuh
    Bug(PARTS, "scales + which * zeros", "scales"),
    Bug(PARTS, "(4 * octet + threadIdx.x % 4)", "(4 * octet)"),
    Bug(PARTS, "0x5140u : 0x7362u", "0x5140u : 0x5140u"),
    Bug(PARTS, "values_of_bytes(second, own", "values_of_bytes(first, own"),
    Bug(PARTS, "values_of_nibbles(codes >> 8", "values_of_nibbles(codes"),
    Bug(PARTS, "codes += at.lower", "codes += 0"),
    Bug(PARTS, "of.number * kPlaneBytes", "0"),
    Bug(PARTS, "(of.number * kLines + line)", "line"),
    Bug(PARTS, "of.number * kTokens * 2", "0"),
    Bug(PARTS, "(chunk * 16 ^ turned(line))", "chunk * 16"),
    Bug(PARTS, "high << (4 - half_shift())", "high << half_shift()"),
    Bug(PARTS, "even ? kFirstBytes : kLastBytes", "kFirstBytes"),
    Bug(PARTS, "(n / kLineRows * kOctets + octet)", "octet"),
    Bug(PARTS, "octet * 2 + t / 2", "octet * 2"),
    Bug(PARTS, "at(octet, n + g)", "at(octet, n)"),
    Bug(PARTS, "tile * (kTileTokens / 8)", "0"),
    # --- vision_attention.cu
    Bug(TILES, "r % call.tokens * (call.dim / 2)", "r * (call.dim / 2)"),
    Bug(TILES, "< call.heads ? call.scale : 1.0f", "< 0 ? call.scale : 1.0f"),
    Bug(TILES, "angles = token * (call.dim / 2)", "angles = r * (call.dim / 2)"),
    Bug(TILES, "if (part < 2) {", "if (part < 1) {"),
    Bug(TILES, "number % call.heads", "0"),
    Bug(TILES, "2 * pair < call.dim", "true"),
    Bug(VISION_ROUNDINGS, "part == 0 ? call.scale : 1.0f", "call.scale"),
    Bug(VISION_ROUNDINGS, "part == 0 ? kLog2E : 1.0f", "1.0f"),
    Bug(TILES, "of.first + token < of.tokens", "true"),
    Bug(TILES, "if (there < kTileTokens) hide(", "if (false) hide("),
    Bug(TILES, "piece + 1 == kPieces", "piece == kPieces"),
    Bug(TILES, "keys_left < kPageTokens ? keys_left : kPageTokens", "kPageTokens"),
    Bug(TILES, "tile * call.tokens + token) * call.qkv.stride", "token) * call.qkv.stride"),
    # --- exercise.cu
    Bug(EXERCISES, "    fence_products();\n", ""),
    # --- seal.cu
    Bug(SEALING, "bits >> 31 != 0 && (bits & 0xffffu) != 0", "(bits & 0xffffu) != 0"),
    Bug(SEALING, "(1 << bits) - 1", "1 << bits"),
    Bug(SEALING, "/ divisor + 0.5f", "/ divisor"),
    Bug(SEALING, "poison += value * 0.0f;", ""),
    Bug(SEALING, "!finite(most - range.least) || ", ""),
    Bug(SEALING, "pair / 4 * 8 + pair % 4 + 4}", "pair / 4 * 8 + pair % 4 + 1}"),
    Bug(SEALING, "scales[c[i]] = there ? range[i].scale : 0;", "if (there) scales[c[i]] = range[i].scale;"),
    Bug(SEALING, "(code[0] & 15) | (code[1] & 15) << 4", "code[0] & 15"),
    Bug(SEALING, "first = part / 4 * line_tokens + part % 4", "first = part"),
    Bug(SEALING, "c < open.dim && i < each", "c < open.dim && i < 1"),
    Bug(SEALING, "i < call.sealed.page_bytes; i += kThreads) page[i] = 0", "false;)"),
]  # fmt: skip


def _place_in(text: str, bug: Bug) -> int:
    assert bug.behind in text, f"{bug.behind!r} is not in {bug.place.file}"
    at = text.find(bug.before, text.index(bug.behind))
    assert at >= 0, f"{bug.before!r} is not in {bug.place.file} behind {bug.behind!r}"
    return at


@pytest.mark.parametrize("bug", [*SAMPLE, *OTHERS], ids=lambda bug: bug.name)
def test_the_source_has_the_place_of_each_bug(bug: Bug) -> None:
    """So that a change of a kernel does not quietly take its bugs away."""
    _place_in(bug.place.text(bug.place.file), bug)


def _compile(bug: Bug, folder: Path) -> Path:
    """The object of the source that sees the change."""
    headers = folder / bug.place.folder
    headers.mkdir(parents=True)
    changed = {bug.place.file, bug.place.source}
    for name in changed:
        text = bug.place.text(name)
        if name == bug.place.file:
            at = _place_in(text, bug)
            text = text[:at] + bug.after + text[at + len(bug.before) :]
        if bug.place.formats and FORMATS in text:
            text = text.replace(FORMATS, "".join(_format_lines(bug.place.formats)))
        (headers / name).write_text(text)
    made = folder / "changed.o"
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-x", "c++", "-c"]
    if bug.place.layer:  # of the host, one object of all that it has
        layer = (ROOT / "csrc" / bug.place.layer).rglob("*.cpp")
        own = ROOT / "csrc" / bug.place.folder / bug.place.source
        names = [headers / bug.place.source if name == own else name for name in sorted(layer)]
        whole = folder / "layer.cpp"
        whole.write_text("".join(f'#include "{name}"\n' for name in names))
    else:
        whole = headers / bug.place.source
    command += [str(whole), "-o", str(made)]
    command += [f"-I{place}" for place in (folder, ROOT / "csrc", ROOT / "tests" / "cpp")]
    subprocess.run(command, check=True)
    return made


def _format_lines(formats: tuple[str, ...]) -> Iterator[str]:
    """The list of formats, with these alone: there are many, and each takes its time to compile."""
    for line in (ROOT / "csrc" / "quant" / "formats.inc").read_text().splitlines():
        if line.startswith("PUNA_FORMAT("):
            traits = line.removeprefix("PUNA_FORMAT(").split(",")[0]
            yield f"{line}\n" if traits in formats else "{},\n"


def _is_found(bug: Bug, folder: Path, programs: Path) -> bool:
    """Whether a test fails, or the program does."""
    made, name = _compile(bug, folder), bug.place.program
    main = programs / "CMakeFiles" / f"{name}.dir" / "tests" / "cpp" / f"{name}.cpp.o"
    others = {*programs.glob("libpuna_*.a")} - {programs / f"libpuna_{bug.place.layer}.a"}
    libraries = ["-Wl,--start-group", *sorted(map(str, others)), "-Wl,--end-group"]
    command = ["g++", str(main), str(made), *libraries, "-ldl", "-lpthread"]
    subprocess.run([*command, "-o", str(folder / name)], check=True)
    command = [str(folder / name), "--first", bug.place.tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not done.stdout.startswith("0 tests"), f"{name} has no test {bug.place.tests!r}"
    return done.returncode != 0


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, programs: Path
) -> Iterator[dict[Bug, Future[bool]]]:
    """Whether each bug of this run is found, several at a time."""
    bugs = [
        item.callspec.params["bug"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_a_planted_bug_is_found
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {
            bug: pool.submit(_is_found, bug, tmp_path_factory.mktemp("bug"), programs)
            for bug in bugs
        }


@pytest.mark.parametrize(
    "bug",
    [pytest.param(bug, id=bug.name, marks=pytest.mark.slow) for bug in SAMPLE]
    + [pytest.param(bug, id=bug.name, marks=pytest.mark.nightly) for bug in OTHERS],
)
def test_a_planted_bug_is_found(found: dict[Bug, Future[bool]], bug: Bug) -> None:
    assert found[bug].result()
