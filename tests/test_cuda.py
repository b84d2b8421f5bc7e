"""The CUDA backend: loading it, and whole models on the emulator, and on a GPU if there is one."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import puna
from conftest import MakeCheckpoint, MakeEngine
from cpp_programs import ROOT
from oracle import golden, tiny
from oracle.make_checkpoint import write_checkpoint
from oracle.on_device import Job, Result, compute
from puna import cli, doctor, gpus, loading
from test_parity import assert_fp32_parity

CUDA = next(backend for backend in puna.backends() if backend["name"] == "cuda")
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93]


@pytest.fixture(params=["emulator", "gpu"])
def library(request: pytest.FixtureRequest) -> str | None:
    """What runs the kernels: the emulator, or (None) the library and the GPU of this machine."""
    if request.param == "gpu":
        if not CUDA["available"]:
            pytest.skip(f"no GPU: {CUDA['why']}")
        return None
    path: str = request.getfixturevalue("emulator")
    return path


def with_fewer_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The first layers of a model, for longer texts."""
    text: dict[str, Any] = dict(config["text_config"])
    layers = text["num_hidden_layers"]
    for name, values in text.items():
        if isinstance(values, list) and len(values) == layers and name != "moe_layers":
            text[name] = values[:count]
    text["moe_layers"] = [layer for layer in text["moe_layers"] if layer < count]
    more = {"num_hidden_layers": count, "max_position_embeddings": 16_384}
    return config | {"text_config": text | more}


def share(path: Path, subject: str, library: str | None) -> dict[str, Any]:
    """What came of it: oracle/sharing.py, on a device or (None) on the GPU of this machine."""
    if library is None:
        pytest.importorskip("cuda.core")
    environment = dict(os.environ) | ({} if library is None else {"PUNA_CUDA_LIBRARY": library})
    done = subprocess.run(
        [sys.executable, "-m", "oracle.sharing", subject, str(path)],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


FewLayers = Callable[[str, str], str]


@pytest.fixture(scope="session")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> FewLayers:
    """`few_layers(variant, dtype)`: a checkpoint of the first four layers of a tiny model.

    The last of them attends to everything, as in whole ones; the emulator takes half as long.
    """

    @functools.cache
    def make(variant: str, dtype: str) -> str:
        fixture = golden.load(variant)
        path = tmp_path_factory.mktemp(variant)
        config = with_fewer_layers(fixture.config, 4)
        write_checkpoint(path, config, fixture.variant.seed, dtype=dtype)
        return str(path)

    return make


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


@pytest.mark.parametrize("there_is_a_gpu", [False, True])
def test_auto_on_the_cpu_says_why_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, there_is_a_gpu: bool
) -> None:
    status = {"name": "cuda", "available": there_is_a_gpu, "why": "what was found"}
    monkeypatch.setattr(loading._core, "backends", lambda: [status])
    loading._say_why_without_gpu.cache_clear()
    level = logging.WARNING if there_is_a_gpu else logging.INFO
    with caplog.at_level(level, logger="puna"):
        for _ in range(2):
            # The CPU's alone, so this is the CPU on a machine with a GPU, too.
            isa = next(isa["name"] for isa in puna.isas() if isa["available"])
            with puna.load("demo", isa=isa, progress=False) as llm:
                assert llm.plan.device.startswith("cpu")
    assert caplog.text.count("what was found") == 1
    assert ("although there is a GPU" in caplog.text) == there_is_a_gpu
    loading._say_why_without_gpu.cache_clear()


