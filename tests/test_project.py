"""Checks of the repository itself that need more tools: formatting, stubs, other architectures."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def check(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def tracked(*patterns: str) -> list[str]:
    listing = subprocess.run(
        ["git", "ls-files", *patterns], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return listing.stdout.split()


def test_python_is_linted_and_formatted() -> None:
    check("ruff", "check")
    check("ruff", "format", "--check")


def test_cpp_is_formatted() -> None:
    check("clang-format", "--dry-run", "--Werror", *tracked("*.cpp", "*.h", "*.cu", "*.cuh"))


def test_stubs_match_the_module() -> None:
    check(sys.executable, "-m", "mypy.stubtest", "puna._core")


def test_types() -> None:
    check(sys.executable, "-m", "mypy", "--strict", "-p", "puna")


def test_neon_kernels_under_emulation() -> None:
    check("bash", "tools/check_neon.sh")
