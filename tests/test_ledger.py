"""The ledger model through the public API: what attention must see is known on paper.

See oracle/ledger.py for the model.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import skip_or_fail
from oracle.ledger import CODE, HIDDEN, MARKERS, Ledger


@dataclass(frozen=True)
class Rounding:
    """What a format of the KV cache does to the ledger's keys and values, in parts of them.

    Both are a constant or its negative, and 0 where there is no code. Where a page or a token has
    only the former two they are the ends of the range, and move by the rounding of the scale; 0
    between them becomes half a step.
    """

    keys: float
    values: float


KV = {
    "fp32": Rounding(2**-20, 0),
    "bf16": Rounding(2**-9, 0),
    "int8": Rounding(2**-7, 2**-7),
    "int4": Rounding(2**-4, 2**-7),
}

Load = Callable[..., puna.Engine]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    """`load(ledger, dtype=..., **options of puna.load)`, each loaded once."""
    loaded: dict[tuple[Any, ...], puna.Engine] = {}

    def make(ledger: Ledger, dtype: str = "float32", **options: Any) -> puna.Engine:
        key = (ledger, dtype, *sorted(options.items()))
        if key not in loaded:
            path = ledger.write(tmp_path_factory.mktemp("ledger"), dtype)
            options = {"threads": 2, "context": 16384, "progress": False} | options
            loaded[key] = puna.load(path, **options)
        return loaded[key]

    yield make
    for llm in loaded.values():
        llm.close()


def straddles(chunk: int, record: np.ndarray | int) -> np.ndarray:
    """Whether a record's V has lost its K1 or K2 to the chunk before: at offsets 0 and 1."""
    return (3 * np.asarray(record) + 2) % chunk < 2


