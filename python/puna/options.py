"""Request keywords: defaults, checks, and hints for names that other engines use."""

from __future__ import annotations

import difflib
import math
import numbers
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from puna.arguments import index, token_id, truth
from puna.attention import Attention
from puna.errors import InvalidRequest

SAMPLING_NAMES = (
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
    "attention",
)
LOAD_NAMES = (
    "quant",
    "context",
    "kv",
    "kv_offload",
    "device",
    "stream",
    "experts",
    "memory",
    "host_memory",
    "threads",
    "vision",
    "mmproj",
    "isa",
    "progress",
)

# One name per thing. What other engines call it, and what it is called here.
FOREIGN_NAMES: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "max_length": "max_tokens",
    "min_new_tokens": "min_tokens",
    "temp": "temperature",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
    "stop_strings": "stop",
    "stop_token_ids": "stop",
    "eos_token_id": "stop",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "top_logprobs": "logprobs",
    "n_ctx": "context",
    "max_model_len": "context",
    "num_ctx": "context",
    "ctx_size": "context",
    "n_threads": "threads",
    "num_threads": "threads",
    "device_map": "device",
    "n_gpu_layers": "experts",
    "n_cpu_moe": "experts",
    "cpu_moe": "experts",
    "quantization": "quant",
    "dtype": "quant",
    "torch_dtype": "quant",
    "kv_cache_dtype": "kv",
    "cache_dtype": "kv",
    "type_k": "kv",
}
# What is no keyword here at all.
FOREIGN_WAYS: Mapping[str, str] = {
    "do_sample": "temperature=0 is greedy",
    "stream": "use the method stream()",
    "streamer": "use the method stream()",
    "prompt_logprobs": "use the method score()",
    "load_in_4bit": "see quant, an argument of load()",
    "load_in_8bit": "see quant, an argument of load()",
    "model_path": "the model is the first argument of load()",
    "pretrained_model_name_or_path": "the model is the first argument of load()",
    "system": 'use chat() with a message {"role": "system", "content": ...}',
    "system_prompt": 'use chat() with a message {"role": "system", "content": ...}',
}

# A turn that meets no end-of-turn token stops here unless max_tokens says otherwise.
_DEFAULT_MAX_TOKENS = 4096
_INT64 = (1 << 63) - 1
_MOST_N = 1 << 16  # to one prompt: a session each, of some kilobytes before its first token
_UINT64 = (1 << 64) - 1


def unknown_keyword(function: str, name: str, known: Iterable[str]) -> TypeError:
    """The error for a keyword that `function` does not have, with what was probably meant."""
    known = tuple(known)
    way = FOREIGN_WAYS.get(name)
    meant = name if name in SAMPLING_NAMES + LOAD_NAMES else FOREIGN_NAMES.get(name)
    if meant is None and way is None:
        close = difflib.get_close_matches(name, known, n=1)
        meant = close[0] if close else None
    if way is not None:
        hint = f"; {way}"
    elif meant is None:
        hint = ""
    elif meant in known:
        hint = f"; did you mean {meant}?"
    else:
        place = "load()" if meant in LOAD_NAMES else "generate(), chat() and stream()"
        hint = f"; {meant} is an argument of {place}"
    return TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")


@dataclass(frozen=True, slots=True)
class Request:
    """Checked keywords of one request, ready for the core."""

    core: Mapping[str, Any]
    n: int
    timeout: float | None
    seed: int
    attention: Attention


