"""Synthetic GGUF files with the true layer shapes of Llama 4, for measuring speed.

A slice has the widths, heads, experts and tensor types of the real model, a few of its layers, and
a reduced vocabulary. Quantised weights are random blocks written as they are: codes uniform, scales
such that activations keep their size through the layers, as trained weights would. The router is
random in fp32, so tokens spread over the experts. What such a model says means nothing; how fast it
is said is that of the real one, layer by layer.

    python bench/synthetic_gguf.py scout --type Q4_0 --layers 4 --out /tmp

needs the packages `gguf` and `numpy`. Writing is streamed: memory stays below 100 MiB.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

# In the names of the files: files of another version are not reused.
VERSION = 1
ALIGNMENT = 32

HIDDEN, HEADS, KV_HEADS, HEAD = 5120, 40, 8, 128
EXPERT_WIDTH, DENSE_WIDTH = 8192, 16384
VOCABULARY = 8192


@dataclass(frozen=True)
class Family:
    """What distinguishes Scout from Maverick in a file."""

    experts: int
    moe_step: int  # every how many layers one has experts
    layers: int  # of a slice, unless asked otherwise
    context: int
    rope_scaling: bool


# Maverick has experts in every second layer. The slice has them in one of four: two layers of 128
# experts do not fit most machines, and llama.cpp needs a global layer, which is every fourth.
FAMILIES = {
    "scout": Family(experts=16, moe_step=1, layers=4, context=10_485_760, rope_scaling=True),
    "maverick": Family(experts=128, moe_step=4, layers=4, context=1_048_576, rope_scaling=False),
}
# Recipes of llama.cpp's quantiser: the type of most matrices. The head is Q6_K beside 4-bit types,
# and Q4_K_M has Q6_K for values and down projections in some layers.
RECIPES = {
    "Q4_0": Type.Q4_0,
    "Q4_K_M": Type.Q4_K,
    "Q8_0": Type.Q8_0,
    "F16": Type.F16,
    "BF16": Type.BF16,
}


@dataclass(frozen=True)
class Tensor:
    """One tensor; `shape` is [out, in] or [experts, out, in], or [n] for norms."""

    name: str
    shape: tuple[int, ...]
    type: Type

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file."""
        block, size = gguf.GGML_QUANT_SIZES[self.type]
        return self.elements // block * size