def asked(records: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The prompt of all records, and then the keys of some; logits are wanted at every second."""
    return np.concatenate([records.ravel(), records[order, :2].ravel()])


def answers(llm: puna.Engine, tokens: np.ndarray, questions: int) -> np.ndarray:
    """Logits after each of the keys at the end of the prompt, [questions, vocab]."""
    return llm.logits(tokens)[len(tokens) - 2 * questions + 1 :: 2]


# --- look-ups -------------------------------------------------------------------------------------


def test_codes_are_far_apart() -> None:
    ledger = Ledger(third=2048)
    codes = ledger.codes[: ledger.filler]
    products = codes @ codes.T
    np.fill_diagonal(products, -CODE)
    assert products.max() == CODE - 2 * 8
    for third in range(3):
        mine = slice(third * ledger.third, (third + 1) * ledger.third)
        assert products[mine, mine].max() == CODE - 2 * 12
    assert (codes @ ledger.codes[ledger.filler_found]).max() <= CODE - 2 * 8


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "ledger",
    [
        Ledger(chunk=64, floor_scale=512),
        Ledger(chunk=100, kv_heads=2),
        Ledger(chunk=256, moe=True, floor_scale=100),
    ],
    ids=lambda ledger: f"chunk{ledger.chunk}",
)
def test_look_ups_at_every_distance(load: Load, ledger: Ledger, dtype: str, kv: str) -> None:
    """Every record of 4,200 tokens is asked for once; those that straddle a boundary are lost.

    A window of the chunk's length instead of absolute chunks would find them.
    """
    records = ledger.records(1400)
    order = np.random.default_rng(2).permutation(len(records))
    tokens = asked(records, order)
    rows = answers(load(ledger, dtype, kv=kv), tokens, len(order))
    right = rows.argmax(1) == records[order, 2]
    lost = straddles(ledger.chunk, order)
    assert lost.sum() >= 10
    offsets = (3 * order + 2) % ledger.chunk
    assert set(offsets) == set(range(ledger.chunk))
    assert set(offsets[~right]) <= {0, 1}
    # A key that is half right may still be the best there is.
    assert right[lost].mean() < 0.2
    # Where a key is right, all the others weigh exp(-3/8 * sharpness) each, and the logits are
    # those of the code; bfloat16 rounds five times on the way from the embedding of V to them.
    rounding = (5 * 2**-9 if dtype == "bfloat16" else 2**-18) + KV[kv].values
    for i in np.flatnonzero(~lost)[::100]:
        position = len(tokens) - 2 * len(order) + 2 * i + 1
        expected = ledger.expected_logits(tokens, position)
        tokens_only = slice(ledger.mean_readout)  # the mean is of zeros between codes
        np.testing.assert_allclose(
            rows[i, tokens_only], expected[tokens_only], rtol=0, atol=rounding * expected.max()
        )


@pytest.mark.parametrize("kv", KV)
def test_cuts_and_decode(load: Load, kv: str) -> None:
    """One token at a time and odd pieces, over chunks and pages, give the same bits."""
    ledger = Ledger(chunk=100, moe=True, floor_scale=77)
    llm = load(ledger, "bfloat16", kv=kv)
    records = ledger.records(200, seed=3)
    tokens = asked(records, np.arange(0, 200, 4))
    whole = llm.logits(tokens)
    length = len(tokens)
    pieces = [255, 1, 1, 255, 3, length - 515]
    for cuts in ([1] * length, pieces, [7] * (length // 7) + [length % 7]):
        got = llm.logits(tokens, cuts=[cut for cut in cuts if cut])
        np.testing.assert_array_equal(got.view(np.uint32), whole.view(np.uint32))


def test_generation_answers(load: Load) -> None:
    """The same through generate(), several prompts as one batch."""
    ledger = Ledger(chunk=64)
    records = ledger.records(300, seed=4)
    order = [i for i in (0, 1, 2, 150, 298, 299) if not straddles(ledger.chunk, i)]
    prompts = [[*records.ravel().tolist(), *records[i, :2].tolist()] for i in order]
    found = load(ledger, kv="bf16").generate(prompts, max_tokens=1, temperature=0)
    assert isinstance(found, list)
    assert [answer.tokens for answer in found] == [(records[i, 2],) for i in order]


@pytest.mark.parametrize("kv", KV)
def test_two_hops(load: Load, kv: str) -> None:
    """The second look-up returns what the first one found at a position within the prompt.

    So attention must be right at every position, not only at the last one.
    """
    ledger = Ledger(chunk=96, hops=2)  # whole records in every chunk: none straddles
    random = np.random.default_rng(5)
    third, count = ledger.third, 400
    pairs = random.choice(third**2, count, replace=False)
    # Two records for each: (A, B, V), and (K, A, B) after it. Asking for K A finds B, at whose
    # place the first look-up has found V by A B. B and V are of one third, so that no V and the A
    # after it look like K A.
    a, b = third + pairs // third, 2 * third + pairs % third
    v = 2 * third + random.integers(0, third, count)
    k = random.integers(0, third, count)
    # No K A twice.
    kept = np.sort(np.unique(k * third + a, return_index=True)[1])
    a, b, v, k = a[kept], b[kept], v[kept], k[kept]
    first, second = np.stack([a, b, v], 1), np.stack([k, a, b], 1)
    half = len(kept) // 2
    records = np.concatenate([first[:half], second[:half], first[half:], second[half:]])
    tokens = np.concatenate([records.ravel(), second[:, :2].ravel()])
    rows = answers(load(ledger, kv=kv), tokens, len(kept))
    assert (rows.argmax(1) == v).all()


# --- temperature ----------------------------------------------------------------------------------


def among_fillers(ledger: Ledger, length: int) -> np.ndarray:
    """One record near the start, and its key at the end of a prompt of fillers."""
    tokens = np.full(length, ledger.filler)
    record = ledger.records(1)[0]
    tokens[20:23] = record
    tokens[-2:] = record[:2]
    return tokens


def precision(ledger: Ledger, kv: str, position: int) -> float:
    """How far logits may be off that depend on the weights of all positions, not on one alone.

    A code's logit is at most 2 * 32 times a weight w. Scores that move by d, for what the format of
    the cache rounds, move w by w (1 - w) d, at most a quarter of it. And a term that is smaller
    than half a unit of the fp32 sum it is added to is lost: of the 2,048 of a leaf, 2**-25 each.
    """
    score = ledger.sharpness * ledger.temperature(position)
    return 2 * CODE * (0.25 * 2 * score * KV[kv].keys + KV[kv].values + 2048 * 2**-25)


@pytest.mark.parametrize("kv", KV)
def test_temperature_decides(load: Load, kv: str) -> None:
    """A match outweighs two thousand fillers with the temperature, and not without it."""
    length = 2045
    ledger = Ledger(sharpness=math.log(length) - 1.5, floor_scale=16, attn_scale=0.3)
    tokens = among_fillers(ledger, length)
    answer = tokens[22]
    for tuned, wanted in ((True, answer), (False, ledger.filler_found)):
        model = replace(ledger, tuned=tuned)
        found = load(model, kv=kv).logits(tokens)[-1]
        expected = model.expected_logits(tokens, length - 1)
        assert expected.argmax() == wanted == found.argmax()
        bound = precision(model, kv, length - 1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize("kv", ["fp32", "bf16"])  # the temperature is the query's
@pytest.mark.parametrize("step", [1, 2, 7])
def test_temperature_steps_one_position_early(load: Load, kv: str, step: int) -> None:
    """It counts (position + 1) / floor_scale: the last position of a period is the next step."""
    floor_scale, boundary = 256, 256 * step - 1
    # Half of the weight at the position before the step.
    ledger = Ledger(floor_scale=floor_scale, attn_scale=2.0)
    sharpness = math.log(boundary) / ledger.temperature(boundary - 1)
    ledger = replace(ledger, sharpness=sharpness)
    llm = load(ledger, kv=kv)
    for position in (boundary - 1, boundary, boundary + 1):
        tokens = among_fillers(ledger, position + 1)
        found = llm.logits(tokens)[-1]
        bound = precision(ledger, kv, position)
        expected = ledger.expected_logits(tokens, position)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)
        # What a temperature that steps a position later, or earlier, would give.
        for other in {ledger.temperature(position + shift) for shift in (-1, 1)}:
            if other != ledger.temperature(position):
                wrong = ledger.expected_logits(tokens, position, other)
                assert np.abs(found - wrong).max() > 4 * bound


# --- pages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", KV)
def test_every_token_counts_once(load: Load, kv: str) -> None:
    """Markers of 1 and -1, one or two in each page, with queries of 0: a uniform mean.

    It is exactly 0 where they balance; a page that is lost or read twice shows at once.
    """
    ledger = Ledger()
    random = np.random.default_rng(6)
    length, page = 6000, 256
    tokens = np.full(length, ledger.blank)
    signs = np.zeros(length)
    for start in range(0, length, page):
        place = random.integers(start, min(start + page, length))
        signs[place] = 1 if start // page % 2 == 0 else -1
    tokens[signs > 0], tokens[signs < 0] = ledger.plus, ledger.minus
    found = load(ledger, kv=kv).logits(tokens)[:, ledger.mean_readout].astype(float)
    mean = np.cumsum(signs) / np.arange(1, length + 1)
    expected = MARKERS * mean / np.sqrt(1 + MARKERS * mean**2 / HIDDEN)
    # Each marker's value may be off by the format's rounding, and nothing else.
    markers = np.cumsum(np.abs(signs)) / np.arange(1, length + 1)
    bound = 2**-20 * np.abs(expected) + MARKERS * KV[kv].values * markers
    assert (np.abs(found - expected) <= bound).all()
    assert (mean == 0).sum() > length / 3


# --- the benchmark --------------------------------------------------------------------------------


@pytest.mark.parametrize("tiers", [False, True])
def test_benchmark(tmp_path: Path, tiers: bool) -> None:
    """bench/ledger.py at a small scale; with a budget that sends pages to files, too."""
    script = Path(__file__).parent.parent / "bench" / "ledger.py"
    options = ["--tokens", "40000", "--queries", "60", "--threads", "2"]
    # 64 MiB are for reading ahead; there is no room for all of the cache and 60 branches of it.
    options += ["--kv", "bf16", "--ram", "98M", "--disk", str(tmp_path)] if tiers else []
    done = subprocess.run(
        [sys.executable, str(script), *options, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["tokens"], found["queries"], found["right"]) == (39999, 60, 60)
    assert (found["straddlers"], found["straddlers_found"]) == (3, 0)
    assert found["seconds"] > 0 and found["peak_rss"] > 0


# --- transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("moe", [False, True])
def test_transformers_agrees(load: Load, tmp_path_factory: Any, moe: bool) -> None:
    """The checkpoint is a Llama 4 to transformers, and every logit is the same."""
    try:
        from oracle import with_transformers
    except ImportError as error:
        skip_or_fail(f"transformers or torch is missing: {error}")
    ledger = Ledger(chunk=64, moe=moe, floor_scale=128)
    records = ledger.records(160, seed=7)
    tokens = asked(records, np.arange(0, 160, 3))
    model = with_transformers.load(ledger.write(tmp_path_factory.mktemp("ledger")))
    expected = with_transformers.logits(model, tokens)
    found = load(ledger, kv="fp32").logits(tokens)
    # Where no key matches, scores of up to 40 decide, each off by some 2**-22 of 64 terms.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-9)
    order = np.arange(0, 160, 3)
    hit = ~straddles(ledger.chunk, order)
    rows = expected[len(tokens) - 2 * len(order) + 1 :: 2]
    assert (rows.argmax(1)[hit] == records[order[hit], 2]).all()