def parse_request(
    function: str,
    keywords: Mapping[str, Any],
    defaults: Mapping[str, float],
    vocab_size: int,
    other: Iterable[str] = (),
) -> Request:
    """Checks names and types of the keywords shared by generate, chat and stream.

    Ranges that sampling gives its options are checked by the core.

    Args:
        function: Name of the caller, for messages.
        keywords: What the user passed.
        defaults: The checkpoint's own temperature, top_p and top_k, where it has any.
        vocab_size: Number of token ids.
        other: Further keyword names the caller accepts, for "did you mean".

    Raises:
        TypeError: A name that does not exist, with a hint.
        InvalidRequest: A value of the wrong type, or a token id that does not exist.
    """
    for name in keywords:
        if name not in SAMPLING_NAMES:
            raise unknown_keyword(function, name, (*SAMPLING_NAMES, *other))
    given = {name: value for name, value in keywords.items() if value is not None}
    min_tokens = _integer(given, "min_tokens", 0, 0)
    core: dict[str, Any] = {
        "temperature": _number(given, "temperature", defaults.get("temperature", 0.6)),
        "top_p": _number(given, "top_p", defaults.get("top_p", 0.9)),
        "top_k": _integer(given, "top_k", int(defaults.get("top_k", 0)), 0),
        "min_p": _number(given, "min_p", 0.0),
        "repetition_penalty": _number(given, "repetition_penalty", 1.0),
        "presence_penalty": _number(given, "presence_penalty", 0.0),
        "frequency_penalty": _number(given, "frequency_penalty", 0.0),
        "min_tokens": min_tokens,
        "max_tokens": _integer(given, "max_tokens", max(_DEFAULT_MAX_TOKENS, min_tokens), 1),
        "ignore_eos": truth("ignore_eos", given.get("ignore_eos", False)),
        "seed": _integer(given, "seed", secrets.randbits(63), 0, _UINT64),
    }
    logprobs = given.get("logprobs", False)
    core["want_logprobs"] = logprobs is not False
    core["logprobs"] = (
        0 if isinstance(logprobs, bool) else _integer(given, "logprobs", 0, 0, vocab_size)
    )
    core["stop"], core["stop_ids"] = _stops(given.get("stop", ()), vocab_size)
    core["logit_bias"] = _logit_bias(given.get("logit_bias", {}), vocab_size)
    timeout = None if "timeout" not in given else _number(given, "timeout", 0.0)
    if timeout is not None and not timeout > 0:
        raise InvalidRequest(f"timeout is {timeout} s; it must be above 0", param="timeout")
    attention = given.get("attention", Attention.exact())
    if not isinstance(attention, Attention):
        raise InvalidRequest(
            f"attention is {attention!r:.80}; it must be a puna.Attention, such as "
            "puna.Attention.certified(1e-3)",
            param="attention",
        )
    core["attention"] = attention.core()
    return Request(core, _integer(given, "n", 1, 1, _MOST_N), timeout, core["seed"], attention)


def _number(given: Mapping[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be a number", param=name)
    return _real(value)


def _real(value: numbers.Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return -math.inf if value < 0 else math.inf


def _integer(
    given: Mapping[str, Any], name: str, default: int, least: int, most: int = _INT64
) -> int:
    value = given.get(name)
    if value is None:
        return default
    number = index(value)
    if number is None:
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be a whole number", param=name)
    if number < least:
        raise InvalidRequest(f"{name} is {number}; it must be {least} or more", param=name)
    if number > most:
        raise InvalidRequest(f"{name} is {number}; it must be at most {most}", param=name)
    return number


def _stops(stop: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """Splits `stop` (a string, an id, or a mixture in a list) into strings and token ids."""
    items = [stop] if isinstance(stop, str | bool) or index(stop) is not None else stop
    if isinstance(items, bytes | bytearray | memoryview | Mapping) or not isinstance(
        items, Iterable
    ):
        raise InvalidRequest(
            f"stop is {stop!r:.80}; it must be a string, a token id, or a list of them",
            param="stop",
        )
    texts: list[str] = []
    ids: list[int] = []
    for i, item in enumerate(items):
        if isinstance(item, str):
            if any("\ud800" <= letter <= "\udfff" for letter in item):
                raise InvalidRequest(f"stop[{i}] holds half of a surrogate pair", param="stop")
            texts.append(item)
        else:
            ids.append(token_id(item, vocab_size, f"stop[{i}]", "stop"))
    if "" in texts:
        raise InvalidRequest("stop holds an empty string; leave it out", param="stop")
    return texts, ids


def _logit_bias(bias: Any, vocab_size: int) -> list[tuple[int, float]]:
    if not isinstance(bias, Mapping):
        raise InvalidRequest(
            f"logit_bias is {bias!r:.80}; it must map token ids to numbers", param="logit_bias"
        )
    pairs = []
    for token, value in bias.items():
        # Ids come as text where the request was JSON.
        number = (
            int(token)
            if isinstance(token, str) and token.isdecimal() and len(token) < 20
            else token
        )
        checked = token_id(number, vocab_size, "a key of logit_bias", "logit_bias")
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise InvalidRequest(
                f"logit_bias of token {checked} is {value!r:.80}; it must be a number",
                param="logit_bias",
            )
        pairs.append((checked, _real(value)))
    return pairs