@dataclass(frozen=True)
class Slice:
    """The tensors of a synthetic model, and what a token costs with them."""

    model: str
    recipe: str
    layers: int
    vocabulary: int = VOCABULARY

    @property
    def family(self) -> Family:
        """The rest of the shape."""
        return FAMILIES[self.model]

    @property
    def file_name(self) -> str:
        """States everything that the contents depend on."""
        return f"llama4-{self.model}-{self.layers}-layers-{self.recipe}-v{VERSION}.gguf"

    def has_experts(self, layer: int) -> bool:
        """Whether the layer is a mixture of experts rather than dense."""
        return (layer + 1) % self.family.moe_step == 0

    def tensors(self) -> list[Tensor]:
        """In the order of the file."""
        main = RECIPES[self.recipe]
        head = Type.Q6_K if self.recipe in ("Q4_0", "Q4_K_M") else main
        tensors = [
            Tensor("token_embd.weight", (self.vocabulary, HIDDEN), main),
            Tensor("output_norm.weight", (HIDDEN,), Type.F32),
            Tensor("output.weight", (self.vocabulary, HIDDEN), head),
        ]
        if self.family.rope_scaling:
            tensors.append(Tensor("rope_freqs.weight", (HEAD // 2,), Type.F32))
        for layer in range(self.layers):
            finer = Type.Q6_K if self.recipe == "Q4_K_M" and self._more_bits(layer) else main
            shapes: list[tuple[str, tuple[int, ...], Type]] = [
                ("attn_norm", (HIDDEN,), Type.F32),
                ("attn_q", (HEADS * HEAD, HIDDEN), main),
                ("attn_k", (KV_HEADS * HEAD, HIDDEN), main),
                ("attn_v", (KV_HEADS * HEAD, HIDDEN), finer),
                ("attn_output", (HIDDEN, HEADS * HEAD), main),
                ("ffn_norm", (HIDDEN,), Type.F32),
            ]
            if self.has_experts(layer):
                experts = self.family.experts
                shapes += [
                    ("ffn_gate_inp", (experts, HIDDEN), Type.F32),
                    ("ffn_gate_exps", (experts, EXPERT_WIDTH, HIDDEN), main),
                    ("ffn_up_exps", (experts, EXPERT_WIDTH, HIDDEN), main),
                    ("ffn_down_exps", (experts, HIDDEN, EXPERT_WIDTH), finer),
                    ("ffn_gate_shexp", (EXPERT_WIDTH, HIDDEN), main),
                    ("ffn_up_shexp", (EXPERT_WIDTH, HIDDEN), main),
                    ("ffn_down_shexp", (HIDDEN, EXPERT_WIDTH), finer),
                ]
            else:
                shapes += [
                    ("ffn_gate", (DENSE_WIDTH, HIDDEN), main),
                    ("ffn_up", (DENSE_WIDTH, HIDDEN), main),
                    ("ffn_down", (HIDDEN, DENSE_WIDTH), finer),
                ]
            tensors += [Tensor(f"blk.{layer}.{name}.weight", s, t) for name, s, t in shapes]
        return tensors

    def decode_bytes(self) -> int:
        """Bytes of weights that one decoded token reads: its experts and the rest."""
        return sum(self._used(t, t.bytes) for t in self.tensors() if t.name != "token_embd.weight")

    def kv_bytes(self, depth: int, element_bytes: int = 2) -> int:
        """Bytes of keys and values that a token at position `depth` reads."""
        keys = (
            # Every fourth layer sees everything, the others their chunk of 8192.
            depth + 1 if (layer + 1) % 4 == 0 else depth % 8192 + 1
            for layer in range(self.layers)
        )
        return sum(keys) * 2 * KV_HEADS * HEAD * element_bytes

    def prefill_operations(self) -> int:
        """Multiplications and additions of the matrices for one token of a prompt.

        Without the head, which is applied to the last token only, and without attention itself.
        """
        return sum(
            2 * self._used(t, t.elements)
            for t in self.tensors()
            if len(t.shape) > 1 and t.name not in ("token_embd.weight", "output.weight")
        )

    def _used(self, tensor: Tensor, amount: int) -> int:
        return amount // self.family.experts if "_exps" in tensor.name else amount

    def _more_bits(self, layer: int) -> bool:
        """The layers to which llama.cpp's quantiser gives more bits in a Q4_K_M file."""
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers / 8 or (layer - eighth) % 3 == 2


# --- blocks -------------------------------------------------------------------------------------


def _scales(
    rng: np.random.Generator, blocks: int, mean: float, dtype: type = np.float16
) -> NDArray:
    return (mean * rng.uniform(0.5, 1.5, (blocks, 1))).astype(dtype)


def _random(rng: np.random.Generator, blocks: int, width: int) -> NDArray[np.uint8]:
    return np.frombuffer(rng.bytes(blocks * width), np.uint8).reshape(blocks, width)


def _q4_0(rng: np.random.Generator, blocks: int, deviation: float) -> NDArray[np.uint8]:
    # d (q - 8), q uniform in 0 to 15: a standard deviation of 4.6 d.
    scales = _scales(rng, blocks, deviation / 4.6).view(np.uint8)
    return np.hstack([scales, _random(rng, blocks, 16)])


def _q8_0(rng: np.random.Generator, blocks: int, deviation: float) -> NDArray[np.uint8]:
    # d q, q uniform in -127 to 127: 73 d. A quantiser never writes -128.
    codes = _random(rng, blocks, 32).copy()
    codes[codes == 128] = 129
    return np.hstack([_scales(rng, blocks, deviation / 73).view(np.uint8), codes])


def _q4_k(rng: np.random.Generator, blocks: int, deviation: float) -> NDArray[np.uint8]:
    # d s q - dmin m with s = m uniform in 16 to 63 and dmin = 7.5 d: s d (q - 7.5), 190 d.
    d = _scales(rng, blocks, deviation / 190, np.float32)
    factors = np.hstack([d, 7.5 * d]).astype(np.float16).view(np.uint8)
    s = rng.integers(16, 64, (blocks, 8), np.uint8)
    low, high = s[:, :4], s[:, 4:]
    first = low | (high >> 4) << 6
    last = (high & 15) | (high & 15) << 4
    return np.hstack([factors, first, first, last, _random(rng, blocks, 128)])


def _q6_k(rng: np.random.Generator, blocks: int, deviation: float) -> NDArray[np.uint8]:
    # d s (q - 32), q uniform in 0 to 63, s of either sign and 32 to 127 in size: 1530 d.
    s = rng.integers(32, 128, (blocks, 16), np.int16) * rng.choice([-1, 1], (blocks, 16))
    scales = _scales(rng, blocks, deviation / 1530).view(np.uint8)
    return np.hstack([_random(rng, blocks, 192), s.astype(np.int8).view(np.uint8), scales])


def _normal(rng: np.random.Generator, count: int, deviation: float) -> NDArray[np.float32]:
    return rng.standard_normal(count, np.float32) * np.float32(deviation)


def _f32(rng: np.random.Generator, count: int, deviation: float) -> NDArray:
    return _normal(rng, count, deviation)


def _f16(rng: np.random.Generator, count: int, deviation: float) -> NDArray:
    return _normal(rng, count, deviation).astype(np.float16)


def _bf16(rng: np.random.Generator, count: int, deviation: float) -> NDArray:
    return (_normal(rng, count, deviation).view(np.uint32) >> 16).astype(np.uint16)


_BLOCKS: dict[Type, Callable[[np.random.Generator, int, float], NDArray]] = {
    Type.F32: _f32,
    Type.F16: _f16,
    Type.BF16: _bf16,
    Type.Q4_0: _q4_0,
    Type.Q8_0: _q8_0,
    Type.Q4_K: _q4_k,
    Type.Q6_K: _q6_k,
}


def _data(tensor: Tensor, rng: np.random.Generator) -> Iterator[NDArray]:
    """The bytes of a tensor, a few MiB at a time."""
    if tensor.name == "rope_freqs.weight":
        yield _rope_divisors()
        return
    if len(tensor.shape) == 1:
        yield rng.uniform(0.5, 1.5, tensor.elements).astype(np.float32)
        return
    # Rows of unit length keep the size of what they multiply; the router's are longer, for clear
    # choices.
    deviation = (4 if "ffn_gate_inp" in tensor.name else 1) / math.sqrt(tensor.shape[-1])
    if tensor.name == "token_embd.weight":
        deviation = 1.0
    block, _ = gguf.GGML_QUANT_SIZES[tensor.type]
    blocks = tensor.elements // block
    step = (1 << 22) // block
    for first in range(0, blocks, step):
        yield _BLOCKS[tensor.type](rng, min(step, blocks - first), deviation)


def _rope_divisors() -> NDArray[np.float32]:
    """What Scout divides its frequencies by: 16 where waves exceed the original context."""
    wavelengths = 2 * math.pi * 500_000.0 ** (np.arange(0, HEAD, 2) / HEAD)
    return np.where(wavelengths > 8192, 16.0, 1.0).astype(np.float32)


# --- metadata -----------------------------------------------------------------------------------

_SPECIAL = ["begin_of_text", "end_of_text", "header_start", "header_end", "eom", "eot"]
_SPECIAL += ["finetune_right_pad", "image_start", "image_end", "tile_x_separator"]
_SPECIAL += ["tile_y_separator", "image", "patch"]
_SPECIAL_COUNT = 128


def _byte_characters() -> list[str]:
    """The characters that stand for bytes in a byte-level BPE vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _vocabulary(size: int) -> tuple[list[str], list[str], list[int]]:
    """Tokens, merges and token types: bytes, pairs of bytes, special tokens at the end."""
    characters = _byte_characters()
    letters = [characters[byte] for byte in range(33, 127)]
    pairs = [(a, b) for a in letters for b in letters][: size - 256 - _SPECIAL_COUNT]
    special = [f"<|{name}|>" for name in _SPECIAL]
    special += [f"<|reserved_special_token_{i}|>" for i in range(_SPECIAL_COUNT - len(special))]
    tokens = [*characters, *(a + b for a, b in pairs), *special]
    if len(tokens) != size:
        raise ValueError(f"a vocabulary of {size} cannot be made of bytes and their pairs")
    normal, control = int(gguf.TokenType.NORMAL), int(gguf.TokenType.CONTROL)
    types = [normal] * (size - _SPECIAL_COUNT) + [control] * _SPECIAL_COUNT
    return tokens, [f"{a} {b}" for a, b in pairs], types


def normal_tokens(slice_: Slice) -> int:
    """Ids below this are text; the rest are special."""
    return slice_.vocabulary - _SPECIAL_COUNT


def _add_metadata(writer: gguf.GGUFWriter, slice_: Slice) -> None:
    family = slice_.family
    writer.add_name(f"synthetic Llama 4 {slice_.model}, {slice_.layers} layers")
    writer.add_block_count(slice_.layers)
    writer.add_context_length(family.context)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(DENSE_WIDTH)
    writer.add_expert_feed_forward_length(EXPERT_WIDTH)
    writer.add_expert_count(family.experts)
    writer.add_expert_used_count(1)
    writer.add_interleave_moe_layer_step(family.moe_step)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500_000.0)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(slice_.vocabulary)
    tokens, merges, types = _vocabulary(slice_.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama4")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokens.index("<|begin_of_text|>"))
    writer.add_eos_token_id(tokens.index("<|eot|>"))
    writer.add_pad_token_id(tokens.index("<|finetune_right_pad|>"))
    writer.add_add_bos_token(True)


# --- writing ------------------------------------------------------------------------------------


def write(slice_: Slice, directory: Path) -> Path:
    """Writes the file into `directory` unless it is there, and returns its path."""
    path = directory / slice_.file_name
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    tensors = slice_.tensors()
    total = sum(tensor.bytes for tensor in tensors)
    space = os.statvfs(directory)
    if (free := space.f_bavail * space.f_frsize) < total + (1 << 28):
        raise OSError(
            f"{path} takes {total / 1e9:.1f} GB; {directory} has {free / 1e9:.1f} GB free"
        )
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "llama4")
    _add_metadata(writer, slice_)
    for tensor in tensors:
        # The dtype is not looked at where a type is given, unless it is uint8.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float16), tensor.bytes, tensor.type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    rng = np.random.Generator(np.random.SFC64(4))
    with part.open("ab") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % ALIGNMENT))
            start = file.tell()
            for piece in _data(tensor, rng):
                file.write(piece.tobytes())
            if file.tell() - start != tensor.bytes:
                raise AssertionError(
                    f"{tensor.name} has {file.tell() - start} bytes, not {tensor.bytes}"
                )
        file.write(bytes(-file.tell() % ALIGNMENT))
    part.rename(path)
    return path


def main() -> None:
    """Writes one slice and prints its path."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=FAMILIES)
    parser.add_argument("--type", choices=RECIPES, default="Q4_0")
    parser.add_argument("--layers", type=int, help="default: 4")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    layers = arguments.layers or FAMILIES[arguments.model].layers
    print(write(Slice(arguments.model, arguments.type, layers), arguments.out))


if __name__ == "__main__":
    main()
