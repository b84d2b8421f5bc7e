"""Attention that may leave pages out, through the public API: what it finds, says and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from oracle.ledger import Ledger

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
CERTIFIED = puna.Attention.certified(1e-3)
BUDGET = puna.Attention.budget(0.1, sample=0.2, recent_pages=1)


@pytest.fixture(scope="module")
def demo() -> Iterator[puna.Engine]:
    with puna.load("demo", progress=False, threads=2, kv="int8") as llm:
        yield llm


def ids(count: int) -> list[int]:
    return [5 + i * i % 600 for i in range(count)]


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_look_ups_read_the_pages_they_need(tmp_path: Path, kv: str) -> None:
    """Of the ledger's two KV heads one looks up a record, the other takes the mean of all."""
    ledger = Ledger(kv_heads=2)
    records = ledger.records(2400, seed=3)
    asked = [0, 7, 1300, 2399]
    path = ledger.write(tmp_path, "bfloat16")
    with puna.load(path, kv=kv, context=16384, threads=2, progress=False) as llm:
        session = llm.session()
        session.append(records.ravel())
        prompts = [records[i, :2] for i in asked]
        exact = session.branch(prompts, temperature=0, max_tokens=1)
        answers = session.branch(prompts, temperature=0, max_tokens=1, attention=CERTIFIED)
        for i, whole, answer in zip(asked, exact, answers, strict=True):
            assert whole.attention is None
            assert answer.tokens == whole.tokens == (records[i, 2],)
            report = answer.attention
            assert report is not None
            assert report.pages == 2 * (7200 // 256)  # the last layer's, of the last token
            # All pages of one head, and of the other that of the record, unless it is still open.
            assert report.pages // 2 <= report.read <= report.pages // 2 + 4
            assert report.worst_share <= 1e-3
        assert (
            session.branch([prompts[0]], temperature=0, max_tokens=1)[0].tokens == exact[0].tokens
        )


def test_what_is_left_out_does_not_depend_on_company(demo: puna.Engine) -> None:
    session = demo.session()
    session.append(ids(3000))
    prompts = [[7, 8], [9, 10, 11], [5]]
    for attention in (CERTIFIED, BUDGET):
        together = session.branch(prompts, attention=attention, logprobs=3, **GREEDY)
        for prompt, answer in zip(prompts, together, strict=True):
            alone = session.branch([prompt], attention=attention, logprobs=3, **GREEDY)[0]
            assert alone.logprobs == answer.logprobs
            assert alone.attention == answer.attention
            assert answer.attention is not None
            assert 0 < answer.attention.read <= answer.attention.pages
    assert answer.attention.read < answer.attention.pages


def test_pages_in_files_that_no_head_needs_are_not_read(demo: puna.Engine, tmp_path: Path) -> None:
    # Room for the chunk that is written and little more.
    small_kv: dict[str, Any] = {"kv": "int8", "context": 21000}
    least = puna.plan("demo", disk="1G", memory="1M", **small_kv).memory_needed
    files: dict[str, Any] = {"kv_offload": f"disk:{tmp_path}", "memory": least + (1 << 20)}
    with puna.load("demo", progress=False, threads=2, **small_kv, **files) as small:
        for llm in (demo, small):
            session = llm.session()
            session.append(ids(20000))
            report = session.branch([[7, 8]], attention=BUDGET, **GREEDY)[0].attention
            assert report is not None and report.read < report.pages
            assert (report.unread_bytes > 0) == (llm is small)
        exact = session.branch([[7, 8]], **GREEDY)[0]
    assert exact.attention is None


def test_keys_and_values_are_not_passed_on(demo: puna.Engine) -> None:
    prompt = np.array(ids(2000))
    fresh = demo.generate(prompt[:1990], **GREEDY)
    demo.generate(prompt, attention=BUDGET, **GREEDY)
    again = demo.generate(prompt, **GREEDY)
    assert isinstance(fresh, puna.Completion)
    assert isinstance(again, puna.Completion)
    assert again.usage.cached <= 1990 + 12  # of the exact one alone
    with puna.load("demo", progress=False, threads=2, kv="int8") as other:
        expected = other.generate(prompt, **GREEDY)
    assert isinstance(expected, puna.Completion)
    assert again.tokens == expected.tokens


def test_a_session_that_left_pages_out_is_not_saved(demo: puna.Engine, tmp_path: Path) -> None:
    session = demo.session()
    session.chat("Tell me a story about a fox.", attention=CERTIFIED, **GREEDY)
    with pytest.raises(puna.InvalidRequest, match="cannot be saved"):
        session.save(tmp_path / "a")
    kept = demo.session(tmp_path / "b")
    with pytest.raises(puna.InvalidRequest, match="must be exact"):
        kept.chat("Hello", attention=CERTIFIED, **GREEDY)
    kept.chat("Hello", **GREEDY)
    kept.fork().chat("Hello again", attention=CERTIFIED, **GREEDY)
    kept.save()


def test_pages_that_are_not_sealed_are_all_read() -> None:
    with puna.load("demo", progress=False, threads=2) as llm:
        session = llm.session()
        session.append(ids(1500))
        exact = session.branch([[7, 8]], **GREEDY)[0]
        answer = session.branch([[7, 8]], attention=BUDGET, **GREEDY)[0]
        assert answer.tokens == exact.tokens
        assert answer.attention is not None
        assert answer.attention.read == answer.attention.pages > 0


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ("certified", "must be a puna.Attention"),
        (puna.Attention.certified(0), "tau"),
        (puna.Attention.certified(delta=1), "delta"),
        (puna.Attention.budget(1.5), "fraction"),
        (puna.Attention.budget(sample=-0.1), "sample"),
        (puna.Attention.budget(sink_pages=-1), "sink_pages"),
    ],
)
def test_what_makes_no_sense_is_refused(demo: puna.Engine, attention: Any, message: str) -> None:
    with pytest.raises(puna.InvalidRequest, match=message):
        demo.generate("Once", attention=attention, max_tokens=1)
