"""Quantised weights end to end: on load, in the packed form, and what they cost in quality."""

from __future__ import annotations

import json
import resource
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, MakeEngine
from oracle import tiny
from puna.chat_template import find_template
from puna.demo.scene import draw, random_scene
from puna.demo.stories import story_request

FORMATS = ("int8", "fp8", "int4", "int4_64", "int4_128", "int4_min_32", "int5_32", "int5_min_32")
FORMATS += ("table4_32", "table4_64", "table4_128")
VARIANTS = ("scout_like", "maverick_like", "guard_like", "top2")
LOAD: dict[str, Any] = {"threads": 2, "device": "cpu", "progress": False}


def prompt_of(variant: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The last prompt of a variant: the one with images, where it has any."""
    v = tiny.VARIANTS[variant]
    prompt = v.prompts[-1]
    return v.tokens(prompt), v.pixels(prompt)


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_form_is_what_load_computes(
    checkpoint: MakeCheckpoint, tmp_path: Path, variant: str, quant: str
) -> None:
    source = checkpoint(variant, dtype="bfloat16").path
    tokens, pixels = prompt_of(variant)
    puna.quantize(source, tmp_path / "packed", quant=quant, progress=False)
    with puna.load(source, quant=quant, **LOAD) as llm:
        expected = llm.logits(tokens, pixels)
        assert np.array_equal(llm.logits(tokens, pixels, cuts=[1] * len(tokens)), expected)
    with puna.load(tmp_path / "packed", **LOAD | {"threads": 1}) as llm:
        assert np.array_equal(llm.logits(tokens, pixels), expected)
    # The reference keeps activations as they are: what differs is their rounding to 8 bits.
    with puna.load(tmp_path / "packed", device="ref", progress=False) as llm:
        exact = llm.logits(tokens, pixels)
    choices_kept = variant == "guard_like"  # without experts, no choice can flip
    if choices_kept:
        # The largest of 128 values is about 2.8 of a typical one: steps of 1/127 of it are noise of
        # 2.8 / 127 / sqrt(12) = 0.64 % in each of 33 products (4 in 8 layers, the head), 3.7 % of
        # all if they add up as independent.
        assert np.sqrt(np.mean((exact - expected) ** 2)) < 0.045 * np.std(exact)


def test_recipes_and_overrides(
    checkpoint: MakeCheckpoint, engine: MakeEngine, demo_checkpoint: Path
) -> None:
    source = checkpoint("guard_like").path
    tokens, _ = prompt_of("guard_like")
    with puna.load(source, quant={"default": "int8", "*": "stored"}, **LOAD) as llm:
        assert np.array_equal(llm.logits(tokens), engine("guard_like").logits(tokens))
    errors = []
    for quant in ("int8", {"default": "int8", "layers.0.*": "int4_32"}, "int4_32"):
        with puna.load(source, quant=quant, **LOAD) as llm:
            errors.append(np.std(llm.logits(tokens) - engine("guard_like").logits(tokens)))
    assert errors == sorted(errors)
    sizes = []
    for quant in ("int4_128", "int4", "int8", None):
        with puna.load(demo_checkpoint, quant=quant, progress=False) as llm:
            sizes.append(llm.plan.weight_bytes)
    assert sizes == sorted(sizes)


def divergence(exact: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence of next-token distributions, nats per token."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64)
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p, q = log_softmax(exact), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def test_quality_of_the_demo_model(demo_checkpoint: Path) -> None:
    with puna.load(demo_checkpoint, progress=False) as llm:
        conversations = []
        for animal in ("fox", "bear", "owl", "duck"):
            with llm.session() as session:
                session.chat(story_request(animal), temperature=0, max_tokens=120)
                conversations.append(session.tokens())
        exact = [llm.logits(tokens) for tokens in conversations]
    found = {}
    for quant in ("int8", "int4_min_32", "int4_32", "int4_128"):
        with puna.load(demo_checkpoint, quant=quant, progress=False) as llm:
            found[quant] = sum(map(divergence, exact, map(llm.logits, conversations))) / len(exact)
    assert found["int8"] < found["int4_min_32"] < found["int4_128"]
    assert found["int8"] < 0.01
    assert found["int4_32"] < 0.3


def test_the_demo_still_sees_in_four_bits(demo_checkpoint: Path) -> None:
    import random

    with puna.load(demo_checkpoint, quant="int4", progress=False) as llm:
        right = 0
        for seed in range(20):
            scene = random_scene(random.Random(seed))
            picture = draw(scene, llm.info.image_size)
            answer = llm.chat(
                "What is in this picture?", images=[picture], temperature=0, max_tokens=60
            )
            right += str(answer) == scene.caption()
    assert right >= 18


@pytest.mark.parametrize(
    ("quant", "kind", "named"),
    [
        ("int7", puna.InvalidRequest, ("int7", "int4_64")),
        ("int4_k", puna.UnsupportedError, ("int4_k", "int4_32")),
        ({"layers.*": "none"}, puna.InvalidRequest, ("none",)),
        ({"layers.1.experts.2.*": "int8"}, puna.UnsupportedError, ("layers.1.experts.2", "int8")),
        (4, puna.InvalidRequest, ("quant is 4",)),
    ],
)
def test_refused_recipes(
    demo_checkpoint: Path, quant: Any, kind: type[puna.Error], named: tuple[str, ...]
) -> None:
    with pytest.raises(kind) as caught:
        puna.load(demo_checkpoint, quant=quant, progress=False)
    assert all(part in str(caught.value) for part in named)


@pytest.fixture(scope="module")
def packed(checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint that tests copy."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    puna.quantize(checkpoint("scout_like").path, folder, quant="int4", progress=False)
    return folder


def test_outputs_that_are_in_use(checkpoint: MakeCheckpoint, packed: Path, tmp_path: Path) -> None:
    source = checkpoint("scout_like").path
    with pytest.raises(puna.InvalidRequest, match="exists"):
        puna.quantize(source, packed, quant="int4", progress=False)
    with pytest.raises(puna.InvalidRequest, match="own"):
        puna.quantize(source, source, quant="int4", progress=False)
    with pytest.raises(puna.InvalidRequest, match="packed form already"):
        puna.quantize(packed, tmp_path / "again", quant="int4", progress=False)
    with pytest.raises(puna.InvalidRequest, match="quantised already"):
        puna.load(packed, quant="int8", progress=False)
    with pytest.raises(puna.InvalidRequest, match="quant"):
        puna.quantize(source, tmp_path / "none", quant="", progress=False)
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(puna.InvalidRequest, match="cannot be made"):
        puna.quantize(source, tmp_path / "file", quant="int4", progress=False)


def test_an_interrupted_run_leaves_no_model(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        puna._core.quantize(
            path=str(checkpoint("scout_like").path),
            mmproj="",
            out=str(tmp_path),
            quant="int4",
            quant_overrides=[],
            threads=1,
            calibration=[],
            progress=stop,
            calibration_progress=None,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_a_write(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(puna.StorageError, match=r"partial cannot be written: File too large"):
            puna.quantize(
                checkpoint("scout_like").path, tmp_path / "model", quant="int4", progress=False
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_leaves_no_folder(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("scout_like").path
    with pytest.raises(puna.InvalidRequest, match="no weight format"):
        puna.quantize(source, tmp_path / "new" / "model", quant="int3", progress=False)
    with pytest.raises(puna.InvalidRequest, match=r"matches 'layer\.0"):
        quant = {"default": "int8", "layer.0.*": "int4_32"}
        puna.quantize(source, tmp_path / "new" / "model", quant=quant, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_being_written(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = checkpoint("scout_like").path
    refusals = []

    def quantize_too(done: int, total: int) -> None:
        if not refusals:
            with pytest.raises(puna.InvalidRequest, match="is being written by another") as caught:
                puna.quantize(source, tmp_path, quant="int8", progress=False)
            refusals.append(caught.value)

    quantize = {"quant": "int4", "quant_overrides": [], "threads": 1, "calibration": []}
    puna._core.quantize(
        path=str(source),
        mmproj="",
        out=str(tmp_path),
        progress=quantize_too,
        calibration_progress=None,
        **quantize,
    )
    assert refusals
    assert not (tmp_path / "model.safetensors.partial").exists()
    assert puna.plan(tmp_path).weight_bytes == puna.plan(source, quant="int4").weight_bytes


PATTERNS = {
    "a typing error": {"layer.0.*": "int8"},
    "a layer that is not there": {"layers.99.*": "int8"},
    "routers, which are never quantised": {"layers.*.router": "int8"},
    "the vision tower, which is not either": {"vision.*": "int8"},
    "one of several": {"layers.0.*": "int8", "lm_heads": "int8"},
}


@pytest.mark.parametrize("quant", PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns_that_match_nothing(checkpoint: MakeCheckpoint, quant: dict[str, str]) -> None:
    source = checkpoint("scout_like").path
    for call in (puna.load, puna.plan):
        options = {"progress": False} if call is puna.load else {}
        with pytest.raises(puna.InvalidRequest, match="no matrix of the model") as caught:
            call(source, quant={"default": "int4", **quant}, **options)
        assert caught.value.param == "quant"
        assert list(quant)[-1] in str(caught.value)


def test_the_vision_tower_is_never_quantised(checkpoint: MakeCheckpoint) -> None:
    plans = [puna.plan(checkpoint("scout_like").path, quant=q) for q in ("int8", {"*": "int8"})]
    assert plans[0].vision_bytes == plans[1].vision_bytes


def rewrite_metadata(folder: Path, change: Any) -> None:
    """Changes the form's metadata in place; the header keeps its length."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    form = json.loads(header["__metadata__"]["puna"])
    change(form)
    header["__metadata__"]["puna"] = json.dumps(form, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    data[8 : 8 + length] = text.ljust(length)
    path.write_bytes(data)


DAMAGE = {
    "version": (lambda f: f.update(version=3), puna.UnsupportedError, ("version 3",)),
    "older version": (
        lambda f: (f.update(version=1), f["matrices"]["lm_head"].update(format="int4_k")),
        puna.UnsupportedError,
        ("version 1", "lm_head", "int4_k", "again"),
    ),
    "format": (
        lambda f: f["matrices"]["lm_head"].update(format="int3"),
        puna.UnsupportedError,
        ("lm_head", "int3"),
    ),
    "rows": (
        lambda f: f["matrices"]["lm_head"].update(rows=1 << 29),
        puna.ModelFormatError,
        ("lm_head",),
    ),
    "negative": (
        lambda f: f["matrices"]["lm_head"].update(rows=-1),
        puna.ModelFormatError,
        ("lm_head", "-1"),
    ),
    "other shape": (
        lambda f: f["matrices"]["lm_head"].update(rows=7),
        puna.ModelFormatError,
        ("lm_head", "config.json"),
    ),
    "missing": (lambda f: f["matrices"].pop("lm_head"), puna.ModelFormatError, ("lm_head",)),
    "vector": (lambda f: f["vectors"].update(norm=3), puna.ModelFormatError, ("norm", "3")),
    "no list": (lambda f: f.update(matrices=[]), puna.ModelFormatError, ("matrices",)),
}


@pytest.mark.parametrize(("change", "kind", "named"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_packed_forms(
    packed: Path, tmp_path: Path, change: Any, kind: type[puna.Error], named: tuple[str, ...]
) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    rewrite_metadata(folder, change)
    for call in (puna.load, puna.plan):  # which adopts no weights
        with pytest.raises(kind) as caught:
            call(folder)
        assert all(part in str(caught.value) for part in named), str(caught.value)


def test_a_packed_form_with_more_than_its_config(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text["num_hidden_layers"] -= 1
    text["layer_types"] = text["moe_layers"] = text["no_rope_layers"] = None
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(puna.ModelFormatError, match=r"which config\.json does not ask for"):
        puna.load(folder, progress=False)


def test_templates_go_with_the_weights(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    source = Path(shutil.copytree(checkpoint("scout_like").path, tmp_path / "source"))
    (source / "chat_template.jinja").write_text("for chats")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("for tools")
    puna.quantize(source, tmp_path / "out", quant="int4", progress=False)
    found = find_template(tmp_path / "out")
    assert (found.source, found.tool_source) == ("for chats", "for tools")


def test_inspect_of_the_packed_form(packed: Path, checkpoint: MakeCheckpoint) -> None:
    plain = puna._core.inspect(str(checkpoint("scout_like").path))
    report = puna._core.inspect(str(packed))
    assert report["parameters"] == plain["parameters"]
    with puna.load(packed, progress=False) as llm:
        assert report["weight_bytes"] == llm.plan.weight_bytes
