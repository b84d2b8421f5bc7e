"""float8 e4m3: checkpoints in the forms that are published, `quant="fp8"`, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint
from oracle import float8, golden, tiny
from oracle.make_checkpoint import Stored, random_tensors, write_safetensors

Tensors = dict[str, Stored]
LOAD: dict[str, Any] = {"device": "cpu", "threads": 2, "progress": False, "kv": "fp32"}


class Form:
    """A float8 checkpoint as it is being made, and its twin with the weights multiplied out."""

    def __init__(self, variant: str) -> None:
        fixture = golden.load(variant)
        self.config = copy.deepcopy(fixture.config)
        self.plain = random_tensors(fixture.config, fixture.variant.seed)
        self.stored = {name: Stored.of(x, "float32") for name, x in self.plain.items()}

    def names(self, *ends: str) -> list[str]:
        """Tensors whose names end so, but those of the vision tower."""
        return [
            n for n in self.plain if n.endswith(ends) and "vision" not in n and "multi" not in n
        ]

    def put(self, name: str, codes: np.ndarray, scales: np.ndarray, scale_name: str) -> None:
        """Stores codes and scales in place of a tensor; scales as they are shaped."""
        self.stored[name] = Stored("F8_E4M3", codes.shape, codes.tobytes())
        self.stored[scale_name] = Stored.of(scales, "float32")

    def linear(self, name: str, axes: int | tuple[int, ...], shape: tuple[int, ...]) -> None:
        """A Linear's weight [out, in]; its scales stored in `shape`."""
        codes, scales = float8.quantise(self.plain[name], axes)
        self.plain[name] = float8.VALUES[codes] * scales
        self.put(name, codes, scales.reshape(shape), name + "_scale")

    def write(self, directory: Path) -> tuple[Path, Path]:
        """The checkpoint and its multiplied out twin."""
        config = copy.deepcopy(self.config)
        for part, tensors in (
            ("fp8", self.stored),
            ("plain", {name: Stored.of(x, "float32") for name, x in self.plain.items()}),
        ):
            (directory / part).mkdir()
            write_safetensors(directory / part / "model.safetensors", tensors)
            if part == "plain":
                config.pop("quantization_config", None)
            (directory / part / "config.json").write_text(json.dumps(config))
        return directory / "fp8", directory / "plain"


ATTENTION = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
FEED_FORWARD = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def fbgemm(form: Form) -> None:
    """Meta's own: routed experts only, one scale for each output, but not in the first layer."""
    form.config["quantization_config"] = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["vision_model", "lm_head", "self_attn", "router"],
    }
    for name in form.names("experts.gate_up_proj", "experts.down_proj"):
        if ".layers.1." in name:
            continue
        codes, scales = float8.quantise(form.plain[name], 1)
        form.plain[name] = float8.VALUES[codes] * scales
        shape = scales.shape if "gate_up" in name else (scales.shape[0], scales.shape[2], 1)
        form.put(name, codes, scales.reshape(shape), name + "_scale")


def compressed_tensors(form: Form) -> None:
    """Every expert a Linear of its own, scales bfloat16 [out, 1]; attention, too."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    }
    form.config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["language_model.lm_head"],
    }
    apart = {}
    for name in form.names("experts.gate_up_proj", "experts.down_proj"):
        del form.stored[name]
        base = name[: name.rindex(".")]
        for e, matrix in enumerate(form.plain[name]):
            halves = (
                {
                    "gate_proj": matrix.T[: len(matrix.T) // 2],
                    "up_proj": matrix.T[len(matrix.T) // 2 :],
                }
                if name.endswith("gate_up_proj")
                else {"down_proj": matrix.T}
            )
            done = []
            for part, weight in halves.items():
                codes, scales = float8.quantise(weight, 1)
                scales = Stored.of(scales, "bfloat16").values()
                done.append(float8.VALUES[codes] * scales)
                apart[f"{base}.{e}.{part}.weight"] = Stored("F8_E4M3", codes.shape, codes.tobytes())
                apart[f"{base}.{e}.{part}.weight_scale"] = Stored.of(scales, "bfloat16")
            form.plain[name][e] = np.concatenate(done).T
    for name in form.names(*ATTENTION, *FEED_FORWARD):
        form.linear(name, 1, (len(form.plain[name]), 1))
    form.stored |= apart


def per_tensor(form: Form) -> None:
    """vLLM's own: one scale for each tensor, one for activations, the head too."""
    form.config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    for i, name in enumerate(form.names(*ATTENTION, *FEED_FORWARD, "lm_head.weight")):
        form.linear(name, (0, 1), () if i % 2 else (1,))
        scale = name.replace(".weight", ".input_scale")
        form.stored[scale] = Stored.of(np.float32([0.5]), "float32")


