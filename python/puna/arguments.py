"""Checks of arguments: prompts, token ids, amounts. What is wrong is said with its value."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from puna.errors import InvalidRequest


def truth(name: str, value: Any) -> bool:
    """A keyword that is True or False, and nothing that merely counts as one of them.

    Raises:
        InvalidRequest: It is something else.
    """
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be True or False", param=name)
    return value


def index(value: Any) -> int | None:
    """What is a whole number, of Python's or NumPy's, as an int; None if it is something else."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:  # arrays have __index__, too, and refuse it
        return None


def token_id(token: Any, vocab_size: int, where: str, param: str) -> int:
    """A token id that exists.

    Args:
        token: What was given.
        vocab_size: Number of token ids.
        where: What holds it, for the message.
        param: The argument it came with.

    Raises:
        InvalidRequest: It is no whole number, or the vocabulary has no such id.
    """
    number = index(token)
    if number is None:
        raise InvalidRequest(
            f"{where} is {token!r:.80}; a token id must be a whole number", param=param
        )
    if not 0 <= number < vocab_size:
        raise InvalidRequest(
            f"{where} is {number}; the vocabulary has the ids 0 to {vocab_size - 1}", param=param
        )
    return number


# Sequences of numbers, or of texts, that are meant as texts.
TEXTS = (str, bytes, bytearray, memoryview)


def is_ids(prompt: Any) -> bool:
    """Whether `prompt` is a sequence of token ids."""
    if hasattr(prompt, "__array__"):
        return np.ndim(prompt) == 1
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, TEXTS)
        and len(prompt) > 0
        and hasattr(prompt[0], "__index__")
        and np.ndim(prompt[0]) == 0  # arrays have __index__, too
    )


def is_batch(prompt: Any) -> bool:
    """Whether `prompt` is a list of prompts.

    Raises:
        InvalidRequest: It is neither a prompt nor a list of some.
    """
    if isinstance(prompt, str) or is_ids(prompt):
        return False
    if isinstance(prompt, Sequence) and not isinstance(prompt, TEXTS):
        return True
    raise InvalidRequest(
        f"the prompt is of type {type(prompt).__name__}; "
        "it must be text, token ids, or a list of either",
        param="prompt",
    )


def ids_of(prompt: Any) -> Any:
    """A prompt that must be a sequence of token ids, since it is no text.

    Raises:
        InvalidRequest: It is something else.
    """
    if isinstance(prompt, Mapping):
        raise InvalidRequest(
            "the prompt holds messages; use chat(), which applies the model's template",
            param="prompt",
        )
    if not is_ids(prompt):
        raise InvalidRequest(
            f"the prompt is {prompt!r:.80}; it must be text or a non-empty list of token ids",
            param="prompt",
        )
    return prompt


def token_ids(ids: Any, vocab_size: int, param: str) -> list[int]:
    """Checked ids, from a sequence or an array of them.

    Raises:
        InvalidRequest: The array has another shape or type, or an id does not exist.
    """
    if hasattr(ids, "__array__"):
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise InvalidRequest(
                f"{param} is an array of {array.dtype} {array.shape}; "
                "it must be one-dimensional and of integers",
                param=param,
            )
        ids = array.tolist()
    return [token_id(item, vocab_size, f"{param}[{i}]", param) for i, item in enumerate(ids)]


def array_of(name: str, values: Any, dtype: DTypeLike | None = None) -> NDArray[Any]:
    """Values as an array, its rows one after the other.

    Raises:
        InvalidRequest: They make none, or none of that type.
    """
    try:
        return np.asarray(values, dtype, order="C")
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidRequest(f"{name} is no array of numbers: {error}", param=name) from error


def tiles_array(pixel_values: ArrayLike) -> NDArray[np.float32]:
    """Normalised tiles [tiles, 3, S, S].

    Raises:
        InvalidRequest: It is no array of numbers, or the shape is another.
    """
    pixels = array_of("pixel_values", pixel_values, np.float32)
    if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.shape[2] != pixels.shape[3]:
        raise InvalidRequest(
            f"pixel_values has shape {pixels.shape}; it must be (tiles, 3, size, size)",
            param="pixel_values",
        )
    return pixels


def place(name: str, path: str | os.PathLike[str]) -> Path:
    """A path that a file can have, its "~" resolved.

    Raises:
        InvalidRequest: It is empty, or the home directory or the name cannot be.
    """
    text = os.fspath(path)
    if text == "":
        raise InvalidRequest(f"{name} is empty; it must be a path", param=name)
    try:
        resolved = Path(text).expanduser()
        os.fspath(resolved).encode()
    except (RuntimeError, UnicodeEncodeError) as error:
        raise InvalidRequest(
            f"{name} is {text!r:.200}, which cannot be a path here: {error}", param=name
        ) from error
    if "\0" in text:
        raise InvalidRequest(
            f"{name} is {text!r:.200}; a path holds no null characters", param=name
        )
    return resolved


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def amount(name: str, value: int | str | None) -> int:
    """A count given as a number or like "128k", "24GiB"; 0 if not given."""
    if value is None:
        return 0
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,30}(?:\.\d{1,30})?)\s*([kmgt]?)(?:i?b)?\s*", value.lower())
        if match is None:
            raise InvalidRequest(
                f'{name} is {value!r:.80}; write a number, or one like "128k" or "24G"', param=name
            )
        value = int(Fraction(match[1]) * _UNITS[match[2]])
    return whole(name, value)


_INT64 = (1 << 63) - 1


def whole(name: str, value: Any, most: int = _INT64) -> int:
    """A whole number from 1 to `most`; 0 if not given."""
    if value is None:
        return 0
    number = index(value)
    if number is None or number < 1:
        raise InvalidRequest(
            f"{name} is {value!r:.80}; it must be a whole number of 1 or more", param=name
        )
    if number > most:
        raise InvalidRequest(f"{name} is {number}; it must be at most {most}", param=name)
    return number


def count(name: str, value: Any) -> int:
    """A whole number from 0 on that may be left out of no call."""
    number = index(value)
    if number is None or not 0 <= number <= _INT64:
        raise InvalidRequest(
            f"{name} is {value!r:.80}; it must be a whole number of 0 or more", param=name
        )
    return number


def quant_recipe(quant: Any) -> tuple[str, list[tuple[str, str]]]:
    """The recipe ("" = as stored) and the overrides, in order, of a `quant` argument."""
    if quant is None:
        return "", []
    if isinstance(quant, str):
        return quant, []
    if isinstance(quant, Mapping) and all(
        isinstance(text, str) for pair in quant.items() for text in pair
    ):
        return quant.get("default", ""), [item for item in quant.items() if item[0] != "default"]
    raise InvalidRequest(
        f'quant is {quant!r:.80}; it must be a string like "int4", or a mapping of patterns to '
        'formats like {"default": "int4", "layers.0.*": "int8"}',
        param="quant",
    )
