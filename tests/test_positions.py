"""Positions through the public API: what a chunk says does not depend on where it lies.

cpp/positions_test.cpp goes to ten million and past 2**24, and sees what the backend is given:
`pytest -k positions` runs both.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import puna
from oracle.ledger import Ledger


def test_every_chunk_gives_the_same_bits(tmp_path: Path) -> None:
    """The same tokens again and again, in a model of which all layers attend in chunks."""
    ledger = Ledger(chunk=96, max_position=1 << 25)
    path = ledger.write(tmp_path)
    config = ledger.config() | {"no_rope_layers": [1] * ledger.layers}
    (path / "config.json").write_text(json.dumps(config))
    chunk = ledger.records(32).ravel()
    with puna.load(path, context=32768, threads=2, progress=False) as llm:
        rows = llm.logits(np.tile(chunk, 200)).reshape(200, ledger.chunk, -1)
    assert np.ptp(rows[0], axis=0).max() > 1
    np.testing.assert_array_equal(rows.view(np.uint32), rows[:1].view(np.uint32).repeat(200, 0))


@pytest.mark.parametrize("step", [1, 2, 3, 10, 100])
def test_both_sides_of_a_temperature_step(tmp_path: Path, step: int) -> None:
    """(position + 1) / floor_scale: the logits tell one step from the next."""
    floor_scale = 40
    boundary = step * floor_scale - 1
    ledger = Ledger(floor_scale=floor_scale)
    # A record among fillers, with half of the weight at the position before the step.
    sharpness = math.log(boundary) / ledger.temperature(boundary - 1)
    ledger = replace(ledger, sharpness=sharpness)
    record = ledger.records(1)[0]
    with puna.load(ledger.write(tmp_path), kv="fp32", threads=2, progress=False) as llm:
        for position in (boundary - 1, boundary, boundary + 1):
            tokens = np.full(position + 1, ledger.filler)
            tokens[5:8] = record
            tokens[-2:] = record[:2]
            found = llm.logits(tokens)[-1]
            steps = (position + 1) // floor_scale
            right, *wrong = (
                float(np.abs(found - ledger.expected_logits(tokens, position, warmth)).max())
                for warmth in (
                    ledger.temperature(other * floor_scale)
                    for other in (steps, steps + 1, steps - 1)
                    if other >= 0
                )
            )
            assert min(wrong) > 4 * right, (position, right, wrong)
