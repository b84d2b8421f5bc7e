"""Lengthens the saved state of a llama.cpp or ik_llama.cpp sequence by repeating its rows.

What one token costs at a depth does not depend on the values in the cache, and computing a prompt
of 128k tokens takes these engines hours. So a short prompt is computed, its state saved, and a
state with its keys and values again and again is read back. Both write a sequence as
`llama_kv_cache::state_write` of llama.cpp and `write_kv_cache` of ik_llama.cpp do: for each cache
the number of cells, their positions, then the keys and the values of each layer. A field that is
not as expected fails here or when the state is read back: both check types, row sizes and the end.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """What differs between the engines."""

    header: int  # bytes before the first cache
    cell: int  # bytes about a cell after its position
    streams: bool  # a cache begins with its number of streams, which is 1
    # For each cache, which positions it holds of so many tokens.
    caches: tuple[Callable[[int], range], ...]


def llama_cpp(chunk: int) -> Layout:
    """A cache of the global layers, then one of the local ones, which hold the last chunk only."""

    def last_chunk(length: int) -> range:
        return range((length - 1) // chunk * chunk, length)

    # A magic number and the sequence; of a cell the number of its sequences, 1, and that one.
    return Layout(8, 8, True, (range, last_chunk))


def ik_llama_cpp() -> Layout:
    """One cache for all layers; of a cell the number of its sequences, 0 for the one asked for."""
    return Layout(0, 4, False, (range,))


def repeated(state: Bytes, length: int, layout: Layout) -> Bytes:
    """The state of `length` tokens whose keys and values are those of `state`, over and over.

    Args:
        state: Of a sequence with the positions 0, 1, ..., all of them in every cache.
        length: Tokens of the result.
        layout: Of the engine that wrote it.
    """
    copy = _Copy(state)
    copy.bytes(layout.header)
    for positions in layout.caches:
        _repeat_cache(copy, np.asarray(positions(length)), layout)
    copy.bytes(copy.left)
    return copy.joined()


def _repeat_cache(copy: _Copy, positions: NDArray[np.int64], layout: Layout) -> None:
    if layout.streams and (streams := copy.number("I")) != 1:
        raise ValueError(f"the cache has {streams} streams, not 1")
    cells = copy.number("I", len(positions))
    record = np.dtype([("position", "<i4"), ("sequences", f"V{layout.cell}")])
    saved = copy.taken(cells * record.itemsize).view(record)
    if not np.array_equal(saved["position"], np.arange(cells)):
        raise ValueError("the cells of the state are not at the positions 0, 1, ...")
    records = np.repeat(saved[:1], len(positions))
    records["position"] = positions
    copy.added(records.view(np.uint8))

    rows = positions % cells
    transposed, layers = copy.number("I"), copy.number("I")
    for _ in range(layers):
        copy.number("i")  # the type of the keys
        copy.repeated((cells, copy.number("Q")), rows, 0)
    for _ in range(layers):
        copy.number("i")  # the type of the values
        if transposed:
            element, width = copy.number("I"), copy.number("I")
            copy.repeated((width, cells, element), rows, 1)
        else:
            copy.repeated((cells, copy.number("Q")), rows, 0)


class _Copy:
    """Reads a state from its beginning and collects what becomes of it.

    Nothing large is held twice: the pieces are made when their places are known.
    """

    def __init__(self, state: Bytes) -> None:
        self._state, self._at = state, 0
        self._pieces: list[tuple[int, Callable[[Bytes], None]]] = []

    @property
    def left(self) -> int:
        """Bytes that were not read."""
        return self._state.size - self._at

    def taken(self, count: int) -> Bytes:
        """The next bytes, which do not go into the result."""
        if count > self.left:
            raise ValueError(f"the state ends at byte {self._state.size}, {count} more are read")
        self._at += count
        return self._state[self._at - count : self._at]

    def added(self, data: Bytes) -> None:
        """Bytes of the result alone."""
        self._pieces.append((data.size, lambda out: np.copyto(out, data)))

    def bytes(self, count: int) -> None:
        """The next bytes, as they are."""
        self.added(self.taken(count))

    def number(self, kind: str, instead: int | None = None) -> int:
        """The next whole number, of this kind of `struct`; another one goes into the result."""
        value = struct.unpack("=" + kind, self.taken(struct.calcsize("=" + kind)))[0]
        written = struct.pack("=" + kind, value if instead is None else instead)
        self.added(np.frombuffer(written, np.uint8))
        return int(value)

    def repeated(self, shape: tuple[int, ...], rows: NDArray[np.int64], axis: int) -> None:
        """The next array, of bytes, with these of its rows along an axis."""
        data = self.taken(int(np.prod(shape))).reshape(shape)
        longer = (*shape[:axis], len(rows), *shape[axis + 1 :])

        def fill(out: Bytes) -> None:
            np.take(data, rows, axis=axis, out=out.reshape(longer), mode="clip")

        self._pieces.append((int(np.prod(longer)), fill))

    def joined(self) -> Bytes:
        """The result."""
        result = np.empty(sum(size for size, _ in self._pieces), np.uint8)
        at = 0
        for size, fill in self._pieces:
            fill(result[at : at + size])
            at += size
        return result