def test_auto_is_the_gpu_unless_the_model_does_not_fit_it(
    checkpoint: MakeCheckpoint, tmp_path: Path, emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulator is a device like any other."""
    path = str(checkpoint("scout_like", dtype="float32").path)

    def device(**options: Any) -> str:
        (auto,) = compute([Job(path, PROMPT, {"device": "auto"} | options)], tmp_path, emulator)
        return auto.device.split(" ")[0]

    assert device() == "cuda:0"
    assert device(isa=next(isa["name"] for isa in puna.isas() if isa["available"])) == "cpu"
    assert device(kv_offload=f"disk:{tmp_path}") == "cpu"
    monkeypatch.setenv("EMULATOR_MEMORY", str(1 << 16))
    assert device() == "cpu"


def test_the_benchmark_finds_the_kernels_of_the_package(tmp_path: Path) -> None:
    assert cli._kernels_option(tmp_path) == []
    kernels = tmp_path / "libpuna_cuda.so"
    kernels.touch()
    assert cli._kernels_option(tmp_path) == ["--kernels", str(kernels)]


def test_logits_are_handed_out_by_dlpack(engine: MakeEngine) -> None:
    """Without a copy, to whatever takes DLPack: from the host's memory, whatever the device."""
    logits = engine("scout_like").logits(PROMPT)
    assert logits.__dlpack_device__() == (1, 0)  # kDLCPU
    taken = np.from_dlpack(logits)
    assert np.shares_memory(taken, logits)
    assert np.array_equal(taken, logits)


# --- a stream of somebody else's ------------------------------------------------------------------


class FakeStream:
    """What says that it is a stream."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __cuda_stream__(self) -> Any:
        return self.answer


class OldStream:
    __cuda_stream__ = (0, 4096)  # as it was before it became a method


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (4096, "which has no method __cuda_stream__"),
        ("stream", "which has no method __cuda_stream__"),
        (OldStream(), "which has no method __cuda_stream__"),
        (FakeStream(4096), r"returned 4096; it must be \(0, address\)"),
        (FakeStream([0, 4096]), r"it must be \(0, address\)"),
        (FakeStream((0, 4096, 1)), r"it must be \(0, address\)"),
        (FakeStream((0, "4096")), r"it must be \(0, address\)"),
        (FakeStream((False, 4096)), r"it must be \(0, address\)"),
        (FakeStream((1, 4096)), "is of version 1; this puna knows version 0"),
        (FakeStream((0, -1)), "returned the address -1"),
        (FakeStream((0, 1 << 64)), "returned the address 18446744073709551616"),
        (FakeStream((0, 0)), "handle is 0, a default stream, .*create_stream"),
        (FakeStream((0, 1)), "handle is 1, a default stream"),
        (FakeStream((0, 2)), "handle is 2, a default stream"),
    ],
)
def test_what_is_no_stream_to_compute_on_is_refused(stream: Any, message: str) -> None:
    with pytest.raises(puna.InvalidRequest, match=message) as error:
        puna.load("demo", device="cuda", stream=stream, progress=False)
    assert error.value.param == "stream"


@pytest.mark.parametrize("device", ["auto", "cpu", "ref", "cpu:0", "cudaX"])
def test_a_stream_is_for_a_gpu(device: str) -> None:
    stream = FakeStream((0, 4096))
    alive = sys.getrefcount(stream)
    with pytest.raises(puna.InvalidRequest, match=f"a stream is for .* device is '{device}'"):
        puna.load("demo", device=device, stream=stream, progress=False)
    assert sys.getrefcount(stream) == alive


def test_what_a_stream_raises_is_passed_on() -> None:
    class Closed:
        def __cuda_stream__(self) -> tuple[int, int]:
            raise RuntimeError("the stream was closed")

    with pytest.raises(RuntimeError, match="the stream was closed"):
        puna.load("demo", device="cuda", stream=Closed(), progress=False)


def test_an_engine_computes_on_the_stream_that_it_is_given(
    checkpoint: MakeCheckpoint, library: str | None
) -> None:
    """With the same bits as on its own, which it keeps alive until it is closed."""
    report = share(checkpoint("scout_like", dtype="float32").path, "stream", library)
    assert report["same_logits"] and report["same_tokens"]
    assert report["alive_while_open"] and not report["alive_when_closed"]
    if library is not None:
        assert report["asked"] > 100
        assert report["asked_by_others"] == 0
        assert "stream is of cuda:0 and the device is cuda:1; device='cuda:0'" in report["refused"]


def test_results_stay_on_the_device_for_others(
    checkpoint: MakeCheckpoint, library: str | None
) -> None:
    """With the bits of those that come to the host, and as long as anybody has them."""
    report = share(checkpoint("scout_like", dtype="float32").path, "array", library)
    assert report["device"] == ["cuda:0", [2, 0]]
    assert report["same_logits"] and report["same_hidden_states"]
    # Its stream is alive as long as the engine's device is.
    for when in ("while_held", "while_taken", "by_the_other"):
        assert report[f"alive_{when}"], when
    assert not report["alive_at_last"]
    assert report["handed_out"] == [""] * 6
    refused = report["refused"]
    assert "stream is 0, which may be either default stream" in refused["stream 0"]
    assert "stream is -2; it must be None, -1" in refused["stream -2"]
    assert "it goes to the host's memory by a copy alone" in refused["host without a copy"]
    assert "for the host's memory it must be None" in refused["stream of the host"]
    assert "it cannot go to device (2, 1), but to (1, 0)" in refused["another"]
    assert report["same_on_host"] and report["copied"] and report["copy_device"] == [2, 0]
    for text in (*report["refused_when_closed"], report["refused_when_gone"]):
        assert "the engine that would copy the array, which is on cuda:0, is closed" in text


# --- the run on a machine with a GPU --------------------------------------------------------------

BENCH = """#!/bin/sh
case "$*" in
*--help*) echo usage ;;
*"--check --only norms"*) echo "WRONG norms"; exit 1 ;;
*"--check --only experts"*) kill -SEGV $$ ;;
vision*) exit 2 ;;
*--json*) echo '{"rows": []}' ;;
esac
"""


@pytest.mark.skipif(shutil.which("timeout") is None, reason="timeout of coreutils is missing")
def test_the_gpu_run_goes_on_after_a_failure(tmp_path: Path) -> None:
    bench, out = tmp_path / "puna-bench", tmp_path / "out"
    bench.write_text(BENCH)
    bench.chmod(0o755)
    script = str(ROOT / "bench" / "gpu_run.sh")
    done = subprocess.run(
        ["bash", script, str(out), str(bench)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "    WRONG norms" in done.stdout
    result = json.loads((out / "cuda.json").read_text())
    status = {row["step"]: row["status"] for row in result["steps"]}
    assert status == status | {
        "start": "passed",
        "check-products": "passed",
        "check-experts": "failed",
        "check-norms": "failed",
        "check-attention": "passed",
        "products": "passed",
        "attention": "passed",
        "vision": "failed",
    }
    assert result["failed"] == 1
    assert result["products"] == result["attention"] == {"rows": []}
    assert "vision" not in result


# --- finding GPUs ---------------------------------------------------------------------------------

MIB = 1 << 20


class FakeSystem:
    """What `cuda.core.system` has, of two GPUs, or of a machine without a driver."""

    class Device:
        devices: Sequence[Any] = ()

        @classmethod
        def get_all_devices(cls) -> Sequence[Any]:
            if not cls.devices:
                raise RuntimeError("no driver")
            return cls.devices

    @staticmethod
    def get_kernel_mode_driver_version() -> tuple[int, ...]:
        return (580, 65, 6)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> type[FakeSystem]:
    cards = [("NVIDIA H100", 81559 * MIB, 80000 * MIB), ("NVIDIA T4", 15360 * MIB, 9000 * MIB)]
    devices = [
        SimpleNamespace(name=name, memory_info=SimpleNamespace(total=total, free=free))
        for name, total, free in cards
    ]
    monkeypatch.setattr(FakeSystem.Device, "devices", devices)
    monkeypatch.setitem(sys.modules, "cuda.core.system", FakeSystem)
    return FakeSystem


def test_gpus_by_nvml(nvml: type[FakeSystem]) -> None:
    found = gpus.find_gpus()
    assert (found.source, found.driver, found.why) == ("nvml", "580.65.6", "")
    assert found.devices[1] == gpus.Gpu(1, "NVIDIA T4", 15360 * MIB, 9000 * MIB)
    words = doctor._gpu_in_words(asdict(found))
    assert words.startswith("NVIDIA H100, 78.1 GiB free of 79.6 GiB, NVIDIA T4, ")
    assert words.endswith("; driver 580.65.6")


def test_plans_for_the_memory_of_a_gpu(nvml: type[FakeSystem]) -> None:
    plan = puna.plan("demo", device="cuda:1")
    assert plan.memory_bytes == 9000 * MIB
    assert plan.device == "cuda:1 (NVIDIA T4)"
    assert "speed        unknown" in str(plan)
    assert plan.tokens_per_second != plan.tokens_per_second  # NaN
    plan = puna.plan("demo", device="cuda", memory="1G", memory_bandwidth="3G")
    assert plan.memory_bytes == 1 << 30
    assert plan.tokens_per_second > 0
    with pytest.raises(puna.DeviceError, match=r"no GPU cuda:2 to plan for: there are 2"):
        puna.plan("demo", device="cuda:2")
    with pytest.raises(puna.InvalidRequest, match="'cpu', 'cuda' or 'cuda:N'"):
        puna.plan("demo", device="auto")


@pytest.mark.parametrize("package", ["missing", "without a driver"])
def test_gpus_without_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    there = None if package == "missing" else FakeSystem
    monkeypatch.setitem(sys.modules, "cuda.core.system", there)
    monkeypatch.setattr(gpus, "_PROC", tmp_path)
    why = "not installed" if package == "missing" else "cuda-python: no driver"
    found = gpus.find_gpus()
    assert (found.devices, found.driver, found.source) == ((), None, "proc")
    assert why in found.why
    assert doctor._gpu_in_words(asdict(found)) == f"none found; {found.why}"
    with pytest.raises(puna.DeviceError, match=why):
        puna.plan("demo", device="cuda")

    (tmp_path / "version").write_text("NVRM version: 580.65\nGCC 12\n")
    (tmp_path / "gpus" / "0").mkdir(parents=True)
    (tmp_path / "gpus" / "0" / "information").write_text("Model: \t NVIDIA L4\nIRQ: 1\n")
    found = gpus.find_gpus()
    assert found.devices == (gpus.Gpu(0, "NVIDIA L4"),)
    words = doctor._gpu_in_words(asdict(found))
    assert words == "NVIDIA L4 (memory unknown without cuda-python); driver NVRM version: 580.65"
    with pytest.raises(puna.DeviceError, match="memory of cuda is not known"):
        puna.plan("demo", device="cuda")


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


def test_tokens_are_those_of_the_whole_row(
    checkpoint: MakeCheckpoint, tmp_path: Path, library: str | None
) -> None:
    """What is chosen from the little that comes from the device; log-probabilities take it all."""
    path = str(checkpoint("scout_like", dtype="float32").path)
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.6, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 20, "min_p": 0.1},
        {"temperature": 0.2, "top_p": 1.0, "min_p": 0.02, "min_tokens": 3, "stop": [5]},
    ]
    jobs = [
        Job(path, PROMPT, {"device": "cuda"}, continuation=8, beside=[[7, 8, 9]], sampling=options)
        for seed, way in enumerate(ways)
        for options in ({"seed": seed} | way, {"seed": seed, "logprobs": 2} | way)
    ]
    results = compute(jobs, tmp_path, library)
    for few, whole in zip(results[::2], results[1::2], strict=True):
        assert few.continuation == whole.continuation
    assert len({tuple(result.continuation) for result in results}) == len(ways)


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
    few_layers: FewLayers, tmp_path: Path, library: str | None, kv: str
) -> None:
    """Pages that are full, sealed or not, are read as on the CPU, however the prompt came."""
    # In bfloat16 a rounding could choose another expert.
    path = few_layers("scout_like", "float32")
    tokens = (np.arange(530) * 37 % tiny.FIRST_SPECIAL).tolist()
    jobs = [
        Job(path=path, tokens=tokens, options={"kv": kv}, cuts=cuts)
        for cuts in (None, [300, 1, 229])
    ]
    (whole, expected), (cut, _) = on_cpu_and_cuda(jobs, tmp_path, library)
    assert np.array_equal(whole.logits, cut.logits)
    assert_near(whole, expected, tolerance=0.005)


# --- keys and values in the host's memory and in files --------------------------------------------


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_a_session_has_the_same_bits_wherever_its_pages_lie(
    few_layers: FewLayers, tmp_path: Path, library: str | None, kv: str
) -> None:
    """It is the CPU's, which is quick, and goes on in the GPU's memory, the host's, and files."""
    path = few_layers("scout_like", "float32")
    tokens = (np.arange(16_000) * 37 % tiny.FIRST_SPECIAL).tolist()
    with puna.load(path, device="cpu", kv=kv, progress=False) as llm:
        session = llm.session()
        session.append(tokens)
        session.save(tmp_path / "cpu")
        session.append([5, 6, 7])
        expected = session.branch([[5]], temperature=0, max_tokens=4, ignore_eos=True)[0].tokens
    whole: dict[str, Any] = {"device": "cuda", "kv": kv, "context": 16_384, "experts": "gpu"}
    # As little of each memory as there can be, and what a branch writes on.
    least = puna.plan(path, memory=1, host_memory="1G", kv_offload="host", **whole)
    assert least.kv_host_bytes > least.kv_memory_bytes > 0
    behind = puna.plan(path, memory=1, host_memory="1G", disk="1G", **whole)
    small = {"memory": least.memory_needed + 2 * least.kv_local_bytes}
    assert puna.plan(path, kv_offload="host", **small, **whole).kv_host_bytes > 0
    places: list[dict[str, Any]] = [
        {},
        small | {"kv_offload": "host", "host_memory": least.host_needed},
        small | {"kv_offload": f"disk:{tmp_path / 'cache'}", "host_memory": behind.host_needed},
    ]
    jobs = [
        Job(
            path,
            [5, 6, 7],
            whole | place,
            continuation=4,
            session=str(tmp_path / "cpu"),
            saved=str(tmp_path / f"saved{i}"),
        )
        for i, place in enumerate(places)
    ]
    first, *others = compute(jobs, tmp_path, library)
    assert tuple(first.continuation) == expected
    files = _files(tmp_path / "saved0")
    assert len(files) > 8  # a chunk has 256 tokens
    for i, other in enumerate(others, start=1):
        assert np.array_equal(other.logits, first.logits)
        assert other.continuation == first.continuation
        assert _files(tmp_path / f"saved{i}") == files
    # What was saved there, the CPU opens.
    with puna.load(path, device="cpu", kv=kv, progress=False) as llm:
        assert llm.verify(tmp_path / "saved2").fault == ""
        again = llm.session(tmp_path / "saved2", readonly=True)
        assert (
            again.branch([[5]], temperature=0, max_tokens=4, ignore_eos=True)[0].tokens == expected
        )


