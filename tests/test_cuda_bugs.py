"""Planted bugs in the CUDA kernels: the tests on the emulator must find every one.

Each bug is a change of one place of a kernel: a missing barrier, a wrong lane, a tail without its
guard. The file that has it is compiled with the change and linked in the place of the right one,
and the tests named beside it must fail.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from test_cpp import ROOT, build

KERNELS = ROOT / "csrc" / "kernels" / "cuda"
FORMATS = '#include "quant/formats.inc"'

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the emulator's fibres are for x86-64"
)


@dataclass(frozen=True)
class Place:
    """Where bugs are: a file, the source that is compiled for it, and the tests that watch over it."""

    file: str
    source: str
    program: str
    tests: str
    formats: tuple[str, ...] = ()  # that are compiled, of the quantised ones


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


PRODUCT = Place("product.cuh", "product.cu", "cuda_backend_test", "matmul")
# Rows of thousands of columns: warps take several spans each.
LONG_PRODUCT = Place("product.cuh", "product.cu", "cuda_backend_test", "mlp")
EXPERTS = Place("product.cuh", "product.cu", "cuda_backend_test", "moe")
FLOATS = Place("product.cu", "product.cu", "cuda_backend_test", "matmul")
FLOAT8 = Place("product.cu", "product.cu", "cuda_product_test", "float8")
ROWS = Place("rows.cu", "rows.cu", "cuda_backend_test", "moe")
NORMS = Place("rows.cu", "rows.cu", "cuda_backend_test", "norms")
MOVES = Place("rows.cu", "rows.cu", "cuda_backend_test", "moves")
VISION = Place("rows.cu", "rows.cu", "cuda_backend_test", "vision")
OPERANDS = Place("rows.cu", "rows.cu", "cuda_product_test", "products_of_Int4")
CODES = Place("operand.cuh", "rows.cu", "cuda_product_test", "products_of_Int4")
ODD_CODES = Place("operand.cuh", "rows.cu", "cuda_product_test", "odd")
PASSES = Place("rows.cu", "rows.cu", "cuda_backend_test", "passes")
ROUTED_PASSES = Place("routing.cu", "routing.cu", "cuda_backend_test", "passes")
SUMS = Place("reduce.cuh", "rows.cu", "cuda_backend_test", "norms")
ROUTING = Place("routing.cu", "routing.cu", "cuda_backend_test", "moe")
TURNS = Place("turn.cuh", "append.cu", "cuda_attention_test", "attention_is_near")
APPENDS = Place("append.cu", "append.cu", "cuda_attention_test", "attention_is_near")
APPENDED_BATCHES = Place("append.cu", "append.cu", "cuda_attention_test", "a_batch_gives")
LAYOUT = Place("append.cu", "append.cu", "cuda_attention_test", "stated_layout")
PLAIN = Place("plain_attention.cuh", "attention.cu", "cuda_attention_test", "attention_is_near")
PLAIN_SEALED = Place(
    "plain_attention.cuh", "attention.cu", "cuda_sealed_attention_test", "sealed_attention"
)
PLAIN_PAGES = Place("attention.cu", "attention.cu", "cuda_attention_test", "attention_is_near")
PLAIN_BATCHES = Place("attention.cu", "attention.cu", "cuda_attention_test", "a_batch_gives")
SEALED = Place("attention.cu", "attention.cu", "cuda_sealed_attention_test", "sealed_attention")
PAIRS = Place("attention.cuh", "attention.cu", "cuda_attention_test", "attention_is_near")
TICKETS = Place("reduce.cuh", "attention.cu", "cuda_attention_test", "attention_is_near")
LONG = Place("attention.cuh", "attention.cu", "cuda_attention_test", "scores_may")
GROUPS = Place("attention.cuh", "attention.cu", "cuda_attention_test", "many_leaves")
TENSOR = Place("tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "any_cut")
TENSOR_NEAR = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "attention_is_near"
)
PRODUCTS_NEAR = Place(
    "tile_products.cuh", "tensor_attention.cu", "cuda_attention_test", "attention_is_near"
)
PRODUCTS_CUT = Place("tile_products.cuh", "tensor_attention.cu", "cuda_attention_test", "any_cut")
TENSOR_GROUPS = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_attention_test", "groups_of_pages"
)
TENSOR_SEALED = Place(
    "tensor_attention.cu", "tensor_attention.cu", "cuda_sealed_attention_test", "where_pages_lie"
)
OPEN_TILES = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_attention_test", "attention_is_near"
)
OPEN_NAN_TILES = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_attention_test", "groups_of_pages"
)
SEALED_TILES = Place(
    "page_tiles.cuh", "tensor_attention.cu", "cuda_sealed_attention_test", "sealed_attention"
)
TILES = Place(
    "vision_attention.cu", "vision_attention.cu", "cuda_attention_test", "vision_attention"
)
SEALING = Place("seal.cu", "seal.cu", "cuda_sealed_attention_test", "sealed")


def quantized(*formats: str) -> Place:
    """Products with weights of these formats."""
    tests = f"products_of_{formats[0]}_"
    return Place(
        "quantized_product.cu", "quantized_product.cu", "cuda_product_test", tests, formats
    )


BARRIER = "  __syncthreads();\n"

# The ones that every run of the slower checks plants; they are of all kinds.
SAMPLE = [
    Bug(PRODUCT, "  " + BARRIER, ""),
    Bug(LONG_PRODUCT, "first += kWarps, round ^= 1", "first += kWarps"),
    Bug(PRODUCT, "sums.value[h][j][n][2 * row + column]", "sums.value[h][j][n][2 * column + row]"),
    Bug(quantized("Int4G32"), "{low[0], low[1], high[0], high[1]}", "{low[0], high[0], low[1], high[1]}"),
    Bug(SUMS, "  __syncthreads();  // what was read of an earlier sum\n", ""),
    Bug(ROUTING, BARRIER, "", behind="call.slot + r * call.top_k);"),
    Bug(PLAIN, BARRIER, "", behind="scores[t] = sums;"),
    Bug(PRODUCTS_CUT, "    __syncthreads();  // the tile is there, and the one before is not needed any more\n", ""),
    Bug(SEALING, "(bits & 0xffffu) != 0 ? 1 : 0", "0", behind="bf16_above"),
]  # fmt: skip
OTHERS = [
    # --- product.cuh: shares of blocks, warps and threads
    Bug(PRODUCT, "for (int w = 0; w < count; ++w)", "for (int w = 0; w < kWarps; ++w)"),
    Bug(PRODUCT, "for (int w = 0; w < count; ++w)", "for (int w = 1; w < count; ++w)"),
    Bug(PRODUCT, "spans - first < kWarps ? spans - first : kWarps", "1"),
    Bug(LONG_PRODUCT, "first + warp < spans", "first + warp + 1 < spans"),
    Bug(LONG_PRODUCT, "first + warp, tokens)", "warp, tokens)"),
    Bug(PRODUCT, "column >= call.rows", "column > call.rows"),
    Bug(PRODUCT, "if (call.bias != nullptr) value += call.bias[column];", ""),
    Bug(PRODUCT, "value += call.bias[column]", "value += call.bias[at % kPanel]"),
    Bug(PRODUCT, "(call.rows + kPanel - 1) / kPanel", "call.rows / kPanel + (call.rows < kPanel)"),
    Bug(PRODUCT, "(call.count + kTokens - 1) / kTokens", "call.count / kTokens + (call.count < kTokens)"),
    Bug(PRODUCT, "call.accumulate ? *out + value : value", "value"),
    Bug(PRODUCT, "0.70710678118654752f", "0.7071f"),
    Bug(PRODUCT, "(call.cols + kSpan - 1) / kSpan", "call.cols / kSpan"),
    Bug(PRODUCT, "32 * h + 4 * g;", "32 * h + 4 * t;"),
    Bug(PRODUCT, "2 * t + column) * kPanel", "t + 4 * column) * kPanel"),
    Bug(PRODUCT, "blockIdx.x * call.panel_bytes", "blockIdx.y * call.panel_bytes"),
    Bug(PRODUCT, "static_cast<int64_t>(blockIdx.y) * kTokens", "static_cast<int64_t>(blockIdx.y) * 8"),
    Bug(EXPERTS, "end - tokens.first < kTokens ? end - tokens.first : kTokens", "kTokens"),
    Bug(EXPERTS, "begin = call.experts.offsets[expert];", "begin = call.experts.offsets[expert + 1] - 1;"),
    Bug(EXPERTS, "if (expert < 0) return;", "if (expert <= 0) return;"),
    Bug(EXPERTS, "call.experts.occupied[blockIdx.z]", "blockIdx.z"),
    Bug(EXPERTS, "weights = call.experts.matrices[expert];", "weights = call.experts.matrices[0];"),
    # --- product.cu: weights that are floats
    Bug(FLOATS, "const int at = pair + t + 4 * i;", "const int at = pair + t;"),
    Bug(FLOATS, "{low.x, low.y, high.x, high.y}", "{low.x, high.x, low.y, high.y}"),
    Bug(FLOATS, "{low.z, low.w, high.z, high.w}", "{low.x, low.y, high.x, high.y}"),
    Bug(FLOATS, "(call.cols + 1) / 2", "call.cols / 2"),
    Bug(FLOATS, "begin + kSpan / 2 < pairs ? begin + kSpan / 2 : pairs", "begin + kSpan / 2"),
    Bug(FLOATS, "4 * (at * kPanel + 32 * h + 4 * g)", "4 * (at * kPanel + 32 * h + 4 * t)"),
    Bug(FLOATS, "call.x.stride + 2 * at)", "call.x.stride + at)"),
    Bug(FLOATS, "n * kTileTokens + g", "g"),
    Bug(FLOATS, "begin + kSpan < call.cols ? begin + kSpan : call.cols", "begin + kSpan"),
    Bug(FLOATS, "fmaf(value, weight.y, sums[token].y)", "fmaf(value, weight.x, sums[token].y)"),
    Bug(FLOATS, "if (token >= tokens.count) break;", "if (token > 7) break;"),
    Bug(FLOAT8, "(exponent + 120) << 23", "(exponent + 119) << 23"),
    Bug(FLOAT8, "if (exponent != 0)", "if (true)"),
    Bug(FLOAT8, "kFp8ScaleBytes + column * kPanel", "column * kPanel"),
    Bug(FLOAT8, "sums[token].y * factor.y", "sums[token].y * factor.x"),
    # --- quantized_product.cu: codes, scales and offsets
    Bug(quantized("Int8G32"), "step = kBits == 8 ? 4 : 1", "step = 1"),
    Bug(quantized("Int2K"), "bits_at<3>(last, 2 * t)", "bits_at<3>(first, 2 * t)"),
    Bug(quantized("Int5G32"), "bits_at<1>(first, t + 4)", "bits_at<1>(first, t)"),
    Bug(quantized("Int6K"), "codes.high[row] |= upper.high[row] << kLow;", ""),
    Bug(quantized("Int3K"), "kLow = kBits == 3 ? 2 : 4", "kLow = kBits == 3 ? 1 : 4"),
    Bug(quantized("Int5K"), "high.load(at + 64 * kLow, t)", "high.load(at, t)"),
    Bug(quantized("Table4G32"), "(codes >> 3 & 0x01010101u) * 0xffu", "0"),
    Bug(quantized("Table4K"), "low >> 8 & 0x700u", "low >> 4 & 0x700u"),
    Bug(quantized("Int4G64"), "(within / kColumns + step) * (kPanel / 16)", "(within / kColumns) * (kPanel / 16)"),
    Bug(quantized("Int4G128"), "+ 2 * h + g / 4;", "+ 2 * h + g % 2;"),
    Bug(quantized("Int4G128"), "16 * (g % 4), t)", "16 * (g / 2), t)"),
    Bug(quantized("Int4G32"), "begin + kSpan < padded ? begin + kSpan : padded", "begin + kSpan"),
    Bug(quantized("Int4G32"), "at + kColumns / 2", "at + 4"),
    Bug(quantized("Int6K"), "mma_u8s8_half(dots[1][h][j][n], high[0], high[1], b[1])",
        "mma_u8s8_half(dots[1][h][j][n], high[0], high[1], b[0])"),
    Bug(quantized("Int4G32"), "codes[h].high + 2 * j", "codes[h].high"),
    Bug(quantized("Int6K"), "column / kGroup + each, tokens", "column / kGroup, tokens"),
    Bug(quantized("Int4K"), "own * kPanel + row);\n      if", "row);\n      if"),
    Bug(quantized("Int4MinG32"), "if constexpr (Format::kOffset) to = fmaf", "if constexpr (false) to = fmaf"),
    Bug(quantized("Int4MinG64"), "block + Layout::kOffsets + 2 * row", "block + Layout::kScale + 2 * row"),
    Bug(quantized("Int4G32"), "- Format::kZero * sum", ""),
    Bug(quantized("Int4G32"), "row % 2 * 2 + column", "column * 2 + row % 2"),
    Bug(quantized("Int4G32"), "dots[h][row / 2][n][i] -", "dots[h][row % 2][n][i] -"),
    Bug(quantized("Int4G32"), "n * kTileTokens + 2 * t + column", "n * kTileTokens + t + 4 * column"),
    # --- rows.cu
    Bug(CODES, "fmaxf(most, fabsf(value))", "fmaxf(most, value)"),
    Bug(CODES, "rintf(x * inverse)", "truncf(x * inverse)"),
    Bug(CODES, "if (to.group > 32) sums", "if (to.group > 64) sums"),
    Bug(CODES, "column % to.group == 0", "lane == 0"),
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
    Bug(ROWS, "add_experts(call, r, c, *residual)", "add_experts(call, r, c, 0)"),
    Bug(ROWS, "call.slot[r * call.top_k + i]", "call.slot[r + i]"),
    Bug(NORMS, "/ count + call.eps", "/ count"),
    Bug(NORMS, "fmaf(at - mean, at - mean, sum)", "fmaf(at, at, sum)"),
    Bug(NORMS, "four.at[i] += call.bias[first + i];", ""),
    Bug(NORMS, "first + kLaneColumns <= cols", "first <= cols"),
    Bug(PASSES, "if (first + i >= cols) four.at[i] = 0;", ""),
    Bug(PASSES, "store_four(residual, first, cols, four);", ""),
    Bug(PASSES, "add_experts(call.added, r, first + i, four.at[i])", "four.at[i]"),
    Bug(MOVES, "if (c < call.cols) out[c]", "if (c <= call.cols) out[c]"),
    Bug(MOVES, "call.to != nullptr ? call.to[r] : r", "r"),
    Bug(VISION, "tile * 3 + channel", "tile + channel"),
    Bug(VISION, "c / call.patch % call.patch;", "c % call.patch;"),
    Bug(VISION, "neighbour / call.factor;", "neighbour % call.factor;"),
    # --- reduce.cuh
    Bug(SUMS, "mask < kLanes; mask *= 2) value +=", "mask < kLanes / 2; mask *= 2) value +="),
    Bug(SUMS, BARRIER, "", behind="scratch[threadIdx.x / kWarp] = value;"),
    Bug(SUMS, "warp < kThreads / kWarp", "warp < kThreads / kWarp - 1"),
    # --- routing.cu
    Bug(ROUTING, "a > b || (b != b && a == a)", "a >= b"),
    Bug(ROUTING, "a > b || (b != b && a == a)", "a > b"),
    Bug(ROUTING, "return i < j && (a == b", "return i > j && (a == b"),
    Bug(ROUTING, "(k == 0 || before(last_logit, last, logits[e], e)) &&", ""),
    Bug(ROUTING, "best[place - 1] > expert", "best[place - 1] < expert"),
    Bug(ROUTING, "mask < kWarp; mask *= 2", "mask < 4; mask *= 2"),
    Bug(ROUTING, "first[e + 1] += first[e];", ""),
    Bug(ROUTING, BARRIER, "", behind="first[e + 1] = count;"),
    Bug(ROUTING, BARRIER, "", behind="call.occupied[occupied++] = -1;"),
    Bug(ROUTING, "if (first[e + 1] > 0)", "if (first[e + 1] > 1)"),
    Bug(ROUTED_PASSES, "call.score[slot] * x[column + k]", "x[column + k]"),
    Bug(ROUTED_PASSES, "call.row[slot] * call.x.stride", "slot * call.x.stride"),
    Bug(ROUTING, "call.row[middle] <= r", "call.row[middle] < r"),
    Bug(ROUTING, "1.0 + exp(-logit)", "1.0 + exp(logit)"),
    # --- append.cu, turn.cuh
    Bug(TURNS, "a = fmaf(x, c, -(y * s))", "a = fmaf(x, c, y * s)"),
    Bug(TURNS, "sum_lanes(squares) / static_cast<float>(dim)", "sum_lanes(squares)"),
    Bug(TURNS, "mean = sum_lanes(squares)", "mean = squares"),
    Bug(APPENDS, "call.temperature[r] * call.scale", "call.scale"),
    Bug(APPENDED_BATCHES, "call.cos + r * (dim / 2)", "call.cos"),
    Bug(LAYOUT, "(token / kKeyBlock * dim + c) * kKeyBlock", "(token / kKeyBlock + c) * kKeyBlock"),
    Bug(LAYOUT, "(head - call.heads.query) * call.open.head_bytes", "0"),
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
    Bug(TICKETS, "+ 1 == count", "+ 1 == 2"),
    Bug(TICKETS, BARRIER, "", behind="if (*slot) *arrived = 0;"),
    Bug(PAIRS, "  __syncthreads();  // for the only group's block, which reads what its threads wrote\n", ""),
    Bug(GROUPS, "first = group * kGroupPages;", "first = 0;"),
    Bug(GROUPS, "count = left < kGroupPages ? left : kGroupPages", "count = kGroupPages"),
    Bug(GROUPS, "call.most_pages + group", "call.most_pages"),
    Bug(GROUPS, "state[1] = static_cast<float>(merged.total)", "state[1] = sums[0]"),
    # --- tensor_attention.cu
    Bug(TENSOR, "float2*>(to + kStateHead + 8 * (kCount * warp + n) + 2 * t)", "float2*>(to + kStateHead + 8 * n + 2 * t)"),
    Bug(TENSOR, "if (pair >= tile.pairs) return 0;", "if (pair > tile.pairs) return 0;"),
    Bug(TENSOR_NEAR, "seen[half] = g + 8 * half < tile.pairs ? pair.seen : kPageTokens;", "seen[half] = kPageTokens;"),
    Bug(TENSOR, "first + lane % 16, 2 * step + lane / 16", "first + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2"),
    Bug(PRODUCTS_NEAR, "2 * t + i % 2 >= seen[i / 2]", "2 * t + i % 2 > seen[i / 2]"),
    Bug(PRODUCTS_NEAR, "2 * t + i % 2 >= seen[i / 2]", "2 * t >= seen[i / 2]"),
    Bug(PRODUCTS_NEAR, "most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));", ""),
    Bug(PRODUCTS_NEAR, "total[row] *= factor[row];", ""),
    Bug(PRODUCTS_NEAR, "sums[n][i] *= factor[i / 2]", "sums[n][i] *= factor[i % 2]"),
    Bug(PRODUCTS_NEAR, "total[1] = totals[2];", "total[1] = totals[1];"),
    Bug(TENSOR_NEAR, "if (own) hide(scores", "if (false) hide(scores"),
    Bug(TENSOR, "w < kTileWarps; ++w", "w < kTileWarps - 1; ++w"),
    Bug(TENSOR, BARRIER, "", behind="memory.most[warp][g + 8 * row] = most;"),
    Bug(TENSOR, BARRIER, "", behind="memory.weights[g + 8 * row][4 * warp + t] ="),
    Bug(TENSOR, "from.page == tile.own", "false"),
    Bug(TENSOR, "from.number * kTileTokens", "0", behind="attend_groups_kernel"),
    Bug(TENSOR, "from.number + 1 < tiles_of(from.tokens)", "from.number + 1 < kPageTiles"),
    Bug(TENSOR, "step % kPageTiles", "step"),
    Bug(TENSOR_GROUPS, "first + threadIdx.x < tile.before", "first + threadIdx.x + 1 < tile.before"),
    Bug(TENSOR_GROUPS, "left < kGroupPages ? left : kGroupPages", "kGroupPages"),
    Bug(TENSOR_GROUPS, "if (left < kGroupPages) {", "if (left <= kGroupPages) {"),
    # --- page_tiles.cuh
    Bug(PRODUCTS_NEAR, "column * kColumn + row * 16", "column * kColumn + row / 2 * 32"),
    Bug(PRODUCTS_NEAR, "n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2", "n + lane % 16, k / 8 + lane / 16"),
    Bug(OPEN_TILES, "2 * block + half)", "2 * block + 1 - half)"),
    Bug(OPEN_NAN_TILES, "i < left)", "true)"),
    Bug(OPEN_TILES, "wait_for_copies<0>();", "wait_for_copies<1>();"),
    Bug(SEALED_TILES, "kMinus2176 = 0xc508c508u", "kMinus2176 = 0xc500c500u"),
    Bug(SEALED_TILES, "kNeighbours = 0x3120u", "kNeighbours = 0x3210u"),
    Bug(SEALED_TILES, "pair(4, scale.z, zero.z)", "pair(4, scale.z, zero.y)"),
    Bug(SEALED_TILES, "scales + octet * 16", "scales + warp * 16"),
    Bug(SEALED_TILES, "(value[part][1] & ~kLow)", "(value[part][1] & kLow)"),
    Bug(SEALED_TILES, "line += call.closed.lower", "line += 0"),
    Bug(SEALED_TILES, "(of.number * kTileTokens + warp * 8) * 2;", "(of.number * kTileTokens) * 2;"),
    # --- vision_attention.cu
    Bug(TILES, "r % call.tokens * (call.dim / 2)", "r * (call.dim / 2)"),
    Bug(TILES, "keys_left < kPageTokens ? keys_left : kPageTokens", "kPageTokens"),
    Bug(TILES, "tile * call.tokens + token) * call.qkv.stride", "token) * call.qkv.stride"),
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


def _compile(bug: Bug, folder: Path) -> Path:
    """The object of the source that sees the change."""
    headers = folder / "kernels" / "cuda"
    headers.mkdir(parents=True)
    changed = {bug.place.file, bug.place.source}
    for name in changed:
        text = (KERNELS / name).read_text()
        if name == bug.place.file:
            at = text.find(bug.before, text.index(bug.behind))
            assert at >= 0, f"{bug.before!r} is not in {name}"
            text = text[:at] + bug.after + text[at + len(bug.before) :]
        if bug.place.formats and FORMATS in text:
            text = text.replace(FORMATS, "".join(_format_lines(bug.place.formats)))
        (headers / name).write_text(text)
    made = folder / "changed.o"
    command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-w", "-x", "c++", "-c"]
    command += [str(headers / bug.place.source), "-o", str(made)]
    command += [f"-I{place}" for place in (folder, ROOT / "csrc", ROOT / "tests" / "cpp")]
    subprocess.run(command, check=True)
    return made


def _format_lines(formats: tuple[str, ...]) -> Iterator[str]:
    """The list of formats, with these alone: there are many, and each takes its time to compile."""
    for line in (ROOT / "csrc" / "quant" / "formats.inc").read_text().splitlines():
        if line.startswith("PUNA_FORMAT("):
            traits = line.removeprefix("PUNA_FORMAT(").split(",")[0]
            yield f"{line}\n" if traits in formats else "nullptr,\n"


def _is_found(bug: Bug, folder: Path, programs: Path) -> bool:
    """Whether a test fails, or the program does."""
    made, name = _compile(bug, folder), bug.place.program
    main = programs / "CMakeFiles" / f"{name}.dir" / "tests" / "cpp" / f"{name}.cpp.o"
    libraries = ("libpuna_cuda_emulated.a", "libpuna_core.a", "libpuna_kernels.a")
    command = ["g++", str(main), str(made), *(str(programs / library) for library in libraries)]
    subprocess.run([*command, "-ldl", "-lpthread", "-o", str(folder / name)], check=True)
    command = [str(folder / name), "--first", bug.place.tests]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert not done.stdout.startswith("0 tests"), f"{name} has no test {bug.place.tests!r}"
    return done.returncode != 0


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Bug, Future[bool]]]:
    """Whether each bug of this run is found, several at a time."""
    bugs = [
        item.callspec.params["bug"]
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.function is test_a_planted_bug_is_found
    ]
    programs = build(
        ROOT / "build" / "tests", programs=sorted({bug.place.program for bug in SAMPLE + OTHERS})
    )
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
