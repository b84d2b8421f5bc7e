"""Request keywords: defaults, checks, and hints for names that other engines use."""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puna.errors import InvalidRequest

# One name per thing. What other engines call it, and what it is called here.
FOREIGN_NAMES: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "max_length": "max_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_token_ids": "stop",
    "eos_token_id": "stop",
    "num_return_sequences": "n",
    "do_sample": "temperature (0 = greedy)",
    "random_seed": "seed",
    "top_logprobs": "logprobs",
    "n_ctx": "context, an argument of load()",
    "max_model_len": "context, an argument of load()",
    "num_ctx": "context, an argument of load()",
    "n_threads": "threads, an argument of load()",
    "num_threads": "threads, an argument of load()",
    "n_gpu_layers": "experts, an argument of load()",
    "quantization": "quant, an argument of load()",
    "load_in_4bit": 'quant="int4", an argument of load()',
    "load_in_8bit": 'quant="int8", an argument of load()',
    "dtype": "quant, an argument of load()",
    "kv_cache_dtype": "kv, an argument of load()",
    "cache_dtype": "kv, an argument of load()",
    "model_path": "the first argument of load()",
}

_SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "logprobs",
    "n",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "ignore_eos",
    "timeout",
)


def unknown_keyword(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that `function` does not have, with the name that was probably meant."""
    hint = FOREIGN_NAMES.get(name)
    if hint is None:
        close = difflib.get_close_matches(name, list(known), n=1)
        hint = close[0] if close else None
    ending = f"; did you mean {hint}?" if hint else ""
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{ending}")


@dataclass(frozen=True, slots=True)
class Request:
    """Checked keywords of one request, ready for the core."""

    core: Mapping[str, Any]
    n: int
    timeout: float | None
    seed: int


def parse_request(
    function: str,
    keywords: Mapping[str, Any],
    defaults: Mapping[str, float],
    other: Iterable[str] = (),
) -> Request:
    """Checks the keywords shared by generate, chat and stream.

    Args:
        function: Name of the caller, for messages.
        keywords: What the user passed.
        defaults: The checkpoint's own sampling defaults (temperature, top_p, top_k), where it has any.
        other: Further keyword names the caller accepts, for "did you mean".

    Raises:
        TypeError: A name that does not exist, with a hint.
        InvalidRequest: A value of the wrong type or out of range.
    """
    for name in keywords:
        if name not in _SAMPLING_NAMES:
            raise unknown_keyword(function, name, (*_SAMPLING_NAMES, *other))
    given = {name: value for name, value in keywords.items() if value is not None}
    core: dict[str, Any] = {
        "temperature": _number(given, "temperature", defaults.get("temperature", 0.6)),
        "top_p": _number(given, "top_p", defaults.get("top_p", 0.9)),
        "top_k": _integer(given, "top_k", int(defaults.get("top_k", 0)), 0),
        "min_p": _number(given, "min_p", 0.0),
        "repetition_penalty": _number(given, "repetition_penalty", 1.0),
        "presence_penalty": _number(given, "presence_penalty", 0.0),
        "frequency_penalty": _number(given, "frequency_penalty", 0.0),
        "min_tokens": _integer(given, "min_tokens", 0, 0),
        "max_tokens": _integer(given, "max_tokens", 0, 1),
        "ignore_eos": bool(given.get("ignore_eos", False)),
    }
    logprobs = given.get("logprobs", False)
    core["want_logprobs"] = logprobs is not False
    core["logprobs"] = 0 if isinstance(logprobs, bool) else _integer(given, "logprobs", 0, 0)
    core["stop"], core["stop_ids"] = _stops(given.get("stop", ()))
    core["logit_bias"] = _logit_bias(given.get("logit_bias", {}))
    seed = given.get("seed")
    core["seed"] = secrets.randbits(63) if seed is None else _integer(given, "seed", 0, 0)
    if core["seed"] >= 1 << 64:
        raise InvalidRequest(f"seed is {core['seed']}; it must be below 2**64", param="seed")
    timeout = _number(given, "timeout", None)
    if timeout is not None and not timeout > 0:
        raise InvalidRequest(f"timeout is {timeout} s; it must be above 0", param="timeout")
    return Request(core, _integer(given, "n", 1, 1), timeout, core["seed"])


def _number(given: Mapping[str, Any], name: str, default: Any) -> Any:
    value = given.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} is {value!r}; it must be a number", param=name)
    return float(value)


def _integer(given: Mapping[str, Any], name: str, default: int, least: int) -> int:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidRequest(f"{name} is {value!r}; it must be a whole number", param=name)
    value = value.__index__()
    if value < least:
        raise InvalidRequest(f"{name} is {value}; it must be {least} or more", param=name)
    return value


def _stops(stop: Any) -> tuple[list[str], list[int]]:
    """Splits `stop` (a string, an id, or a mixture in a list) into strings and token ids."""
    items = [stop] if isinstance(stop, str | int) else list(stop)
    texts = [item for item in items if isinstance(item, str)]
    ids = [item for item in items if isinstance(item, int) and not isinstance(item, bool)]
    if len(texts) + len(ids) != len(items):
        raise InvalidRequest(f"stop is {stop!r}; it must hold strings or token ids", param="stop")
    if "" in texts:
        raise InvalidRequest("stop holds an empty string; leave it out", param="stop")
    return texts, ids


def _logit_bias(bias: Any) -> list[tuple[int, float]]:
    if not isinstance(bias, Mapping):
        raise InvalidRequest(
            f"logit_bias is {type(bias).__name__}; it must map token ids to numbers",
            param="logit_bias",
        )
    try:
        return [(int(token), float(value)) for token, value in bias.items()]
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"logit_bias is {bias!r}; it must map token ids to numbers", param="logit_bias"
        ) from error
