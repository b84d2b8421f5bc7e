"""Reads the golden fixtures that golden/make_golden.py wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import tiny

FOLDER = Path(__file__).resolve().parent.parent / "golden"


@dataclass(frozen=True)
class Golden:
    """What transformers computed for a variant in fp32."""

    variant: tiny.Variant
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def tokens(self, prompt: tiny.Prompt) -> np.ndarray:
        """The ids of a prompt, int32 [T]."""
        return self.arrays[f"{prompt.name}.tokens"]

    def logits(self, prompt: tiny.Prompt) -> np.ndarray:
        """The logits of a prompt, float32 [T, vocabulary]."""
        return self.arrays[f"{prompt.name}.logits"]

    @property
    def greedy(self) -> tuple[list[int], list[int]]:
        """A prompt and the most likely tokens that follow it."""
        return self.arrays["greedy.prompt"].tolist(), self.arrays["greedy.tokens"].tolist()


def load(name: str) -> Golden:
    """The fixture of a variant."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    with np.load(FOLDER / name / "golden.npz") as arrays:
        return Golden(tiny.VARIANTS[name], config, dict(arrays))
