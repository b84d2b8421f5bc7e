"""What a worker process and its parent say to each other: a JSON object a line each.

Runs in the interpreter of whatever engine is measured, so it needs nothing but the standard
library."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """What each worker offers; times are in seconds."""

    def load(self, path: str, threads: int, context: int, options: dict[str, Any]) -> None:
        """Opens the model, ready to compute."""

    def variants(self, kind: str) -> list[dict[str, Any]]:
        """The settings worth trying for "prefill" or "decode"."""

    def prefill(self, held: list[int], tokens: list[int], variant: dict[str, Any]) -> float:
        """Time of `tokens`, to the logits of the last, after `held`, computed first if need be."""

    def decode(self, held: list[int], count: int, variant: dict[str, Any]) -> float:
        """Time of `count` single tokens after `held`, computed first if need be."""

    def logits(self, tokens: list[int]) -> list[float]:
        """Logits of the last token."""


def random_tokens(count: int, vocabulary: int) -> list[int]:
    """The same ids in every engine, the shorter prompt a beginning of the longer."""
    source = random.Random(4)
    return [source.randrange(vocabulary) for _ in range(count)]


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory() -> dict[str, int]:
    """Resident bytes: the peak; now, what is the process's own and what is of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    names = {"peak": "VmHWM", "own": "RssAnon", "file": "RssFile"}
    return {name: int(fields[key].split()[0]) << 10 for name, key in names.items()}


def serve(engine: Engine) -> None:
    """Answers requests until the parent closes the pipe."""
    # Libraries write where they like: the answers have a descriptor of their own, and what was
    # standard output goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": _handle(engine, request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _handle(engine: Engine, request: dict[str, Any]) -> Any:
    match request.pop("do"):
        case "load":
            return timed(lambda: engine.load(**request))
        case "memory":
            return memory()
        case "prefill":
            depth = request["depth"]
            tokens = random_tokens(depth + request["count"], request["vocabulary"])
            return engine.prefill(tokens[:depth], tokens[depth:], request["variant"])
        case "decode":
            held = random_tokens(request["depth"], request["vocabulary"])
            return engine.decode(held, request["count"], request["variant"])
        case "logits":
            return engine.logits(random_tokens(request["count"], request["vocabulary"]))
        case "variants":
            return engine.variants(request["kind"])
        case other:
            raise ValueError(f"there is no request {other!r}")
