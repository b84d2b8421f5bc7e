"""Random numbers that are the same on every machine and with every version of NumPy.

NumPy promises that the raw stream of a bit generator never changes, and promises nothing about the
distributions made of it. So these use the raw stream alone, and integer arithmetic.
"""

from __future__ import annotations

import math
import zlib

import numpy as np


def _stream(name: str, seed: int, count: int) -> np.ndarray:
    """`count` raw 64-bit integers that belong to `name` and `seed`."""
    return np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(count)


def integers(name: str, seed: int, count: int, below: int) -> np.ndarray:
    """int64 [count], 0 <= each < below."""
    return (_stream(name, seed, count) % np.uint64(below)).astype(np.int64)


def normal(name: str, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1, nearly normal: each is the sum of four uniform numbers."""
    bits = _stream(name, seed, math.prod(shape))
    quarters = [(bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48)]
    # Four uniform integers below 2^16 have the mean 2 * (2^16 - 1) and the variance
    # 4 * (2^32 - 1) / 12.
    centred = sum(q.astype(np.int64) for q in quarters) - 2 * 0xFFFF
    return (centred / math.sqrt((2**32 - 1) / 3)).astype(np.float32).reshape(shape)
