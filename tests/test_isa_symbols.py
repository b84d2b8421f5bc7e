"""The guard rails around code compiled with an instruction set's own flags."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpp_programs import ROOT

CHECK = ROOT / "tools" / "check_isa_symbols.py"
TABLE = "namespace puna { struct T { int x; }; extern const T kScalar; const T kScalar = {1}; }\n"


def complain(place: Path) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(CHECK), str(place)], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


def compile_scalar(folder: Path, source: str) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert compiler, "the package itself needs a C++ compiler"
    (folder / "scalar.cpp").write_text(source)
    command = [compiler, "-std=c++20", "-c", str(folder / "scalar.cpp")]
    subprocess.run([*command, "-o", str(folder / "scalar.o")], check=True)
    return folder


def test_objects_of_the_build(programs: Path) -> None:
    assert complain(programs / "libpuna_kernels.a") == (0, "")
    assert complain(programs / "CMakeFiles" / "puna_kernels.dir") == (0, "")


def test_a_clean_object_passes(tmp_path: Path) -> None:
    hidden = "namespace { int twice(int x) { return 2 * x; } int (*volatile keep)(int) = twice; }"
    c_function = 'extern "C" float sqrtf(float); namespace { auto* volatile root = sqrtf; }'
    assert complain(compile_scalar(tmp_path, TABLE + hidden + c_function)) == (0, "")


@pytest.mark.parametrize(
    ("extra", "complaint"),
    [
        ("inline int f(int x) { return x + 1; } int (*volatile keep)(int) = f;", "weak symbol"),
        ("template <class T> int g(T x) { return x; } static auto keep = g<int>;\n"
         "namespace puna { namespace { auto h() { return keep(1); } auto use = h(); } }",
         "weak symbol"),
        ("int exported(int x) { return x; }", "exports _Z8exportedi"),
        ("namespace puna { extern const T kMore; const T kMore = {2}; }", "exports 2"),
        ("int other(); static int kept = other();", "runs at load time"),
        ("int other(); namespace puna { namespace { [[gnu::used]] int f() { return other(); } } }",
         "needs _Z5otherv"),
    ],
)  # fmt: skip
def test_what_could_leak_is_found(tmp_path: Path, extra: str, complaint: str) -> None:
    status, text = complain(compile_scalar(tmp_path, TABLE + extra))
    assert status == 1
    assert complaint in text


def test_nothing_to_check_is_an_error(tmp_path: Path) -> None:
    status, text = complain(tmp_path)
    assert status == 1
    assert "no object" in text
