"""A request on its way: its prompt, the session that is being stepped, when it must end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from puna import _core
from puna.options import Request
from puna.progress import ProgressBar
from puna.types import Chunk, FinishReason, Timings, Usage


@dataclass(slots=True)
class BuiltPrompt:
    """Token ids, and the normalised tiles [tiles, 3, S, S] of each image in order."""

    tokens: list[int]
    pixels: list[NDArray[np.float32]]


class Job:
    """One session that is being stepped, and what came out of it so far."""

    def __init__(
        self, session: _core.Session, request: Request, seed: int, *, late: bool = False
    ) -> None:
        """Starts a turn of the session, unless it is `late`: then it has ended already."""
        self.session = session
        self.seed = seed
        self.attention = request.attention
        self.prompt_tokens = session.length
        self.chunks: list[Chunk] = []
        self.finish: FinishReason | None = "timeout" if late else None
        self.late = late
        if not late:
            session.begin(_core.Sampling(**dict(request.core, seed=seed)))

    def take(self, chunk: Chunk, finish: FinishReason | None) -> None:
        """Adds a piece of the answer, and why it ended if it did."""
        self.chunks.append(chunk)
        self.finish = finish


class Deadline:
    """When a request must end. The core ends it within a layer, as if it were cancelled."""

    def __init__(self, timeout: float | None) -> None:
        """So many seconds from now; None is never."""
        self._end = math.inf if timeout is None else time.monotonic() + timeout

    def left(self) -> float:
        """Seconds left; below 0 when it is over."""
        return self._end - time.monotonic()

    def reason(self, finish: FinishReason | None) -> FinishReason | None:
        """Why a turn ended, a late cancellation being a timeout."""
        return "timeout" if finish == "cancelled" and self.left() <= 0 else finish


def usage(job: Job) -> Usage:
    """Token counts of a job."""
    raw = job.session.timings()
    return Usage(
        prompt=job.prompt_tokens,
        completion=sum(len(chunk.tokens) for chunk in job.chunks),
        cached=raw["cached_tokens"],
        image=raw["image_tokens"],
    )


def timings(raw: Mapping[str, Any]) -> Timings:
    """A session's times and memory as they are returned."""

    def rate(tokens: int, seconds: float) -> float:
        return tokens / seconds if seconds > 0 else 0.0

    return Timings(
        load_s=raw["load_seconds"],
        first_token_s=raw["first_token_seconds"],
        prefill_s=raw["prefill_seconds"],
        decode_s=raw["decode_seconds"],
        prefill_tps=rate(raw["prefill_tokens"], raw["prefill_seconds"]),
        decode_tps=rate(raw["decode_tokens"], raw["decode_seconds"]),
        kv_bytes=raw["kv_bytes"],
        peak_bytes=raw["peak_bytes"],
    )


def read(
    session: _core.Session,
    pieces: Iterable[NDArray[np.integer[Any]] | list[int]],
    deadline: Deadline,
) -> None:
    """Adds ids to a session as they come, and computes them whenever there is a pass full."""
    for ids in pieces:
        if len(ids):
            session.append(ids)
        while session.pending() > session.batch_rows and deadline.left() > 0:
            session.prefill(deadline.left())


def prefill(session: _core.Session, deadline: Deadline, progress: bool) -> None:
    """Computes the text of a session but its last token, pass by pass, until the deadline.

    So that a long text shows how far it is and how long it will take.
    """
    bar = ProgressBar("Reading", " tokens") if progress else None
    try:
        while (left := session.prefill(deadline.left())) > 0:
            if bar:
                bar.update(session.length - left, session.length)
    finally:
        if bar:
            bar.close()