def modelopt(form: Form) -> None:
    """NVIDIA's: fused experts, scales for all, each or each half; scales of keys and values."""
    form.config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    for i, name in enumerate(form.names("experts.gate_up_proj")):
        x = form.plain[name]
        if i == 0:
            codes, scales = float8.quantise(x, (0, 1, 2))
            stored = scales.reshape(())
        elif i == 1:
            codes, scales = float8.quantise(x, (1, 2))
            stored = scales.reshape(-1)
        else:
            halves = x.reshape(*x.shape[:2], 2, -1)
            codes, scales = float8.quantise(halves, (1, 3))
            stored = scales.reshape(len(x), 2)
            codes = codes.reshape(x.shape)
            scales = np.repeat(scales[:, 0], x.shape[2] // 2, axis=1).reshape(len(x), 1, -1)
        form.plain[name] = float8.VALUES[codes] * scales
        form.put(name, codes, stored, name + "_weight_scale")
        form.stored[name + "_input_scale"] = Stored.of(np.float32(0.5), "float32")
    for name in form.names("self_attn.k_proj.weight"):
        form.stored[name.replace(".weight", ".k_scale")] = Stored.of(np.float32(2), "float32")


FORMS: dict[str, Callable[[Form], None]] = {
    "fbgemm": fbgemm,
    "compressed_tensors": compressed_tensors,
    "per_tensor": per_tensor,
    "modelopt": modelopt,
}
Pair = tuple[Path, Path]


@pytest.fixture(scope="module", params=FORMS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A float8 checkpoint of each form, and the multiplied out one."""
    form = Form("mixed")
    FORMS[request.param](form)
    yield form.write(tmp_path_factory.mktemp(request.param))


def logits(path: Path, **options: Any) -> np.ndarray:
    variant = tiny.VARIANTS["mixed"]
    prompt = variant.prompt("three_tiles")
    with puna.load(path, **LOAD | options) as llm:
        return np.asarray(llm.logits(variant.tokens(prompt), variant.pixels(prompt)))


def test_float8_checkpoints_compute_what_they_mean(pair: Pair, isa: str) -> None:
    fp8, plain = pair
    # Products of the same numbers in another order of the same roundings; magnitudes are about 4.
    assert np.abs(logits(fp8, isa=isa) - logits(plain, isa=isa)).max() <= 4e-5


def test_float8_stays_float8(pair: Pair, tmp_path: Path) -> None:
    fp8, plain = pair
    expected = logits(fp8)
    assert np.array_equal(logits(fp8, threads=1), expected)
    with puna.load(fp8, **LOAD) as small, puna.load(plain, **LOAD) as large:
        assert small.plan.weight_bytes < 0.9 * large.plan.weight_bytes
        assert puna._core.inspect(str(fp8))["weight_bytes"] == small.plan.weight_bytes
    # What is float8 keeps its codes and scales in the packed form.
    overrides = {"default": "fp8", "*": "stored"}
    puna.quantize(fp8, tmp_path / "packed", quant=overrides, progress=False)
    assert np.array_equal(logits(tmp_path / "packed"), expected)


def test_float8_requantised_is_that_of_what_it_means(pair: Pair) -> None:
    fp8, plain = pair
    assert np.array_equal(logits(fp8, quant="int8"), logits(plain, quant="int8"))


def test_quantised_to_fp8(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The weights become those of a float8 checkpoint with a scale for each row."""
    source = checkpoint("guard_like").path
    form = Form("guard_like")
    for name in form.names(*ATTENTION, *FEED_FORWARD, "lm_head.weight"):
        form.linear(name, 1, (len(form.plain[name]), 1))
    fp8, _ = form.write(tmp_path)
    tokens = tiny.VARIANTS["guard_like"].tokens(tiny.TEXT)
    results = []
    for path, quant in ((source, "fp8"), (fp8, None), (fp8, "fp8")):
        with puna.load(path, quant=quant, **LOAD) as llm:
            results.append(np.asarray(llm.logits(tokens)))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[1], results[2])
    # Activations are not quantised: the reference differs by fp32's roundings only.
    with puna.load(source, quant="fp8", **LOAD | {"device": "ref"}) as llm:
        assert np.abs(llm.logits(tokens) - results[0]).max() <= 4e-5


def drop_scale(form: Form) -> None:
    form.stored.pop(form.names("q_proj.weight")[0] + "_scale")


def block_scales(form: Form) -> None:
    name = form.names("q_proj.weight")[0]
    form.stored[name + "_scale"] = Stored.of(np.ones((4, 4)), "float32")


def wrong_count(form: Form) -> None:
    name = form.names("q_proj.weight")[0]
    form.stored[name + "_scale"] = Stored.of(np.ones(63), "float32")


def whole_scales(form: Form) -> None:
    name = form.names("q_proj.weight")[0]
    form.stored[name + "_scale"] = Stored("I32", (1,), bytes(4))


def router(form: Form) -> None:
    form.linear(form.names("router.weight")[0], 1, (4, 1))


def embedding(form: Form) -> None:
    form.linear(form.names("embed_tokens.weight")[0], (0, 1), ())


def gate_alone(form: Form) -> None:
    name = form.names("up_proj.weight")[0]
    form.stored[name] = Stored.of(form.plain[name], "float32")
    del form.stored[name + "_scale"]


def int8(form: Form) -> None:
    name = form.names("q_proj.weight")[0]
    form.stored[name] = Stored("I8", form.stored[name].shape, form.stored[name].data)


REFUSED: dict[str, tuple[Callable[[Form], None], type[puna.Error], tuple[str, ...]]] = {
    "no scale": (drop_scale, puna.ModelFormatError, ("q_proj.weight", "q_proj.weight_scale")),
    "scales by block": (block_scales, puna.UnsupportedError, ("(4, 4)", "(64, 64)", "block")),
    "wrong count": (wrong_count, puna.UnsupportedError, ("(63)", "(64)", "q_proj.weight_scale")),
    "whole numbers": (whole_scales, puna.ModelFormatError, ("int32", "q_proj.weight_scale")),
    "router": (router, puna.UnsupportedError, ("router.weight", "float8_e4m3")),
    "embedding": (embedding, puna.UnsupportedError, ("embed_tokens.weight", "float8_e4m3")),
    "one of a pair": (gate_alone, puna.ModelFormatError, ("float8_e4m3", "float32", "one type")),
    "int8": (int8, puna.UnsupportedError, ("q_proj.weight_scale", "INT8")),
}


@pytest.mark.parametrize(("change", "kind", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_float8(
    tmp_path: Path,
    change: Callable[[Form], None],
    kind: type[puna.Error],
    named: tuple[str, ...],
) -> None:
    form = Form("mixed")
    per_tensor(form)
    change(form)
    path, _ = form.write(tmp_path)
    for read in (lambda: puna.load(path, **LOAD), lambda: puna._core.inspect(str(path))):
        with pytest.raises(kind) as caught:
            read()
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in named), str(caught.value)


def compressed(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"} | weights}},
    }


SCHEMES = {
    "blocks": ({"quant_method": "fp8", "weight_block_size": [128, 128]}, ("fp8", "by block")),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, ("fp8",)),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ("modelopt",)),
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, ("bitsandbytes", "bf16")),
    "groups": (compressed(strategy="group", group_size=128), ("compressed-tensors",)),
    "blocks of compressed-tensors": (compressed(strategy="block"), ("compressed-tensors",)),
    "int8": (compressed(type="int"), ("compressed-tensors",)),
    "no groups": ({"quant_method": "compressed-tensors", "config_groups": {}}, ("compressed",)),
    "no method": ({}, ("quant_method",)),
}


@pytest.mark.parametrize(("scheme", "named"), SCHEMES.values(), ids=SCHEMES.keys())
def test_refused_schemes(tmp_path: Path, scheme: dict[str, Any], named: tuple[str, ...]) -> None:
    form = Form("mixed")
    per_tensor(form)
    form.config["quantization_config"] = scheme
    path, _ = form.write(tmp_path)
    with pytest.raises(puna.UnsupportedError) as caught:
        puna.load(path, **LOAD)
    assert all(part in str(caught.value) for part in (*named, "scales by row or tensor"))
    assert "\n" not in str(caught.value)
