"""The benchmark's lengthened caches of other engines: every row at its place."""

import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

WORKERS = Path(__file__).parent.parent / "bench" / "workers"
LAYERS, KEY, VALUE = 2, 6, 4  # bytes of a row


@pytest.fixture
def repeated_state(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(WORKERS))
    sys.modules.pop("repeated_state", None)
    import repeated_state

    return repeated_state


def _cache(positions: range, cells: int, llama_cpp: bool, transposed: bool) -> bytes:
    """A cache whose row at a position is that of the position modulo `cells`."""
    out = struct.pack("=I", 1) if llama_cpp else b""
    out += struct.pack("=I", len(positions))
    for position in positions:
        out += struct.pack("=i", position)
        out += struct.pack("=Ii", 1, 0) if llama_cpp else struct.pack("=I", 0)
    out += struct.pack("=II", transposed, LAYERS)
    rows = np.asarray(positions) % cells
    generator = np.random.default_rng(3)
    for _ in range(LAYERS):
        keys = generator.integers(0, 256, (cells, KEY), np.uint8)
        out += struct.pack("=iQ", 1, KEY) + keys[rows].tobytes()
    for _ in range(LAYERS):
        values = generator.integers(0, 256, (cells, VALUE // 2, 2), np.uint8)
        if transposed:
            out += struct.pack("=iII", 1, 2, VALUE // 2)
            out += values[rows].transpose(1, 0, 2).tobytes()
        else:
            out += struct.pack("=iQ", 1, VALUE) + values[rows].tobytes()
    return out


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("length", [5, 16, 17, 100])
def test_rows_are_repeated(repeated_state: ModuleType, length: int, transposed: bool) -> None:
    cells, chunk = 5, 16
    last_chunk = range((length - 1) // chunk * chunk, length)

    def llama_cpp(all_positions: range, local: range) -> bytes:
        caches = [
            _cache(positions, cells, True, transposed) for positions in (all_positions, local)
        ]
        return b"magic..." + b"".join(caches)

    def ik(positions: range) -> bytes:
        return _cache(positions, cells, False, transposed) + b"end"

    short = range(cells)
    for layout, state, longer in [
        (
            repeated_state.llama_cpp(chunk),
            llama_cpp(short, short),
            llama_cpp(range(length), last_chunk),
        ),
        (repeated_state.ik_llama_cpp(), ik(short), ik(range(length))),
    ]:
        result = repeated_state.repeated(np.frombuffer(state, np.uint8), length, layout)
        assert result.tobytes() == longer


def test_another_form_is_refused(repeated_state: ModuleType) -> None:
    layout = repeated_state.ik_llama_cpp()
    state = np.frombuffer(_cache(range(5), 5, False, False), np.uint8)
    with pytest.raises(ValueError, match="ends at byte"):
        repeated_state.repeated(state[:-1], 9, layout)
    with pytest.raises(ValueError, match="positions 0, 1"):
        repeated_state.repeated(
            np.frombuffer(_cache(range(1, 6), 5, False, False), np.uint8), 9, layout
        )
    with pytest.raises(ValueError, match="5 streams"):
        repeated_state.repeated(
            np.concatenate([np.zeros(8, np.uint8), state]), 9, repeated_state.llama_cpp(16)
        )
