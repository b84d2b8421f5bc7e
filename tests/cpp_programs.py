"""Builds of the C++ tests, one program per file tests/cpp/*_test.cpp."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
HAS_EMULATOR = platform.machine() == "x86_64"  # of CUDA
PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "tests" / "cpp").glob("*_test.cpp")
    if HAS_EMULATOR or not path.stem.startswith("cuda_")
)


class Build:
    """A build of C++ tests, which goes on by itself; the next of the same folder is incremental."""

    def __init__(self, folder: Path, *definitions: str, programs: Sequence[str] = PROGRAMS) -> None:
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        assert cmake and ninja, "cmake and ninja are missing: pip install '.[test]' brings them"
        configure = [cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder)]
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += ["-DPUNA_BUILD_TESTS=ON", "-DPUNA_CUDA=off", *definitions]
        # The folder may be one in which the wheel was built, with what pip has removed since.
        configure += ["-USKBUILD", "-UPUNA_JSON_INCLUDE"]
        both = (configure, [cmake, "--build", str(folder), "--target", *programs])
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._log = folder, folder / "build.log"
        # Behind the tests that run meanwhile; and in a session of its own, to be ended whole.
        command = ["nice", "sh", "-c", " && ".join(map(shlex.join, both))]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> Path:
        """Until it is done; the folder of the programs."""
        assert self._process.wait() == 0, self._log.read_text()[-8000:]
        return self._folder

    def end(self) -> None:
        """Also if it is not done."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()


def build(folder: Path, *definitions: str, programs: Sequence[str] = PROGRAMS) -> Path:
    """Configures and builds C++ tests."""
    started = Build(folder, *definitions, programs=programs)
    try:
        return started.wait()
    finally:
        started.end()
