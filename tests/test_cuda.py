"""The CUDA backend: loading it, and whole models on the emulator, and on a GPU if there is one."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, MakeEngine
from oracle import golden, tiny
from oracle.on_device import Job, Result, compute
from puna import loading
from test_cpp import ROOT, build
from test_parity import assert_fp32_parity

CUDA = next(backend for backend in puna.backends() if backend["name"] == "cuda")
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93]


@pytest.fixture(scope="session")
def emulator() -> str:
    """The path of a libpuna_cuda.so that is the emulator."""
    folder = build(ROOT / "build" / "tests", programs=["puna_cuda_emulator"])
    return str(folder / "libpuna_cuda_emulator.so")


@pytest.fixture(params=["emulator", "gpu"])
def library(request: pytest.FixtureRequest) -> str | None:
    """What runs the kernels: the emulator, or (None) the library and the GPU of this machine."""
    if request.param == "gpu":
        if not CUDA["available"]:
            pytest.skip(f"no GPU: {CUDA['why']}")
        return None
    if platform.machine() != "x86_64":
        pytest.skip("the emulator's fibres are for x86-64")
    path: str = request.getfixturevalue("emulator")
    return path


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA["available"], reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_a_gpu_the_reason_is_told(device: str) -> None:
    assert CUDA["why"]
    with pytest.raises(puna.DeviceError) as error:
        puna.load("demo", device=device, progress=False)
    assert CUDA["why"] in str(error.value)


@pytest.mark.parametrize("device", ["cuda:", "cuda:x", "cuda:-1", "cuda:1x", "gpu", "cudaX"])
def test_names_that_are_no_device_are_refused(device: str) -> None:
    with pytest.raises(puna.InvalidRequest, match="it must be 'auto' or one of cuda, cpu, ref"):
        puna.load("demo", device=device, progress=False)


@pytest.mark.skipif(CUDA["available"], reason="there is a GPU")
def test_auto_falls_back_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    loading._say_if_without_gpu.cache_clear()
    with caplog.at_level(logging.INFO, logger="puna"):
        for _ in range(2):
            with puna.load("demo", progress=False) as llm:
                assert llm.plan.device.startswith("cpu")
    assert caplog.text.count(CUDA["why"]) == 1


# --- whole models ---------------------------------------------------------------------------------


def assert_near(got: Result, expected: Result, tolerance: float) -> None:
    """Logits within `tolerance` of the largest, and the same continuation."""
    magnitude = np.abs(expected.logits).max()
    assert np.abs(got.logits - expected.logits).max() <= tolerance * magnitude
    assert got.continuation == expected.continuation


def on_cpu_and_cuda(
    jobs: Sequence[Job], folder: Path, library: str | None
) -> list[tuple[Result, Result]]:
    placed = [
        Job(**{**vars(job), "options": {**job.options, "device": device}})
        for device in ("cuda", "cpu")
        for job in jobs
    ]
    results = compute(placed, folder, library)
    return list(zip(results[: len(jobs)], results[len(jobs) :], strict=True))


def test_logits_equal_transformers(
    checkpoint: MakeCheckpoint, tmp_path: Path, library: str | None
) -> None:
    """Every member of the family in fp32, with pictures, as the other backends compute it."""
    jobs, expected = [], []
    for name, variant in tiny.VARIANTS.items():
        fixture = golden.load(name)
        for prompt in variant.prompts:
            pixels = fixture.variant.pixels(prompt)
            place = tmp_path / f"{name}-{prompt.name}.npy"
            if pixels is not None:
                np.save(place, pixels)
            jobs.append(
                Job(
                    path=str(checkpoint(name, dtype="float32").path),
                    tokens=fixture.tokens(prompt).tolist(),
                    options={"device": "cuda"},
                    pixels=None if pixels is None else str(place),
                )
            )
            expected.append(fixture.logits(prompt))
    for result, logits in zip(compute(jobs, tmp_path, library), expected, strict=True):
        assert_fp32_parity(result.logits, logits)


@pytest.mark.parametrize("quant", [None, "int4", "fp8"])
def test_greedy_tokens_are_those_of_the_cpu(
    checkpoint: MakeCheckpoint, tmp_path: Path, library: str | None, quant: str | None
) -> None:
    path = str(checkpoint("scout_like", dtype="bfloat16").path)
    options = {} if quant is None else {"quant": quant}
    job = Job(path=path, tokens=PROMPT, options=options, continuation=12)
    for got, expected in on_cpu_and_cuda([job], tmp_path, library):
        # A bfloat16 that falls to the other side of a rounding, through a few layers.
        assert_near(got, expected, tolerance=0.02)


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
def test_long_prompts_in_any_cuts_have_the_same_bits(
    checkpoint: MakeCheckpoint, tmp_path: Path, library: str | None, kv: str
) -> None:
    """Pages that are full, sealed or not, are read as on the CPU, however the prompt came."""
    # In bfloat16 a rounding could choose another expert.
    path = str(checkpoint("scout_like", dtype="float32").path)
    tokens = (np.arange(530) * 37 % tiny.FIRST_SPECIAL).tolist()
    jobs = [
        Job(path=path, tokens=tokens, options={"kv": kv}, cuts=cuts)
        for cuts in (None, [300, 1, 229])
    ]
    (whole, expected), (cut, _) = on_cpu_and_cuda(jobs, tmp_path, library)
    assert np.array_equal(whole.logits, cut.logits)
    assert_near(whole, expected, tolerance=0.005)


def test_sessions_on_disk_are_refused(
    checkpoint: MakeCheckpoint, tmp_path: Path, library: str | None
) -> None:
    path = str(checkpoint("scout_like", dtype="bfloat16").path)
    options = {"device": "cuda", "kv_offload": f"disk:{tmp_path}"}
    with pytest.raises(AssertionError, match=r"UnsupportedError.*cannot go to files"):
        compute([Job(path=path, tokens=PROMPT, options=options)], tmp_path, library)


def test_the_emulator_is_no_gpu(engine: MakeEngine) -> None:
    """Nothing of the tests above reaches this process: its backends are those of the machine."""
    assert "emulator" not in CUDA["why"]
    assert engine("scout_like").plan.device.startswith("cpu")
