"""Takes puna's packed form apart: matrices and vectors in fp32, and a Hugging Face directory again.

`python -m tools.demo_model.packed --model python/puna/demo --out build/demo-hf` writes what the
shipped file holds as a checkpoint in float32 that `transformers` reads and training goes on from.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
PANEL = 64  # rows; docs/formats.md and csrc/quant/panel.h describe the layouts


def read_packed(file: Path) -> dict[str, Array]:
    """Every matrix and vector of a packed model.safetensors, by puna's names, as stored."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    described = json.loads(header.pop("__metadata__")["puna"])
    if described["version"] not in (1, 2):
        raise ValueError(f"{file} is packed in version {described['version']}, expected 1 or 2")
    tensors: dict[str, Array] = {}
    for name, entry in header.items():
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(data[begin:end], np.uint8)
        if name in described["matrices"]:
            shape = described["matrices"][name]
            tensors[name] = _matrix(raw, shape["format"], shape["rows"], shape["cols"])
        elif name in described["vectors"]:
            tensors[name] = raw.view(np.float32)[: described["vectors"][name]]
        else:
            tensors[name] = _floats(raw, entry["dtype"]).reshape(entry["shape"])
    return tensors


def _matrix(raw: NDArray[np.uint8], kind: str, rows: int, cols: int) -> Array:
    panels = -(-rows // PANEL)
    if kind == "fp32":
        values = raw.view(np.float32)[: panels * cols * PANEL].reshape(panels, cols, PANEL)
        return values.transpose(0, 2, 1).reshape(-1, cols)[:rows]
    if kind == "bf16":
        pairs = -(-cols // 2)
        words = raw.view(np.uint16)[: panels * pairs * PANEL * 2]
        values = _of_bfloat16(words).reshape(panels, pairs, PANEL, 2)
        return values.transpose(0, 2, 1, 3).reshape(-1, 2 * pairs)[:rows, :cols]
    if kind in ("int8", "int4_32"):
        return _of_codes(raw, 8 if kind == "int8" else 4, panels, cols)[:rows]
    raise ValueError(f"matrices in {kind} are not taken apart here")


def _of_codes(raw: NDArray[np.uint8], bits: int, panels: int, cols: int) -> Array:
    """Blocks of 32 columns: 64 scales in fp16, then four slabs of 16 rows."""
    blocks, scale_bytes, slab_bytes = -(-cols // 32), 2 * PANEL, 64 * bits
    block_bytes = scale_bytes + 4 * slab_bytes
    whole = raw[: panels * blocks * block_bytes].reshape(panels, blocks, block_bytes)
    scales = np.ascontiguousarray(whole[:, :, :scale_bytes]).view(np.float16).astype(np.float32)
    planes = whole[:, :, scale_bytes:].reshape(panels, blocks, 4, bits, 64)
    if bits == 4:  # vectors 0-3 in the lower halves of the bytes, 4-7 in the upper ones
        planes = np.concatenate((planes & 15, planes >> 4), axis=3)
    codes = planes.reshape(panels, blocks, 4, 8, 16, 4).astype(np.float32) - 2 ** (bits - 1)
    # [panel, block, slab, vector, row, column] to [panel, slab, row, block, vector, column].
    values = codes.transpose(0, 2, 4, 1, 3, 5).reshape(panels * PANEL, blocks, 32)
    factors = scales.transpose(0, 2, 1).reshape(panels * PANEL, blocks, 1)
    return (values * factors).reshape(panels * PANEL, -1)[:, :cols]


def _floats(raw: NDArray[np.uint8], dtype: str) -> Array:
    return _of_bfloat16(raw.view(np.uint16)) if dtype == "BF16" else raw.view(np.float32)


def _of_bfloat16(words: NDArray[np.uint16]) -> Array:
    return (words.astype(np.uint32) << 16).view(np.float32)


def named_tensors(packed: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    """The same under the names and in the layouts of transformers."""
    text, vision = config["text_config"], config["vision_config"]
    named = {
        "language_model.model.embed_tokens.weight": packed["embed_tokens"],
        "language_model.model.norm.weight": packed["norm"],
        "language_model.lm_head.weight": packed["lm_head"],
    }
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    for i in range(text["num_hidden_layers"]):
        own, layer = f"layers.{i}.", f"language_model.model.layers.{i}."
        named[layer + "input_layernorm.weight"] = packed[own + "input_norm"]
        named[layer + "post_attention_layernorm.weight"] = packed[own + "post_norm"]
        qkv = np.split(packed[own + "attention.qkv"], (queries, queries + keys))
        parts = (*qkv, packed[own + "attention.output"])
        for part, value in zip("qkvo", parts, strict=True):
            named[f"{layer}self_attn.{part}_proj.weight"] = value
        ffn = layer + "feed_forward."
        named[ffn + "router.weight"] = packed[own + "router"]
        for part in ("gate_up", "down"):
            experts = [
                packed[f"{own}experts.{e}.{part}"].T for e in range(text["num_local_experts"])
            ]
            named[f"{ffn}experts.{part}_proj"] = np.stack(experts)
        gate, up = np.split(packed[own + "shared_expert.gate_up"], 2)
        named[ffn + "shared_expert.gate_proj.weight"] = gate
        named[ffn + "shared_expert.up_proj.weight"] = up
        named[ffn + "shared_expert.down_proj.weight"] = packed[own + "shared_expert.down"]
    named |= {f"vision_model.{name}": value for name, value in _vision(packed, vision).items()}
    named["multi_modal_projector.linear_1.weight"] = packed["vision.projector"]
    return {name: np.ascontiguousarray(value) for name, value in named.items()}


def _vision(packed: Mapping[str, Array], config: Mapping[str, Any]) -> dict[str, Array]:
    hidden = config["hidden_size"]
    named = {
        "class_embedding": packed["vision.class_embedding"],
        "positional_embedding_vlm": packed["vision.positions"].reshape(-1, hidden),
        "patch_embedding.linear.weight": packed["vision.patch_embedding"],
        "vision_adapter.mlp.fc1.weight": packed["vision.adapter.fc1"],
        "vision_adapter.mlp.fc2.weight": packed["vision.adapter.fc2"],
    }
    with_bias = {"layernorm_pre": "pre_norm", "layernorm_post": "post_norm"}
    for i in range(config["num_hidden_layers"]):
        own, layer = f"layers.{i}.", f"model.layers.{i}."
        with_bias[layer + "input_layernorm"] = own + "input_norm"
        with_bias[layer + "post_attention_layernorm"] = own + "post_norm"
        with_bias[layer + "self_attn.o_proj"] = own + "attention.output"
        with_bias[layer + "mlp.fc1"], with_bias[layer + "mlp.fc2"] = (
            own + "mlp.fc1",
            own + "mlp.fc2",
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            qkv = np.split(packed[f"vision.{own}attention.qkv{suffix}"], 3)
            for part, value in zip("qkv", qkv, strict=True):
                named[f"{layer}self_attn.{part}_proj.{kind}"] = value
    for name, own in with_bias.items():
        named[name + ".weight"] = packed["vision." + own]
        named[name + ".bias"] = packed[f"vision.{own}_bias"]
    return named


def safetensors(tensors: Mapping[str, Array]) -> bytes:
    """The bytes of a safetensors file in float32."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    parts = (tensor.astype("<f4").tobytes() for tensor in tensors.values())
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def unpack(model: Path, out: Path) -> None:
    """Writes the Hugging Face directory in float32."""
    config = json.loads((model / "config.json").read_text())
    tensors = named_tensors(read_packed(model / "model.safetensors"), config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").write_bytes(safetensors(tensors))
    (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    for file in ("generation_config.json", "tokenizer_config.json", "tokenizer.model"):
        shutil.copy(model / file, out)
    shutil.copy(model / "chat_template.jinja", out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a packed directory")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    unpack(options.model, options.out)


if __name__ == "__main__":
    main()
