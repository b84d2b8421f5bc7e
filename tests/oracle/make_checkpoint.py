"""Writes tiny random checkpoints in the layout of Hugging Face, with NumPy alone.

Each tensor's values follow from its name and the seed, so a checkpoint needs no storage: golden
logits are kept beside a config.json and a seed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import random_bits, tiny
from .reference import moe_layers, round_to_bfloat16


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the checkpoint that config.json describes."""
    multimodal = "text_config" in config
    shapes = _text_shapes(config.get("text_config", config), "language_model." * multimodal)
    if multimodal:
        shapes |= _vision_shapes(config["vision_config"], config["text_config"]["hidden_size"])
    return shapes


def _text_shapes(text: Mapping[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    q = text["num_attention_heads"] * text["head_dim"]
    kv = text["num_key_value_heads"] * text["head_dim"]
    experts, expert_width = text["num_local_experts"], text["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, hidden),
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }

    def mlp(name: str, width: int) -> None:
        shapes[f"{name}.gate_proj.weight"] = (width, hidden)
        shapes[f"{name}.up_proj.weight"] = (width, hidden)
        shapes[f"{name}.down_proj.weight"] = (hidden, width)

    for i in range(text["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (q, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, q)
        if i in moe_layers(text):
            shapes[f"{layer}.feed_forward.router.weight"] = (experts, hidden)
            # Unlike all others these are stored [in, out], gate columns before up columns.
            shapes[f"{layer}.feed_forward.experts.gate_up_proj"] = (
                experts,
                hidden,
                2 * expert_width,
            )
            shapes[f"{layer}.feed_forward.experts.down_proj"] = (experts, expert_width, hidden)
            mlp(f"{layer}.feed_forward.shared_expert", expert_width)
        else:
            mlp(f"{layer}.feed_forward", text["intermediate_size_mlp"])
    return {prefix + name: shape for name, shape in shapes.items()}


def _vision_shapes(vision: Mapping[str, Any], text_hidden: int) -> dict[str, tuple[int, ...]]:
    hidden, width = vision["hidden_size"], vision["intermediate_size"]
    patch = vision["patch_size"]
    patches = (vision["image_size"] // patch) ** 2
    shuffled = int(hidden / vision["pixel_shuffle_ratio"] ** 2)
    shapes: dict[str, tuple[int, ...]] = {
        "vision_model.class_embedding": (hidden,),
        "vision_model.positional_embedding_vlm": (patches + 1, hidden),
        "vision_model.patch_embedding.linear.weight": (hidden, 3 * patch * patch),
        "vision_model.vision_adapter.mlp.fc1.weight": (vision["projector_input_dim"], shuffled),
        "vision_model.vision_adapter.mlp.fc2.weight": (
            vision["projector_output_dim"],
            vision["projector_input_dim"],
        ),
        "multi_modal_projector.linear_1.weight": (text_hidden, vision["vision_output_dim"]),
    }

    def with_bias(name: str, shape: tuple[int, ...]) -> None:
        shapes[f"vision_model.{name}.weight"] = shape
        shapes[f"vision_model.{name}.bias"] = shape[:1]

    with_bias("layernorm_pre", (hidden,))
    with_bias("layernorm_post", (hidden,))
    for i in range(vision["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            with_bias(f"{layer}.self_attn.{projection}", (hidden, hidden))
        with_bias(f"{layer}.mlp.fc1", (width, hidden))
        with_bias(f"{layer}.mlp.fc2", (hidden, width))
        with_bias(f"{layer}.input_layernorm", (hidden,))
        with_bias(f"{layer}.post_attention_layernorm", (hidden,))
    return shapes


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 values for all tensors.

    Larger than a network's usual first values: products keep the size of their input, so a mistake
    anywhere moves the logits by tenths.
    """
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = random_bits.normal(name, seed, shape)
        if "norm" in name and name.endswith("weight"):
            values = 1 + np.float32(0.2) * values
        elif len(shape) == 1:
            values = np.float32(0.3) * values
        else:
            inputs = shape[-2] if "experts" in name else shape[-1]
            values = values / np.float32(inputs) ** np.float32(0.5)
        tensors[name] = values.astype(np.float32)
    return tensors


@dataclass(frozen=True)
class Stored:
    """A tensor as a safetensors file holds it."""

    dtype: str  # "F32", "BF16", "F16", ...
    shape: tuple[int, ...]
    data: bytes

    @staticmethod
    def of(values: np.ndarray, dtype: str) -> Stored:
        """`values` rounded to "float32", "bfloat16" or "float16"."""
        if dtype == "bfloat16":
            bits = round_to_bfloat16(values).astype("<f4").view("<u4") >> 16
            return Stored("BF16", values.shape, bits.astype("<u2").tobytes())
        kind, code = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2")}[dtype]
        return Stored(kind, values.shape, values.astype(code).tobytes())

    def values(self) -> np.ndarray:
        """What the stored bytes mean, as float32."""
        if self.dtype == "BF16":
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        code = {"F32": "<f4", "F16": "<f2"}[self.dtype]
        return np.frombuffer(self.data, code).astype(np.float32).reshape(self.shape)


def safetensors_bytes(header: Mapping[str, Any], data: bytes) -> bytes:
    """A safetensors file: the length of the header, the header padded to 8 bytes, the data."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Writes tensors one after another, in the order of the mapping."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(tensor.data)],
        }
        data += tensor.data
    path.write_bytes(safetensors_bytes(header, data))


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    seed: int,
    *,
    dtype: str = "float32",
    shards: int = 1,
    tokenizer: bool = False,
) -> dict[str, np.ndarray]:
    """Writes config.json and the weights; returns the tensors as a reader must see them (float32).

    With several shards there is an index and the tensors are dealt out in turn, so that those of a
    layer lie in different files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    random = random_tensors(config, seed)
    stored = {name: Stored.of(values, dtype) for name, values in random.items()}
    if shards == 1:
        write_safetensors(directory / "model.safetensors", stored)
    else:
        names = list(stored)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            write_safetensors(directory / file, {name: stored[name] for name in names[i::shards]})
            weight_map |= dict.fromkeys(names[i::shards], file)
        total = sum(len(tensor.data) for tensor in stored.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        write_tokenizer(directory)
    return {name: tensor.values() for name, tensor in stored.items()}


# Pre-tokenisation of Llama 4 (the pattern known as o200k).
_CASE_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERN = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CASE_SUFFIX}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CASE_SUFFIX}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_MERGES = (
    *("t h", "th e", "i n", "e r", "Ġ a", "Ġ the", "o n", "r e", "a t", "e n", "Ġ o", "s t"),
    *("in g", "o r", "e s", "Ġ s", "Ġ w", "Ġ in", "a n", "an d", "Ġ and", "o u", "l l", "Ġ Ġ"),
)


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level tokenizer.json: bytes, a few merges, and the special tokens of `tiny`."""
    # The printable alphabet of byte-level BPE: bytes that print stand for themselves, the others
    # for the characters from U+0100 on.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(len(others))]
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet)}
    for merge in _MERGES:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    # The tokenizers library numbers special tokens on from here, whatever id they are given.
    assert len(vocabulary) == tiny.FIRST_SPECIAL
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": True} for name, i in tiny.SPECIAL.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in _MERGES],
        },
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
