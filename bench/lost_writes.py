"""What a machine finds after its power failed: files without what was not synced.

`preload()` gives the environment of a process whose syncs are remembered (lost_writes.c); after
it was killed, `LostWrites.lose()` makes the directory as it could be then. What was synced is
there. Of everything else any part is: of the names in a directory that changed since it was
synced, each is as before or as after; of the bytes of a file, each block.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
from pathlib import Path

_BLOCK = 4096


def preload(build: Path, watched: Path, durable: Path) -> dict[str, str]:
    """Builds the library in a directory; variables for processes whose syncs are remembered."""
    library = build / "lost_writes.so"
    compiler = shutil.which("cc") or "gcc"
    source = Path(__file__).with_name("lost_writes.c")
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(library), str(source)]
    subprocess.run([*command, "-ldl"], check=True)
    return {
        "LD_PRELOAD": str(library),
        "LOST_WRITES_WATCHED": str(watched),
        "LOST_WRITES_DURABLE": str(durable),
    }


class LostWrites:
    """A directory whose changes are lost unless they were synced."""

    def __init__(self, watched: Path, durable: Path) -> None:
        """`watched` and `durable` as for preload()."""
        self._watched, self._durable = watched, durable
        self._places: dict[str, Path] = {}
        self.names = self.blocks = 0  # lost so far

    def start(self) -> None:
        """An empty directory, durable as it is."""
        for path in (self._watched, self._durable):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

    def lose(self, choice: random.Random) -> None:
        """Puts what a crash leaves in the place of the directory; all of that is durable then."""
        self._places = {_identity(path): path for path in _below(self._watched)}
        after = self._watched.with_name(self._watched.name + ".after")
        self._fill_directory(_identity(self._watched), after, choice)
        shutil.rmtree(self._watched)
        after.rename(self._watched)
        shutil.rmtree(self._durable)
        self._durable.mkdir()
        for path in [self._watched, *_below(self._watched)]:
            identity = _identity(path)
            if path.is_dir():
                lines = "".join(f"{_identity(entry)} {entry.name}\n" for entry in path.iterdir())
                (self._durable / f"directory.{identity}").write_text(lines)
            else:
                shutil.copyfile(path, self._durable / f"file.{identity}")

    def _fill(self, identity: str, after: Path, choice: random.Random) -> None:
        """Makes `after` what is left of a file or directory."""
        place = self._places.get(identity)
        was_directory = (self._durable / f"directory.{identity}").exists()
        if was_directory or (place is not None and place.is_dir()):
            self._fill_directory(identity, after, choice)
        else:
            self._fill_file(identity, after, choice)

    def _fill_directory(self, identity: str, after: Path, choice: random.Random) -> None:
        after.mkdir()
        kept = self._durable / f"directory.{identity}"
        lines = kept.read_text().splitlines() if kept.exists() else []
        before = {name: entry for entry, name in (line.split(" ", 1) for line in lines)}
        place = (
            self._watched if after.parent == self._watched.parent else self._places.get(identity)
        )
        now = {entry.name: _identity(entry) for entry in place.iterdir()} if place else {}
        for name in sorted(before.keys() | now.keys()):
            entry = now.get(name)
            if before.get(name) != entry and choice.random() < 0.5:
                entry = before.get(name)
                self.names += 1
            if entry is not None:
                self._fill(entry, after / name, choice)

    def _fill_file(self, identity: str, after: Path, choice: random.Random) -> None:
        kept = self._durable / f"file.{identity}"
        place = self._places.get(identity)
        before = kept.read_bytes() if kept.exists() else b""
        now = before if place is None else place.read_bytes()
        content = bytearray(now if len(now) == len(before) or choice.random() < 0.5 else before)
        for at in range(0, len(content), _BLOCK):
            old, new = (data[at : at + _BLOCK].ljust(_BLOCK, b"\0") for data in (before, now))
            if old == new:
                continue
            lost = choice.random() < 0.5
            self.blocks += lost
            end = min(at + _BLOCK, len(content))
            content[at:end] = (old if lost else new)[: end - at]
        after.write_bytes(content)


def _below(directory: Path) -> list[Path]:
    return [
        Path(root) / name for root, folders, files in os.walk(directory) for name in folders + files
    ]


class _Statx(ctypes.Structure):
    """As far as it is read; statx(2)."""

    _fields_ = (
        ("head", ctypes.c_ubyte * 32),
        ("inode", ctypes.c_uint64),
        ("sizes_and_access", ctypes.c_ubyte * 40),
        ("made_seconds", ctypes.c_int64),
        ("made_nanoseconds", ctypes.c_uint32),
        ("rest", ctypes.c_ubyte * 164),
    )


_libc = ctypes.CDLL(None, use_errno=True)


def _identity(path: Path) -> str:
    """The inode and when it was made, as the library writes them."""
    at_working_directory, no_follow, basic_and_made = -100, 0x100, 0xFFF
    status = _Statx()
    name = os.fsencode(path)
    if _libc.statx(at_working_directory, name, no_follow, basic_and_made, ctypes.byref(status)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return f"{status.inode}.{status.made_seconds}.{status.made_nanoseconds}"
