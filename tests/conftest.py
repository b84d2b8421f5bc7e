"""Fixtures shared by the Python tests: tiny checkpoints and engines, each made once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cpp_programs import HAS_EMULATOR, PROGRAMS, ROOT, Build
from oracle import golden
from oracle.make_checkpoint import write_checkpoint

if TYPE_CHECKING:
    import puna
    from puna import _core

# A continuous integration run must not pass because something was missing.
ON_CI = bool(os.environ.get("CI"))


def skip_or_fail(reason: str) -> None:
    """Skips on a person's machine, fails on CI."""
    if ON_CI:
        pytest.fail(f"{reason} (CI is set: this test may not be skipped)")
    pytest.skip(reason)


def oracle_module(name: str, *needed: str) -> ModuleType:
    """tests/oracle/NAME.py; skips (on CI: fails) without what it needs."""
    for package in needed:
        if importlib.util.find_spec(package) is None:
            skip_or_fail(f"{package} is not installed; docs/HACKING.md says how to")
    return importlib.import_module(f"oracle.{name}")


def pytest_configure() -> None:
    """A cache of the suite's own; and Ctrl-C, which tests send, also where a shell that runs the
    suite in the background has it ignored."""
    os.environ["PUNA_CACHE"] = tempfile.mkdtemp(prefix="puna-cache-")
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["PUNA_CACHE"], ignore_errors=True)
    for key in (BUILD, SANITIZED):
        if key in config.stash:
            config.stash[key].end()


BUILD, SANITIZED = pytest.StashKey[Build](), pytest.StashKey[Build]()
EMULATOR = "puna_cuda_emulator"


def fixtures_of(item: pytest.Item) -> list[str]:
    assert isinstance(item, pytest.Function)
    return item.fixturenames


def needs_build(item: pytest.Item) -> bool:
    """Whether a test is of, or with, what is built from tests/cpp."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        not {"programs", "emulator"}.isdisjoint(fixtures_of(item))
        or parameters.get("library") == "emulator"
    )


def needs_sanitized(item: pytest.Item) -> bool:
    """The same, under sanitizers."""
    return "sanitized_programs" in fixtures_of(item)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the C++ tests comes last, as they take minutes to build."""
    items.sort(key=lambda item: 2 * needs_sanitized(item) + needs_build(item))


def pytest_collection_finish(session: pytest.Session) -> None:
    """They are built while the other tests run."""
    if session.config.option.collectonly:
        return
    needing = [item for item in session.items if needs_build(item)]
    if needing:
        whole = any("programs" in fixtures_of(item) for item in needing)
        targets = (PROGRAMS if whole else []) + ([EMULATOR] if HAS_EMULATOR else [])
        if targets:
            session.config.stash[BUILD] = Build(ROOT / "build" / "tests", programs=targets)
    if any(map(needs_sanitized, session.items)):
        import puna

        # Sanitized kernels are slow to compile, those for AVX-512 five minutes a file: AVX2 has the
        # same templates and, without masked loads, more of the ends that may go wrong.
        runnable = [isa["name"] for isa in puna.isas() if isa["available"]]
        chosen = "avx2" if "avx2" in runnable else runnable[0]
        session.config.stash[SANITIZED] = Build(
            ROOT / "build" / "sanitized",
            "-DPUNA_SANITIZE=address,undefined",
            f"-DPUNA_ISAS={chosen}",
            "-DCMAKE_BUILD_TYPE=Debug",
            "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
        )


@pytest.fixture(scope="session")
def programs(request: pytest.FixtureRequest) -> Path:
    """The folder of the C++ tests."""
    return request.config.stash[BUILD].wait()


@pytest.fixture(scope="session")
def sanitized_programs(request: pytest.FixtureRequest) -> Path:
    """The same, under the address and undefined-behaviour sanitizers."""
    return request.config.stash[SANITIZED].wait()


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest) -> str:
    """The path of a libpuna_cuda.so that is the emulator."""
    if not HAS_EMULATOR:
        pytest.skip("the emulator's fibres are for x86-64")
    return str(request.config.stash[BUILD].wait() / f"lib{EMULATOR}.so")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `isa` runs once with each instruction set of this machine."""
    if "isa" in metafunc.fixturenames:
        import puna

        names = [isa["name"] for isa in puna.isas() if isa["available"]]
        assert "scalar" in names
        metafunc.parametrize("isa", names, scope="session")


@dataclass(frozen=True)
class TinyCheckpoint:
    """A checkpoint on disk, and what a reader must find in it."""

    path: Path
    golden: golden.Golden
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


def greedy(**changes: Any) -> _core.Sampling:
    """The likeliest token at every step, as the core takes it; `changes` are of other fields."""
    from puna import _core
    from puna.attention import Attention

    plain: dict[str, Any] = {
        "attention": Attention.exact().core(),
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": [],
        "seed": 0,
        "max_tokens": 0,
        "min_tokens": 0,
        "stop_ids": [],
        "stop": [],
        "ignore_eos": True,
        "logprobs": 0,
        "want_logprobs": False,
    }
    return _core.Sampling(**plain | changes)


MakeCheckpoint = Callable[..., TinyCheckpoint]
MakeEngine = Callable[..., "puna.Engine"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """`checkpoint(variant, dtype=..., shards=..., tokenizer=...)`: see write_checkpoint.

    The same arguments give the same directory: tests must not write into it.
    """
    made: dict[tuple[Any, ...], TinyCheckpoint] = {}

    def make(variant: str, **options: Any) -> TinyCheckpoint:
        key = (variant, *sorted(options.items()))
        if key not in made:
            fixture = golden.load(variant)
            path = tmp_path_factory.mktemp(variant)
            tensors = write_checkpoint(path, fixture.config, fixture.variant.seed, **options)
            made[key] = TinyCheckpoint(path, fixture, fixture.config, tensors)
        return made[key]

    return make


@pytest.fixture(scope="session")
def engine(checkpoint: MakeCheckpoint) -> Iterator[MakeEngine]:
    """`engine(variant, dtype=..., tokenizer=..., **options of puna.load)`, loaded once."""
    import puna

    loaded: dict[tuple[Any, ...], puna.Engine] = {}

    def load(
        variant: str, *, dtype: str = "float32", tokenizer: bool = False, **options: Any
    ) -> puna.Engine:
        key = (variant, dtype, tokenizer, *sorted(options.items()))
        if key not in loaded:
            path = checkpoint(variant, dtype=dtype, tokenizer=tokenizer).path
            options = {"threads": 2, "device": "cpu", "progress": False} | options
            loaded[key] = puna.load(path, **options)
        return loaded[key]

    yield load
    for llm in loaded.values():
        llm.close()


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the bundled model holds, as a Hugging Face directory in float32."""
    from tools.demo_model.packed import unpack

    from puna.loading import demo_directory

    path = tmp_path_factory.mktemp("demo")
    unpack(demo_directory(), path)
    return path
