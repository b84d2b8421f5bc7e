"""What requests take over from each other: prefixes of past requests, forks, branches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
STORY = "Once upon a time there was a fox who lived in a hollow tree near the river. "


@pytest.fixture
def llm() -> Iterator[puna.Engine]:
    with puna.load("demo", progress=False, threads=2) as llm:
        yield llm


def generate(llm: puna.Engine, prompt: Any, **options: Any) -> puna.Completion:
    result = llm.generate(prompt, **GREEDY | options)
    assert isinstance(result, puna.Completion)
    return result


def fresh(prompt: Any, **options: Any) -> puna.Completion:
    """What an engine says that has seen nothing yet."""
    with puna.load("demo", progress=False, threads=2) as llm:
        return generate(llm, prompt, **options)


def test_a_repeated_prompt_is_not_computed_again(llm: puna.Engine) -> None:
    first = generate(llm, STORY * 3)
    again = generate(llm, STORY * 3)
    assert first.usage.cached == 0
    assert again.usage.cached == again.usage.prompt - 1  # the last token's logits are needed
    assert again.tokens == first.tokens


def test_a_longer_prompt_computes_what_is_new(llm: puna.Engine) -> None:
    first = generate(llm, STORY * 2)
    longer = generate(llm, STORY * 4)
    assert first.usage.prompt - 2 <= longer.usage.cached < longer.usage.prompt
    assert longer.tokens == fresh(STORY * 4).tokens


def test_a_prompt_that_parts_early_goes_back_to_what_can_be_restored(llm: puna.Engine) -> None:
    """Local layers of the demo keep one chunk of 256 tokens: beyond it only whole chunks."""
    ids = llm.tokenizer.encode(STORY * 60)[:700]
    assert len(ids) == 700
    generate(llm, ids)
    for same in (100, 255, 256, 257, 511, 512, 600):
        other = [*ids[:same], *(ids[0] if ids[same] != ids[0] else ids[1],), *ids[same + 1 :]]
        result = generate(llm, other)
        assert result.usage.cached in (same, same // 256 * 256)
        assert result.tokens == fresh(other).tokens


def test_a_chat_takes_over_from_a_chat(llm: puna.Engine) -> None:
    messages = [{"role": "user", "content": "Tell me a story about a fox."}]
    first = llm.chat(messages, **GREEDY)
    assert isinstance(first, puna.Completion)
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And one about a cat."},
    ]
    second = llm.chat(messages, **GREEDY)
    assert isinstance(second, puna.Completion)
    assert second.usage.cached >= first.usage.prompt - 1


def test_logits_and_score_compute_everything(llm: puna.Engine) -> None:
    ids = llm.tokenizer.encode(STORY)
    before = llm.logits(ids)
    generate(llm, ids)
    assert np.array_equal(llm.logits(ids), before)
    assert len(llm.score(ids).logprobs) == len(ids)


def test_cached_prefixes_make_room_for_what_is_asked_for() -> None:
    """A context that fits alone fits however much was asked before."""
    with puna.load("demo", progress=False) as llm:
        plan = llm.plan
    needed = plan.weight_bytes + 3 * 2048 * plan.kv_bytes_per_token + (16 << 20)
    with puna.load("demo", progress=False, memory=needed) as llm:
        length = min(2000, llm.plan.context - 20)
        for start in range(40):
            ids = [5 + (start * 31 + i) % 600 for i in range(length)]
            assert generate(llm, ids, max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_a_prefix_whose_file_is_damaged_is_computed_again(tmp_path: Path) -> None:
    """The request that finds it out fails, and no other."""
    ids = [5 + i * i % 600 for i in range(12_000)]
    least = puna.plan("demo", context=13_000, disk="1G", memory="1M").memory_needed
    with puna.load(
        "demo",
        progress=False,
        threads=2,
        kv_offload=f"disk:{tmp_path}",
        memory=least + (1 << 20),
        context=13_000,
    ) as llm:
        assert llm.plan.kv_disk_bytes > 0  # not all of it fits into memory
        first = generate(llm, ids)
        generate(llm, [7, *ids])  # presses it out of memory
        before = {path: path.stat() for path in tmp_path.rglob("*") if path.name != "lock"}
        damaged = 0
        for path, status in before.items():
            if path.is_file():
                with path.open("r+b") as file:
                    file.seek(-1, os.SEEK_END)
                    last = file.read(1)[0]
                    file.seek(-1, os.SEEK_END)
                    file.write(bytes([last ^ 1]))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
                damaged += 1
        assert damaged > 20
        with pytest.raises(puna.SessionMismatch, match="does not have the checksum"):
            generate(llm, ids)
        for _ in range(damaged):
            try:
                again = generate(llm, ids)
                break
            except puna.SessionMismatch:  # others of the files
                pass
        assert again.tokens == first.tokens
        assert generate(llm, ids).usage.cached == len(ids) - 1


def test_completions_of_one_prompt_share_it(llm: puna.Engine) -> None:
    options = dict(n=3, temperature=1.0, seed=5, max_tokens=12)
    many = llm.generate(STORY * 3, **options)
    assert isinstance(many, list)
    assert [item.seed for item in many] == [5, 6, 7]
    assert many[1].usage.cached == many[0].usage.prompt - 1
    for item in many:
        alone = fresh(STORY * 3, temperature=1.0, seed=item.seed, max_tokens=12)
        assert item.tokens == alone.tokens
        assert item.usage.prompt == alone.usage.prompt


def test_branches_are_separate_continuations(llm: puna.Engine) -> None:
    session = llm.session()
    session.append(STORY * 8)
    held = len(session)
    endings = [" The fox", " A cat", " The fox", *(f" Number {i} is" for i in range(70))]
    answers = session.branch(endings, **GREEDY)
    assert len(session) == held
    assert len(answers) == len(endings)
    assert answers[0].tokens == answers[2].tokens
    for ending, answer in list(zip(endings, answers, strict=True))[::20]:
        ids = [*session.tokens(), *llm.tokenizer.encode(ending)]
        assert answer.tokens == fresh(ids).tokens
        assert answer.usage.prompt == len(ids)
        assert answer.usage.cached >= held - 1


def test_branches_of_a_conversation_are_questions(llm: puna.Engine) -> None:
    session = llm.session()
    session.chat("Tell me a story about a fox.", **GREEDY)
    messages = list(session.messages)
    answers = session.branch(["What is it?", "Tell me more."], **GREEDY)
    assert session.messages == messages
    for question, answer in zip(["What is it?", "Tell me more."], answers, strict=True):
        alone = llm.chat([*messages, {"role": "user", "content": question}], **GREEDY)
        assert isinstance(alone, puna.Completion)
        assert answer.tokens == alone.tokens
    with pytest.raises(puna.InvalidRequest, match="questions, not token ids"):
        session.branch([[1, 2]], **GREEDY)


def test_texts_and_conversations_do_not_mix(llm: puna.Engine) -> None:
    reading = llm.session()
    reading.append([5, 6, 7])
    reading.append(np.arange(8, 20, dtype=np.int32))
    assert reading.tokens() == list(range(5, 20))
    with pytest.raises(puna.InvalidRequest, match="holds a text"):
        reading.chat("Hello", **GREEDY)
    talking = llm.session()
    talking.chat("Tell me a story about a fox.", **GREEDY)
    with pytest.raises(puna.InvalidRequest, match="holds a conversation"):
        talking.append("More")


def test_a_text_read_in_pieces_is_the_text(llm: puna.Engine) -> None:
    ids = llm.tokenizer.encode(STORY * 30)
    whole, pieces = llm.session(), llm.session()
    whole.append(ids)
    for first in range(0, len(ids), 97):
        pieces.append(ids[first : first + 97])
    assert whole.branch([ids[:3]], **GREEDY)[0].tokens == (
        pieces.branch([ids[:3]], **GREEDY)[0].tokens
    )
    with pytest.raises(puna.InvalidRequest, match="vocabulary"):
        whole.append([10**6])
    assert len(whole) == len(ids)


def test_a_prompt_may_arrive_in_pieces(llm: puna.Engine) -> None:
    """As it would be whole: text cut anywhere, and ids."""
    text = STORY * 40
    whole = generate(llm, text)
    pieces = (text[first : first + 7] for first in range(0, len(text), 7))
    arrived = generate(llm, pieces)
    assert arrived.tokens == whole.tokens
    assert arrived.usage.prompt == whole.usage.prompt
    session, other = llm.session(), llm.session()
    session.append(text)
    other.append(iter([text[:11], text[11:]]))
    assert session.tokens() == other.tokens()
    ids = session.tokens()
    assert generate(llm, iter([ids[:3], np.array(ids[3:])])).tokens == whole.tokens
    with pytest.raises(puna.InvalidRequest, match="no tokens"):
        llm.generate(iter([]))
    with pytest.raises(puna.InvalidRequest, match="vocabulary"):
        llm.generate(iter([[1, 2], [10**6]]))
