"""Attention that is not exact: asked for by name, and with a report of what it left out."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Literal

from puna import _core
from puna.arguments import count
from puna.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Attention:
    """How layers that see the whole context attend; make it by exact(), certified() or budget().

    For the tokens of an answer, and of a question of up to 32 before it; longer prompts, which
    share what they read, are computed exactly. What is left out are whole pages of 256 tokens that
    lie in memory, of `kv="int8"` or "int4"; pages that come from disk are read as they are, and so
    is the page at hand.
    """

    kind: Literal["exact", "certified", "budget"]
    tau: float = 1e-3
    delta: float = 1e-9
    fraction: float = 0.02
    sample: float = 0.01
    sink_pages: int = 1
    recent_pages: int = 8

    @classmethod
    def exact(cls) -> Attention:
        """Everything is read; the default."""
        return cls("exact")

    @classmethod
    def certified(cls, tau: float = 1e-3, delta: float = 1e-9) -> Attention:
        """Leaves out pages that together weigh at most `tau` of what is read, for every head.

        An output of attention is off by at most 2 tau times the largest value. The upper four bits
        of every key are read to know this. What the lower four can add is bounded with probability
        1 - `delta` for each key, as if they were random; 0 is their worst case.
        """
        return cls("certified", tau=tau, delta=delta)

    @classmethod
    def budget(
        cls,
        fraction: float = 0.02,
        sample: float = 0.01,
        sink_pages: int = 1,
        recent_pages: int = 8,
    ) -> Attention:
        """Reads a part of the pages, of which nothing is promised.

        Args:
            fraction: Of the pages, those that promise most by the ranges of their keys.
            sample: Of the others, so many at random, each standing for 1 / sample of them; so the
                report can estimate what was left out. 0 is none.
            sink_pages: The first so many are read in any case,
            recent_pages: and the last.
        """
        return cls(
            "budget",
            fraction=fraction,
            sample=sample,
            sink_pages=sink_pages,
            recent_pages=recent_pages,
        )

    def core(self) -> _core.AttentionMode:
        """As the core has it.

        Raises:
            InvalidRequest: A field is of the wrong type, or the kind is another.
        """
        for name in ("tau", "delta", "fraction", "sample"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise InvalidRequest(f"{name} is {value!r:.80}; it must be a number", param=name)
        for name in ("sink_pages", "recent_pages"):
            count(name, getattr(self, name))
        if self.kind not in ("exact", "certified", "budget"):
            raise InvalidRequest(
                f"the kind of attention is {self.kind!r:.80}; make it by exact(), certified() or "
                "budget()",
                param="attention",
            )
        return _core.AttentionMode(
            self.kind,
            self.tau,
            self.delta,
            self.fraction,
            self.sample,
            self.sink_pages,
            self.recent_pages,
        )


@dataclass(frozen=True, slots=True)
class AttentionReport:
    """What attention left out in one answer.

    Attributes:
        pages: Pages in sight, added up over tokens, layers and KV heads.
        read: How many of them were read whole.
        worst_share: The largest share of a head's softmax weight that was left out: an upper bound
            where it is certified, else estimated from the sample.
        worst_interval: Half the width of that estimate's 95 % interval, the widest one.
        unread_bytes: Of pages in files that no head had to read.
    """

    pages: int
    read: int
    worst_share: float
    worst_interval: float
    unread_bytes: int


def report_of(session: _core.Session, attention: Attention) -> AttentionReport | None:
    """A session's report, if there can be anything to tell."""
    return None if attention.kind == "exact" else AttentionReport(*session.attention())