def _files(directory: Path) -> dict[str, bytes]:
    """Contents by name."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_what_fits_nowhere_is_refused(few_layers: FewLayers, tmp_path: Path, emulator: str) -> None:
    path = few_layers("scout_like", "float32")
    options: dict[str, Any] = {"device": "cuda", "context": 16_384, "experts": "gpu"}
    least = puna.plan(path, memory=1, host_memory="1G", kv_offload="host", **options)
    assert not least.fits and least.kv_host_bytes > 0
    options["memory"] = least.memory_needed
    for more, message in (
        ({}, "kv_offload='host' leaves to the host's memory"),
        (
            {"kv_offload": "host", "host_memory": least.host_needed - 1},
            "of the host's memory for what the GPU leaves to it.*or kv_offload='disk:DIR'",
        ),
        ({"kv_offload": "disk:" + str(tmp_path), "kv_disk": "1M"}, "the largest context that fits"),
    ):
        with pytest.raises(AssertionError, match=f"OutOfMemory.*({message})"):
            compute([Job(path, PROMPT, options | more)], tmp_path, emulator)
    with pytest.raises(puna.InvalidRequest, match="'auto', 'none', 'host' or 'disk:PATH'"):
        puna.load("demo", kv_offload="gpu", progress=False)


# --- experts in the host's memory -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "on_gpu"),
    [("scout_like", [3, 2, 0]), ("maverick_like", [1, 0]), ("top2", [1, 0])],
)
def test_a_model_has_the_same_bits_wherever_its_experts_lie(
    few_layers: FewLayers,
    tmp_path: Path,
    library: str | None,
    variant: str,
    on_gpu: list[int],
) -> None:
    """In whatever pieces the prompt comes, and beside other sequences; greedy as on the CPU."""
    path = few_layers(variant, "bfloat16")
    layers = on_gpu[0] + 1
    job = Job(path, PROMPT, continuation=6, beside=[PROMPT[3:], [7]])

    def placed(experts: str | int, cuts: list[int] | None = None, device: str = "cuda") -> Job:
        options = {"device": device, "quant": "int4", "experts": experts}
        return replace(job, options=options, cuts=cuts)

    pieces = [[3, 1, 4], None, [1] * len(PROMPT)]
    jobs = [placed("gpu"), placed("auto", device="cpu")]
    jobs += [
        placed(experts, pieces[-1] if experts == 0 else pieces[i])
        for i, experts in enumerate(on_gpu)
    ]
    whole, on_cpu, *others = compute(jobs, tmp_path, library)
    assert "experts" not in whole.device
    for result, there in zip(others, on_gpu, strict=True):
        assert f", experts of {layers - there} of {layers} layers on cpu (" in result.device
        assert np.array_equal(result.logits, whole.logits)
        assert result.continuation == whole.continuation
    assert_near(whole, on_cpu, tolerance=0.02)


@pytest.mark.parametrize("variant", ["scout_like", "top2"])
def test_a_prompt_has_the_same_bits_whoever_computes_its_experts(
    few_layers: FewLayers,
    tmp_path: Path,
    library: str | None,
    variant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pieces of three tokens and more send experts to the GPU, others leave them to the CPU."""
    monkeypatch.setenv("PUNA_CUDA_SENT_ROWS", "3")
    path = few_layers(variant, "bfloat16")
    places = [("gpu", None), ("cpu", None), (1, [3, 1, 4]), ("cpu", [2, 6]), ("cpu", [1] * 8)]
    jobs = [
        Job(
            path,
            PROMPT,
            {"device": "cuda", "quant": "int4", "experts": experts},
            continuation=4,
            beside=[PROMPT[3:], [7]],
            cuts=cuts,
        )
        for experts, cuts in places
    ]
    whole, *others = compute(jobs, tmp_path, library)
    for result in others:
        assert np.array_equal(result.logits, whole.logits)
        assert result.continuation == whole.continuation


