"""float8 e4m3 (the form without infinities) by its definition, in NumPy alone."""

from __future__ import annotations

import numpy as np

_CODES = np.arange(128)
_EXPONENT, _MANTISSA = _CODES >> 3, _CODES & 7
_MAGNITUDES = np.where(
    _EXPONENT == 0,
    np.ldexp(_MANTISSA.astype(float), -9),
    np.ldexp(8.0 + _MANTISSA, _EXPONENT - 10),
)
_MAGNITUDES[127] = np.nan
# The value of every code, float32 [256].
VALUES = np.concatenate([_MAGNITUDES, -_MAGNITUDES]).astype(np.float32)
MOST = np.float32(448)


def encode(values: np.ndarray) -> np.ndarray:
    """uint8: the nearest code, the even one of two, the largest beyond it."""
    magnitude = np.minimum(np.abs(values.astype(np.float64)), MOST)
    above = np.searchsorted(_MAGNITUDES[:127], magnitude)  # magnitude <= value of `above`
    below = np.maximum(above - 1, 0)
    up, down = _MAGNITUDES[above] - magnitude, magnitude - _MAGNITUDES[below]
    nearest = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return (nearest | np.where(np.signbit(values), 128, 0)).astype(np.uint8)


def quantise(values: np.ndarray, axes: int | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 of the shape of `values`, and scales float32 that share the elements of `axes`.

    The dimensions of `axes` are 1 in the scales; `VALUES[codes] * scales` is what they mean.
    """
    scales = (np.abs(values).max(axis=axes, keepdims=True) / MOST).astype(np.float32)
    return encode(values / scales), scales
