"""Measures puna through the sessions of an engine that `puna.load` opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import serve, timed

import puna
from puna import _core


class _Worker:
    def __init__(self) -> None:
        self._sessions: dict[int, Any] = {}

    def load(self, path: str, threads: int, context: int, options: dict[str, Any]) -> None:
        sessions = options.pop("sessions", None)  # a directory of prompts that were computed before
        self._directory = Path(sessions) if sessions else None
        self._engine = puna.load(path, threads=threads, context=context, progress=False, **options)
        self._core = self._engine._core_engine()

    def variants(self, kind: str) -> list[dict[str, Any]]:
        del kind
        return [{}]  # there is nothing to set

    def prefill(self, held: list[int], tokens: list[int], variant: dict[str, Any]) -> float:
        del variant
        session = self._holding(held) if held else self._core.session()
        self._begun(session, held + tokens, 1)
        return timed(lambda: self._core.step([session]))

    def decode(self, held: list[int], count: int, variant: dict[str, Any]) -> float:
        """Every step chooses a token (the likeliest) and decodes its text, as for a user."""
        del variant
        # The last token of what is held is computed again: so many steps are so many tokens.
        held = held or [0]
        session = self._begun(self._holding(held), held, count)

        def run() -> None:
            for _ in range(count):
                self._core.step([session])

        return timed(run)

    def logits(self, tokens: list[int]) -> list[float]:
        return self._engine.logits(tokens)[-1].tolist()

    def _holding(self, tokens: list[int]) -> Any:
        if len(tokens) not in self._sessions:
            self._sessions[len(tokens)] = self._opened(len(tokens))
        session = self._sessions[len(tokens)]
        self._core.step([self._begun(session, tokens, 1)])
        if self._directory and not (path := self._saved(len(tokens))).exists():
            session.save(str(path))
        return session

    def _opened(self, length: int) -> Any:
        if self._directory and (path := self._saved(length)).exists():
            return self._core.open(str(path), False)
        return self._core.session()

    def _saved(self, length: int) -> Path:
        assert self._directory
        return self._directory / f"{length}-tokens"

    def _begun(self, session: Any, tokens: list[int], count: int) -> Any:
        options = {"max_tokens": count, "temperature": 0.0, "ignore_eos": True, "seed": 0}
        session.prompt(tokens, [])
        session.begin(_core.Sampling(**self._engine._request("generate", options, ()).core))
        return session


if __name__ == "__main__":
    serve(_Worker())
