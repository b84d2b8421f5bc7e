"""A progress bar on stderr for work that takes longer than a moment."""

from __future__ import annotations

import time
from typing import Any


class ProgressBar:
    """Shows itself after a second."""

    def __init__(self, title: str, unit: str) -> None:
        """`unit` is what is counted: "B" for bytes."""
        self._title = title
        self._unit = unit
        self._bar: Any = None
        self._started = time.monotonic()

    def update(self, done: int, total: int) -> None:
        """Says that `done` of `total` are done."""
        if self._bar is None:
            if time.monotonic() - self._started < 1.0:
                return
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=self._unit, unit_scale=True, desc=self._title)
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Ends its line."""
        if self._bar is not None:
            self._bar.close()
