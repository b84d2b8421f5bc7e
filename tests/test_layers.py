"""The architecture as a test: who may include whom, and what no source may contain.

The table of docs/ARCHITECTURE.md is data here; every `#include "..."` of csrc/ and bench/ is held
against it.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Folder -> what it may include besides itself. The longest folder that holds a file decides. An
# entry is a folder (with all in it, unless a longer key names a part), or one header.
_INTERFACES = {"base", "quant", "backend"}
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "platform": {"base"},
    "quant": {"base"},
    # Of base only what is freestanding: kernels are compiled once per instruction set.
    "kernels": {"quant", "base/half.h", "base/float8.h", "base/dtype.h", "base/candidate.h"},
    "backend": {"base", "quant"},
    "backend/ref": _INTERFACES,
    "backend/cpu": _INTERFACES | {"kernels", "platform"},
    "backend/cuda": _INTERFACES | {"kernels"},
    "io": {"base", "platform", "quant"},
    "text": {"base", "platform"},
    "image": {"base", "platform"},
    "kv": {"base", "platform", "backend"},
    "kv/tiers": {"base", "platform", "kv", "backend"},
    "model": {"base", "quant", "io", "backend", "kv"},
    "include/puna": {"base"},
    "engine": {
        *("include/puna", "model", "kv", "text", "image", "io", "platform", "backend"),
        *("base", "quant"),
    },
    "bindings": {"include/puna", "engine", "text", "image", "platform"},
    "bench": {
        *("include/puna", "engine", "model", "kv", "text", "image", "io", "platform", "backend"),
        *("base", "quant", "kernels"),
    },
}
# Single files that may do what their folder may not.
EXCEPTIONS: dict[str, set[str]] = {
    # The one place that names concrete backends and tiers.
    "engine/factory.cpp": {"backend/ref", "backend/cpu", "backend/cuda", "kv/tiers"},
    # Where it is not nvcc that compiles the kernels, it is the emulator of the tests.
    "kernels/cuda/ptx.h": {"emulator/cuda.h"},
    # Measures the device itself, beside what the backend makes of it.
    "bench/device_ceilings.cpp": {"backend/cuda"},
    "bench/profile.cpp": {"backend/cpu", "backend/cuda"},
    # Chooses an instruction set at run time: ordinary code, and a list that CMake generates.
    "kernels/cpu/dispatch.cpp": {"base/env.h", "base/error.h", "isa_list.inc"},
}
# What kernels may include in angle brackets; the standard library of C++ is not among it.
KERNEL_SYSTEM_HEADERS = {
    *("stddef.h", "stdint.h", "immintrin.h", "arm_neon.h"),
    *("cpuid.h", "sys/auxv.h", "sys/syscall.h", "unistd.h"),  # cpu_features.cpp
    "cuda_runtime.h",
}
KERNELS_WITH_STL = {"kernels/cpu/dispatch.cpp", "kernels/cpu/dispatch.h"}

# Calls that a library must not make: printing, and ending the process.
FORBIDDEN = re.compile(
    r"\b(?:printf|fprintf|vprintf|puts|fputs|putchar|abort|_Exit|exit|quick_exit|terminate)\s*\("
    r"|\bstd::(?:cout|cerr|clog)\b|\bassert\s*\("
)
GETENV = re.compile(r"\b(?:secure_)?getenv\s*\(")
MAX_LINES = 800


def folder_of(path: str) -> str:
    """The longest folder of ALLOWED that holds `path` ("" if none does)."""
    parts = path.split("/")[:-1]
    for length in range(len(parts), 0, -1):
        folder = "/".join(parts[:length])
        if folder in ALLOWED:
            return folder
    return ""


def code_of(text: str) -> str:
    """C++ without comments and string contents; lines stay lines."""
    token = re.compile(
        r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'',
        re.DOTALL,
    )

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n") if match[0][0] == "/" else '""'

    return token.sub(blank, text)


def include_violations(path: str, text: str) -> list[str]:
    """What is wrong with the includes of a source; `path` is relative to csrc/ (or bench/...)."""
    folder = folder_of(path)
    if not folder:
        return [f"{path}: its folder is not in the table of tests/test_layers.py"]
    allowed = ALLOWED[folder] | {folder} | EXCEPTIONS.get(path, set())
    found = []
    for included in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
        # Public headers are included as "puna/engine.h", those beside a source of bench by name.
        target = f"include/{included}" if included.startswith("puna/") else included
        if "/" not in target and folder == "bench":
            target = f"bench/{target}"
        if target not in allowed and folder_of(target) not in allowed:
            found.append(f"{path}: {folder} may not include {included}")
    if folder == "kernels" and path not in KERNELS_WITH_STL:
        for included in re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE):
            if included not in KERNEL_SYSTEM_HEADERS:
                found.append(f"{path}: kernels may not include <{included}>")
    return found


def call_violations(path: str, text: str) -> list[str]:
    """Printing, ending the process, and reading the environment, where that is not allowed."""
    code = code_of(text)
    found = []
    if not path.startswith("bench/"):
        found += [f"{path}: {call[0]!r} in the core" for call in FORBIDDEN.finditer(code)]
    if path != "base/env.h":
        found += [f"{path}: {call[0]!r} outside base/env.h" for call in GETENV.finditer(code)]
    return found


def sources() -> dict[str, str]:
    """Path, relative to csrc/ (or with bench/), to text."""
    found = {}
    for root, base in ((ROOT / "csrc", ROOT / "csrc"), (ROOT / "bench", ROOT)):
        for path in sorted(root.rglob("*")):
            if path.suffix in {".h", ".cpp", ".inc", ".cu", ".cuh"}:
                found[path.relative_to(base).as_posix()] = path.read_text()
    assert len(found) > 80
    return found


def tracked() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_includes_follow_the_table() -> None:
    assert not [v for path, text in sources().items() for v in include_violations(path, text)]


def test_the_core_neither_prints_nor_aborts_nor_reads_the_environment() -> None:
    assert not [v for path, text in sources().items() for v in call_violations(path, text)]


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("base/error.h", "platform/mmap.h"),
        ("platform/mmap.cpp", "io/message.h"),
        ("io/checkpoint.cpp", "text/tokenizer.h"),  # siblings
        ("text/tokenizer.cpp", "io/json_file.h"),
        ("image/resize.cpp", "text/tokenizer.h"),
        ("kernels/cpu/simd.h", "platform/memory.h"),
        ("kernels/cpu/gemm-inl.h", "base/error.h"),  # not freestanding
        ("backend/checks.cpp", "kernels/kernel_table.h"),
        ("backend/backend.h", "backend/cpu/pack.h"),
        ("backend/ref/ref_backend.cpp", "kernels/kernel_table.h"),
        ("backend/ref/ref_backend.cpp", "backend/cpu/pack.h"),
        ("backend/cpu/moe.cpp", "backend/ref/ref_backend.h"),
        ("backend/cuda/products.cpp", "backend/cpu/pack.h"),
        ("backend/cuda/products.cpp", "platform/memory.h"),
        ("kernels/cuda/rows.cu", "emulator/cuda.h"),
        ("kernels/cuda/rows.cu", "base/error.h"),
        ("backend/cpu/moe.cpp", "model/spec.h"),
        ("kv/kv_store.cpp", "kv/tiers/ram.h"),
        ("kv/kv_store.cpp", "backend/cpu/cpu_backend.h"),
        ("model/text_model.cpp", "engine/state.h"),
        ("model/text_model.cpp", "backend/cpu/cpu_backend.h"),
        ("model/text_model.cpp", "kv/tiers/ram.h"),
        ("engine/engine.cpp", "backend/cpu/cpu_backend.h"),
        ("engine/engine.cpp", "kv/tiers/ram.h"),
        ("engine/engine.cpp", "kernels/cpu/dispatch.h"),
        ("include/puna/engine.h", "engine/state.h"),
        ("bindings/engine.cpp", "kernels/cpu/dispatch.h"),
        ("bindings/engine.cpp", "model/spec.h"),
        ("bench/ops.cpp", "bindings/module.h"),
        ("bench/ops.cpp", "backend/cpu/cpu_backend.h"),
        ("odd/new.cpp", "base/error.h"),  # a folder without a row
    ],
)
def test_a_forbidden_include_is_found(path: str, include: str) -> None:
    assert len(include_violations(path, f'#pragma once\n  # include "{include}"\n')) == 1


@pytest.mark.parametrize(
    ("path", "include"),
    [
        ("io/checkpoint.cpp", "io/message.h"),
        ("backend/cpu/moe.cpp", "kernels/kernel_table.h"),
        ("engine/factory.cpp", "backend/cpu/cpu_backend.h"),
        ("bindings/engine.cpp", "puna/engine.h"),
        ("bench/ops.cpp", "bench.h"),
    ],
)
def test_an_allowed_include_is_not_found(path: str, include: str) -> None:
    assert not include_violations(path, f'#include "{include}"\n')


@pytest.mark.parametrize("header", ["vector", "string", "cmath", "thread", "cstdint"])
def test_the_standard_library_in_kernels_is_found(header: str) -> None:
    assert include_violations("kernels/cpu/gemm-inl.h", f"#include <{header}>\n")
    assert not include_violations("io/message.h", f"#include <{header}>\n")


@pytest.mark.parametrize(
    "line",
    [
        'std::printf("x");',
        'fprintf(stderr, "x");',
        "std::cout << 1;",
        "std::cerr << 1;",
        "abort();",
        "std::terminate();",
        "assert(x);",
        'auto x = "\\"" ; std::exit(1);',
        'const char* x = getenv("X");',
    ],
)
def test_a_forbidden_call_is_found(line: str) -> None:
    assert len(call_violations("io/message.cpp", f"// a comment\n{line}\n")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "// std::cout << 1;",
        "/* abort();\n exit(1) */",
        'fail("printf(");',
        "static_assert(true);",
        'std::snprintf(x, n, "%d", 1);',
        "point.exit_code();",
    ],
)
def test_what_only_looks_like_a_forbidden_call_is_not_found(line: str) -> None:
    assert not call_violations("io/message.cpp", line)


def test_the_environment_is_read_in_one_place() -> None:
    line = 'const char* value = std::getenv("PUNA_ISA");'
    assert not call_violations("base/env.h", line)
    package = (ROOT / "python" / "puna").rglob("*.py")
    assert not [p for p in package if re.search(r"\bos\.(environ|getenv)\b", p.read_text())]


def test_no_source_is_long() -> None:
    sources_ = {
        ".py",
        ".cpp",
        ".h",
        ".inc",
        ".cu",
        ".cuh",
        ".sh",
        ".cmake",
        ".txt",
        ".toml",
        ".jinja",
        ".pyi",
    }
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in tracked()
        if path.suffix in sources_ and (lines := len(path.read_text().splitlines())) > MAX_LINES
    }
    assert not long


# Places that exist on one machine only.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|home|root|Users|tmp)/[\w.-]")


def test_no_file_names_a_place_of_one_machine() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # binary
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in MACHINE_PATH.finditer(text)]
    assert not found
    assert MACHINE_PATH.search("in " + "/ho" + "me/someone/models")
