"""Checks the objects of the instruction sets: check_isa_symbols.py BUILD_DIR_OR_ARCHIVE.

Each kernels/cpu/isa/<name>.cpp is compiled with flags of its own. Whatever the linker could take
from such an object for another part of the program, or would run while the program is loaded, ends
the process on a processor without that instruction set. So an object may

- define one symbol that others see: its kernel table, as data;
- define no weak symbol (an inline function of a library, a template) that may be picked for all;
- need nothing from C++ but the questions of kernels/cpu/cpu_features.h and the table of another
  instruction set (C functions are fine);
- run nothing at load time (no dynamic initialisation).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ISA_SOURCES = Path(__file__).parent.parent / "csrc" / "kernels" / "cpu" / "isa"
TABLE = re.compile(r"_ZN4puna\d+k[A-Za-z0-9]+E")  # puna::k<Name>
QUESTION = re.compile(r"_ZN4puna\d+has_[a-z0-9_]+Ev")  # puna::has_<feature>()
WEAK_TYPES = "wWvVu"  # u: one for the whole process
DATA_TYPES = "DRBG"
INITIALIZERS = ("_GLOBAL__sub_I", "__cxx_global_var_init", "__static_initialization")

Symbol = tuple[str, str]  # name, type letter of nm


def symbols_by_object(file: Path) -> dict[str, list[Symbol]]:
    """Symbols of an object, or of each member of an archive."""
    listing = subprocess.run(
        ["nm", "--format=posix", str(file)], capture_output=True, text=True, check=True
    ).stdout
    objects: dict[str, list[Symbol]] = {}
    current = file.name
    for line in listing.splitlines():
        member = re.fullmatch(r".*\[(.+)\]:", line)  # archive.a[member.o]:
        if member:
            current = member[1]
        elif line.strip():
            name, kind = line.split()[:2]
            objects.setdefault(current, []).append((name, kind))
    return objects


def complaints(symbols: list[Symbol]) -> list[str]:
    """What is wrong with one object of an instruction set."""
    found = []
    tables = []
    for name, kind in symbols:
        if kind == "U":
            known = QUESTION.fullmatch(name) or TABLE.fullmatch(name)
            if name.startswith("_Z") and not known:
                found.append(f"needs {name} from elsewhere")
        elif kind in WEAK_TYPES:
            found.append(f"weak symbol {name}")
        elif any(part in name for part in INITIALIZERS):
            found.append(f"runs at load time: {name}")
        elif kind.isupper():
            if kind in DATA_TYPES and TABLE.fullmatch(name):
                tables.append(name)
            else:
                found.append(f"exports {name} (type {kind})")
    if len(tables) != 1:
        found.append(f"must export one kernel table, exports {len(tables)}")
    return found


def isa_objects(place: Path, names: set[str]) -> dict[str, list[Symbol]]:
    """Objects of the sources `names` (without suffix) in an archive or anywhere under a folder."""
    wanted = {f"{name}{suffix}" for name in names for suffix in (".o", ".cpp.o")}
    files = [place]
    if place.is_dir():
        files = sorted(path for path in place.rglob("*.o") if path.name in wanted)
    found: dict[str, list[Symbol]] = {}
    for file in files:
        for member, symbols in symbols_by_object(file).items():
            if member in wanted:
                found[f"{file}[{member}]" if member != file.name else str(file)] = symbols
    return found


def main() -> int:
    """Prints what is wrong; the exit status is 1 then, or if there is nothing to check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", type=Path, help="build folder or static library")
    place = parser.parse_args().place
    objects = isa_objects(place, {source.stem for source in ISA_SOURCES.glob("*.cpp")})
    if not objects:
        print(f"no object of {ISA_SOURCES.name}/*.cpp in {place}", file=sys.stderr)
        return 1
    wrong = [f"{name}: {text}" for name, symbols in objects.items() for text in complaints(symbols)]
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
