"""The C++ tests: every program tests/cpp/*_test.cpp, built once and run."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from cpp_programs import PROGRAMS, ROOT, build


def temporary_files_of(program: Path) -> dict[str, str]:
    """In memory where there is room, unless a program is about disks: thousands of small files that
    are written and replaced take a disk a minute."""
    memory = Path("/dev/shm")
    on_disk = program.name in {"file_test", "kv_disk_test"}
    if on_disk or not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 2**30:
        return {}
    return {"TMPDIR": str(memory)}


def run(program: Path, *names: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """All tests of a program, or those that are named."""
    return subprocess.run(
        [str(program), *names],
        capture_output=True,
        text=True,
        timeout=3600 if names else 900,
        check=False,
        env={**os.environ, **temporary_files_of(program), **environment},
    )


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " 0 failures" in done.stdout, done.stdout


Runs = dict[str, Future[subprocess.CompletedProcess[str]]]


@contextmanager
def runs(folder: Path, **environment: str) -> Iterator[Runs]:
    """Of every program, as many at once as there are cores: most compute on one thread."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run, folder / name, **environment) for name in PROGRAMS}


@pytest.fixture(scope="module")
def plain(programs: Path) -> Iterator[Runs]:
    with runs(programs) as all_runs:
        yield all_runs


@pytest.mark.parametrize("name", PROGRAMS)
def test_program(plain: Runs, name: str) -> None:
    check(plain[name].result())


@pytest.mark.nightly
def test_equal_bits_in_thousands_of_lives(programs: Path) -> None:
    """2,000 lives of sequences, each with a model, a store, cuts, forks and resumes of its own."""
    check(run(programs / "kv_placement_test", "thousands_of_lives"))


@pytest.mark.nightly
def test_each_source_compiles_by_itself() -> None:
    """Libraries are compiled as one source, where a missing #include is not seen."""
    build(
        ROOT / "build" / "apart",
        "-DPUNA_UNITY=OFF",
        "-DPUNA_ISAS=scalar",
        "-DCMAKE_BUILD_TYPE=Debug",
        programs=["puna_engine", "puna-bench"],
    )


@pytest.fixture(scope="module")
def sanitized(sanitized_programs: Path) -> Iterator[Runs]:
    options = "halt_on_error=1:print_stacktrace=1"
    with runs(sanitized_programs, UBSAN_OPTIONS=options) as all_runs:
        yield all_runs


@pytest.mark.sanitizers
@pytest.mark.parametrize("name", PROGRAMS)
def test_sanitized_program(sanitized: Runs, name: str) -> None:
    """Every C++ test, the fuzzers among them, under address and undefined-behaviour sanitizers."""
    check(sanitized[name].result())


@pytest.mark.sanitizers
def test_threads_under_thread_sanitizer() -> None:
    programs = ["pool_test", "kv_disk_test"]
    folder = build(
        ROOT / "build" / "threads",
        "-DPUNA_SANITIZE=thread",
        "-DPUNA_ISAS=scalar",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS_DEBUG=-O1",
        programs=programs,
    )
    # The fork test of the pool is left out: the sanitizer does not follow a fork of threads.
    for name in programs:
        check(run(folder / name))