@pytest.mark.parametrize("quant", [None, "fp8"])
def test_floats_differ_by_roundings_where_their_experts_lie(
    checkpoint: MakeCheckpoint, tmp_path: Path, library: str | None, quant: str | None
) -> None:
    path = str(checkpoint("scout_like", dtype="bfloat16").path)
    options = {"device": "cuda", "quant": quant}
    jobs = [
        Job(path, PROMPT, options | {"experts": experts}, continuation=6)
        for experts in ("gpu", 3, "cpu")
    ]
    on_gpu, *others = compute(jobs, tmp_path, library)
    for result in others:
        assert_near(result, on_gpu, tolerance=0.02)


def test_experts_that_do_not_fit_go_to_the_host(
    checkpoint: MakeCheckpoint, tmp_path: Path, emulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(checkpoint("scout_like", dtype="float32").path)
    options = {"device": "cuda", "context": 256}
    whole = puna.plan(path, memory="1G", **options)
    most = whole.memory_needed
    assert (whole.expert_layers, whole.host_layers) == (8, 0)
    per_layer = puna.plan(path, memory=most - 1, **options).host_expert_bytes

    def load(memory: int, **more: Any) -> Result:
        job = Job(path, PROMPT, options | {"memory": memory} | more)
        return compute([job], tmp_path, emulator)[0]

    assert not load(most).warnings
    result = load(most - 2 * per_layer - 1)
    assert ", experts of 3 of 8 layers on cpu (" in result.device
    (warning,) = result.warnings
    assert warning.startswith("the routed experts of 3 of 8 layers (")
    assert_fp32_parity(result.logits, load(most).logits)
    # What is free of the device's memory, and not of the host's, is what counts.
    monkeypatch.setenv("EMULATOR_MEMORY", str(most - per_layer))
    assert ", experts of " in compute([Job(path, PROMPT, options)], tmp_path, emulator)[0].device
    # "auto" takes no GPU for that, unless it is said where they lie.
    auto = [
        Job(path, PROMPT, options | {"device": "auto"} | more) for more in ({}, {"experts": "cpu"})
    ]
    devices = [result.device for result in compute(auto, tmp_path, emulator)]
    assert devices[0].startswith("cpu") and ", experts of 8 of 8 layers" in devices[1]

    for more, kind, message in (
        ({"experts": "gpu"}, "OutOfMemory", "experts='auto'"),
        ({"experts": 9}, "InvalidRequest", "experts=9 layers were asked for, the model has 8"),
        ({"memory": "64K"}, "OutOfMemory", "beside the routed experts of 8 layers, which are left"),
    ):
        with pytest.raises(AssertionError, match=f"{kind}.*({message})"):
            load(**{"memory": most - per_layer} | more)


def test_the_emulator_is_no_gpu(engine: MakeEngine) -> None:
    """Nothing of the tests above reaches this process: its backends are those of the machine."""
    assert "emulator" not in CUDA["why"]
    assert engine("scout_like").plan.device.startswith("cpu")
