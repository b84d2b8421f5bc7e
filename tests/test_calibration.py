"""Calibration: what a text tells the quantiser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, TinyCheckpoint
from oracle.make_checkpoint import Stored, write_safetensors
from puna.cli import main


def loud_checkpoint(made: TinyCheckpoint, folder: Path) -> Path:
    """The checkpoint with four channels of the residual stream four times as loud to all that
    reads it, as a few channels of trained networks are."""
    folder.mkdir()
    stored = {}
    for name, values in made.tensors.items():
        louder = values.copy()
        if "vision" not in name and name.endswith(("layernorm.weight", "model.norm.weight")):
            louder[[3, 20, 41, 60]] *= 4
        stored[name] = Stored.of(louder, "bfloat16")
    write_safetensors(folder / "model.safetensors", stored)
    (folder / "config.json").write_text(json.dumps(made.config))
    return folder


@pytest.mark.parametrize("quant", ["int4_64", "int4_min_32"])
def test_a_text_lowers_the_distance_on_other_texts(
    checkpoint: MakeCheckpoint, tmp_path: Path, quant: str
) -> None:
    # Without experts, so that none is chosen by a hair.
    source = loud_checkpoint(checkpoint("guard_like", dtype="bfloat16"), tmp_path / "source")
    random = np.random.default_rng(1)
    calibration, held_out = (random.integers(0, 270, 4000).tolist() for _ in range(2))
    distances = []
    with puna.load(source, progress=False) as reference:
        for name, ids in (("plain", None), ("calibrated", calibration)):
            out = tmp_path / name
            puna.quantize(source, out, quant=quant, calibration=ids, progress=False)
            with puna.load(out, progress=False) as llm:
                found = puna.evaluate(llm, held_out, reference=reference, progress=False)
            assert found.comparison is not None
            distances.append(found.comparison.kl_mean)
    assert distances[1] < 0.85 * distances[0]


def test_the_command(demo_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a fox.<|eot|>" * 20)
    quantise = ["quantize", str(demo_checkpoint), "--quant", "int4_64"]
    packed = []
    for more in ([], ["--calibration", str(text)], ["--calibration", str(text), "--special"]):
        out = tmp_path / str(len(packed))
        assert main([*quantise, str(out), *more]) == 0
        packed.append((out / "model.safetensors").read_bytes())
    assert len(set(packed)) == 3
    assert len({len(data) for data in packed}) == 1


def test_threads_do_not_matter(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("scout_like", dtype="bfloat16", tokenizer=True).path
    text = "One day a fox went to the old mill. " * 40
    files = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        puna.quantize(source, out, quant="int4", calibration=text, threads=threads, progress=False)
        files.append((out / "model.safetensors").read_bytes())
    puna.quantize(source, tmp_path / "plain", quant="int4", progress=False)
    assert files[0] == files[1]
    assert files[0] != (tmp_path / "plain" / "model.safetensors").read_bytes()
    ids = puna.Tokenizer.from_file(str(source)).encode(text)
    puna.quantize(source, tmp_path / "ids", quant="int4", calibration=ids, progress=False)
    assert (tmp_path / "ids" / "model.safetensors").read_bytes() == files[0]


@pytest.mark.parametrize("variant", ["maverick_like", "guard_like", "top2", "text_only"])
def test_every_kind_of_layer(checkpoint: MakeCheckpoint, tmp_path: Path, variant: str) -> None:
    source = checkpoint(variant, dtype="bfloat16").path
    ids = list(range(1, 200))
    puna.quantize(source, tmp_path / "m", quant="int8", calibration=ids, progress=False)
    with puna.load(tmp_path / "m", progress=False) as llm:
        assert puna.evaluate(llm, ids, progress=False).tokens == len(ids)


def test_refusals(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("scout_like", dtype="bfloat16", tokenizer=True).path

    def quantise(out: str, calibration: object) -> None:
        puna.quantize(
            source,
            tmp_path / out,
            quant="int4",
            calibration=calibration,  # type: ignore[arg-type]
            progress=False,
        )

    with pytest.raises(puna.InvalidRequest, match="the calibration text has no tokens"):
        quantise("a", "")
    with pytest.raises(puna.InvalidRequest, match=r"calibration\[1\] is 'x'"):
        quantise("a", [1, "x"])
    with pytest.raises(puna.InvalidRequest, match="320 is outside the vocabulary of 320"):
        quantise("a", [1, 320])
    assert not list((tmp_path / "a").glob("*"))
    quantise("b", None)
    with pytest.raises(puna.InvalidRequest, match="exists"):  # said before the text is run
        quantise("b", [320])
