"""What `puna inspect` and load() say about models of the true size, on files without contents.

Sparse files have the length of a real checkpoint and no blocks on disk; the headers are true. The
parameter counts were computed from transformers' modules, and agree with the published sizes.
"""

from __future__ import annotations

import json
import struct
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest

import puna
from oracle.make_checkpoint import tensor_shapes
from puna import _core
from puna.cli import main

GIB = 1 << 30
SHARD_BYTES = 48 * GIB

TEXT: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layers": [],
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": 4,
    "max_position_embeddings": 10485760,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
VISION: dict[str, Any] = {
    "model_type": "llama4_vision_model",
    "hidden_size": 1408,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "intermediate_size": 5632,
    "image_size": 336,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "vision_output_dim": 4096,
}


def config(**text: Any) -> dict[str, Any]:
    return {
        "model_type": "llama4",
        "image_token_index": 200092,
        "torch_dtype": "bfloat16",
        "text_config": TEXT | text,
        "vision_config": VISION,
    }


SCOUT = config()
MAVERICK = config(
    num_local_experts=128,
    interleave_moe_layer_step=2,
    use_qk_norm=False,
    rope_scaling=None,
    max_position_embeddings=1048576,
)
GUARD = config(
    num_local_experts=0,
    interleave_moe_layer_step=0,
    moe_layers=[],
    intermediate_size_mlp=8192,
    attention_chunk_size=None,
    no_rope_layers=[1] * 48,
    max_position_embeddings=8192,
)
# Tensors of the vision tower and the projector together.
VISION_PARAMETERS = 850_960_896 + 20_971_520


def write_sparse(directory: Path, config: dict[str, Any]) -> None:
    """config.json, and shards that hold true headers in front of holes."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(
        config
        | {
            "text_config": {
                "moe_layers": moe_layers(config["text_config"]),
                **config["text_config"],
            }
        }
    )
    shards: list[dict[str, Any]] = [{}]
    sizes = [0]
    for name, shape in shapes.items():
        count = 2 * prod(shape)
        if sizes[-1] and sizes[-1] + count > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        offsets = [sizes[-1], sizes[-1] + count]
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        sizes[-1] += count
    weight_map = {}
    for i, (header, size) in enumerate(zip(shards, sizes, strict=True)):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(directory / name, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            try:
                file.truncate(8 + len(text) + size)
            except OSError as error:
                pytest.skip(f"this file system has no sparse files of {size} bytes: {error}")
        weight_map |= dict.fromkeys(header, name)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    written = sum(file.stat().st_blocks * 512 for file in directory.iterdir())
    assert written < GIB // 16, "the files are not sparse"


def moe_layers(text: dict[str, Any]) -> list[int]:
    step = text["interleave_moe_layer_step"]
    return list(range(step - 1, text["num_hidden_layers"], step)) if step else []


@pytest.fixture(scope="module")
def scout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "scout"
    write_sparse(path, SCOUT)
    return path


def test_scout(scout: Path) -> None:
    report = _core.inspect(str(scout))
    assert report["parameters"] == 108_641_793_536
    # Attention, norms, router, shared and one routed expert of each layer; embedding, head, norm.
    layer = 62_914_560 + 10_240 + 81_920 + 2 * 125_829_120
    active = 48 * layer + 2 * 1_034_485_760 + 5120
    assert report["active_parameters"] == active == 17_172_894_720
    assert (report["layers"], report["moe_layers"], report["experts"], report["top_k"]) == (
        48,
        48,
        16,
        1,
    )
    assert (report["chunked_layers"], report["chunk"]) == (36, 8192)
    assert report["max_context"] == 10_485_760
    assert (report["image_size"], report["tokens_per_tile"]) == (336, 144)
    assert report["dtype"] == "bfloat16"
    assert len(report["tensors"]) == len(
        tensor_shapes(SCOUT | {"text_config": TEXT | {"moe_layers": list(range(48))}})
    )


def test_memory_of_scout(scout: Path) -> None:
    report = _core.inspect(str(scout))
    # 8 heads, keys and values, 128 channels, 2 bytes: 4,096 bytes for each of the 12 global layers.
    assert report["kv_bytes_per_token"] == 12 * 4096 == 49_152
    assert report["kv_fixed_bytes"] == 36 * 8192 * 4096  # 1.125 GiB
    # All matrices but the embedding, which stays in the file, and the vectors, which are small.
    matrices = report["parameters"] - 1_034_485_760
    # A router is fp32 in a panel of 64 rows, of which it has 16.
    routers = 48 * 64 * 5120 * 4
    assert 0.999 * 2 * matrices < report["weight_bytes"] <= 2 * matrices + routers
    memory = dict(report["memory"])
    assert list(memory) == [8192, 131_072, 2_097_152, 10_485_760]
    for context, needed in memory.items():
        assert needed == report["weight_bytes"] + report["kv_fixed_bytes"] + 49_152 * context
    assert memory[10_485_760] - memory[8192] == 480 * GIB - 8192 * 49_152


def test_maverick(tmp_path: Path) -> None:
    write_sparse(tmp_path / "maverick", MAVERICK)
    report = _core.inspect(str(tmp_path / "maverick"))
    assert report["parameters"] == 401_583_781_376
    layer = 62_914_560 + 10_240
    moe, dense = 655_360 + 2 * 125_829_120, 251_658_240
    active = 48 * layer + 24 * (moe + dense) + 2 * 1_034_485_760 + 5120
    assert report["active_parameters"] == active
    assert (report["moe_layers"], report["experts"]) == (24, 128)
    assert report["kv_bytes_per_token"] == 49_152


def test_guard(tmp_path: Path) -> None:
    write_sparse(tmp_path / "guard", GUARD)
    report = _core.inspect(str(tmp_path / "guard"))
    assert report["parameters"] == 12_001_097_216
    assert report["active_parameters"] == 12_001_097_216 - VISION_PARAMETERS
    assert (report["moe_layers"], report["chunked_layers"]) == (0, 0)
    assert report["kv_bytes_per_token"] == 48 * 4096
    assert report["kv_fixed_bytes"] == 0
    assert [context for context, _ in report["memory"]] == [8192]


def test_scout_is_refused_at_once_where_it_does_not_fit(scout: Path) -> None:
    """With the arithmetic, and without reading 200 GiB of holes."""
    weights = _core.inspect(str(scout))["weight_bytes"]
    start = time.monotonic()
    with pytest.raises(puna.OutOfMemory) as caught:
        puna.load(scout, memory="16G", progress=False)
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert f"{weights / GIB:.3g} GiB" in message and "16 GiB" in message and "memory=" in message
    # Without the tower less is needed, which the message must show.
    with pytest.raises(puna.OutOfMemory) as caught:
        puna.load(scout, memory="16G", progress=False, vision=False)
    assert f"{weights / GIB:.3g} GiB" not in str(caught.value)
    if _core.system()["memory_available"] < weights:
        with pytest.raises(puna.OutOfMemory, match="GiB"):
            puna.load(scout, progress=False)


def test_command_line(scout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(scout)]) == 0
    text = capsys.readouterr().out
    for part in ("108,641,793,536", "48 MoE (16 experts, top 1)", "36 chunked by 8192", "49,152"):
        assert part in text
    assert main(["inspect", "--json", str(scout)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["parameters"] == 108_641_793_536
    assert "tensors" not in report
    assert main(["inspect", "--json", "--tensors", str(scout)]) == 0
    tensors = json.loads(capsys.readouterr().out)["tensors"]
    assert ["language_model.lm_head.weight", "bfloat16", [202048, 5120]] in tensors
    assert main(["inspect", str(scout / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err
