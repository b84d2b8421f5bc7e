"""Weights are held once: peak memory of loading and quantising, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint
from oracle import tiny
from oracle.make_checkpoint import safetensors_bytes, tensor_shapes
from oracle.make_gguf import Type, write_gguf

MIB = 1 << 20

# About 400 MB in bfloat16, the largest matrix 16 MiB. No vision tower, a small vocabulary.
TEXT = tiny.MIXED_TEXT | {
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "intermediate_size_mlp": 2048,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_local_experts": 4,
    "interleave_moe_layer_step": 1,
}
CONFIG = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], **TEXT}
LARGEST = 2 * 2048 * 2048 * 2  # bytes of gate_up of an expert


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint: every tensor begins with the same random numbers."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    random = np.random.default_rng(1).standard_normal(1 << 20, dtype=np.float32) / 45
    block = (random.view(np.uint32) >> 16).astype("<u2").tobytes()
    header: dict[str, Any] = {}
    end = 0
    for name, shape in tensor_shapes(CONFIG).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    with (directory / "model.safetensors").open("wb") as file:
        file.write(safetensors_bytes(header, b""))
        for entry in header.values():
            begin, stop = entry["data_offsets"]
            size = stop - begin
            file.write(block * (size // len(block)) + block[: size % len(block)])
    assert 380 * MIB < end < 440 * MIB
    return directory


MEASURE = """
import json, sys
import puna

def status(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024

before = status("VmHWM")
{work}
print(json.dumps({{"grown": status("VmHWM") - before, "result": result}}))
"""
LOAD = """
llm = puna.load(sys.argv[1], quant={quant!r}, context=64, threads=2, progress=False)
result = llm.plan.weight_bytes
"""
QUANTIZE = """
puna.quantize(sys.argv[1], sys.argv[2], quant={quant!r}, threads=2, progress=False)
result = 0
"""


def measure(work: str, *arguments: Path) -> tuple[int, int]:
    """By how many bytes the peak of resident memory grew, and the bytes that are to be kept."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(work=work), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    return found["grown"], found["result"]


# The matrix at hand as it is stored and as it is being packed, rounded up to huge pages, and the
# lanes' scratch: three of the largest matrices in all, of the 24 that the checkpoint has.
FEW = 3 * LARGEST


@pytest.mark.parametrize("quant", [None, "int8", "fp8"])
def test_loading_holds_weights_once(large: Path, quant: str | None) -> None:
    grown, result = measure(LOAD.format(quant=quant), large)
    assert result > 90 * MIB
    assert grown <= result + FEW, f"{grown / MIB:.0f} MiB for {result / MIB:.0f}"


def test_quantising_holds_a_few_tensors(large: Path, tmp_path: Path) -> None:
    grown, _ = measure(QUANTIZE.format(quant="int8"), large, tmp_path / "packed")
    assert grown <= FEW, f"{grown / MIB:.0f} MiB"
    # The packed form lies in the file; what was read of it counts, and nothing besides.
    grown, result = measure(LOAD.format(quant=None), tmp_path / "packed")
    assert grown <= result + FEW


def test_a_gguf_file_is_held_once(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 1}
    random = np.random.default_rng(2).standard_normal(1 << 20, dtype=np.float32) / 45
    tensors = {name: np.resize(random, shape) for name, shape in tensor_shapes(config).items()}
    write_gguf(tmp_path / "model.gguf", config, tensors, type_of=lambda _: Type.Q8_0)
    grown, result = measure(LOAD.format(quant=None), tmp_path / "model.gguf")
    assert result > 60 * MIB
    assert grown <= result + FEW, f"{grown / MIB:.0f} MiB for {result / MIB:.0f}"


def test_the_budget_counts_what_is_packed(checkpoint: MakeCheckpoint) -> None:
    """`memory=` between the quantised size and the stored one: refused before a weight is read."""
    path = checkpoint("guard_like", dtype="bfloat16").path
    with puna.load(path, progress=False) as llm:
        stored = llm.plan.weight_bytes
    with puna.load(path, quant="int4", progress=False) as llm:
        small = llm.plan.weight_bytes
    room = 4 * MIB  # for the KV cache
    assert small < stored
    with pytest.raises(puna.OutOfMemory, match=r"memory=") as caught:
        puna.load(path, memory=stored - 1, progress=False)
    assert "the weights need" in str(caught.value) and "KiB" in str(caught.value)
    with puna.load(path, quant="int4", memory=small + room, context=64, progress=False) as llm:
        assert llm.plan.weight_bytes == small
    with pytest.raises(puna.OutOfMemory):
        puna.load(path, quant="int4", memory=small - 1, context=64, progress=False)
