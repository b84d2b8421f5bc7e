"""Conversations: what a session remembers, and that it computes only what is new."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from conftest import greedy
from puna.demo.scene import draw, random_scene

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def llm() -> Iterator[puna.Engine]:
    with puna.load("demo", progress=False, threads=2) as llm:
        yield llm


def picture(llm: puna.Engine, seed: int) -> Any:
    return draw(random_scene(random.Random(seed)), llm.info.image_size)


def alone(llm: puna.Engine, messages: list[dict[str, Any]], **options: Any) -> puna.Completion:
    result = llm.chat(messages, **options)
    assert isinstance(result, puna.Completion)
    return result


def test_turns_are_those_of_the_whole_conversation(llm: puna.Engine) -> None:
    session = llm.session()
    held = 0
    for question in ("Tell me a story about a fox.", "What is it?", "Tell me a story about a cat."):
        before = list(session.messages)
        answer = session.chat(question, **GREEDY)
        whole = alone(llm, [*before, {"role": "user", "content": question}], **GREEDY)
        assert answer.tokens == whole.tokens
        assert answer.text == whole.text
        assert answer.usage.prompt == whole.usage.prompt
        assert whole.usage.cached <= whole.usage.prompt - 1
        # Everything is kept but the token whose logits choose the next one.
        assert answer.usage.cached >= held - 1
        held = len(session)
        assert held == answer.usage.total
        assert session.messages[-2:] == [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer.text},
        ]


def test_tools_are_offered_in_every_turn(llm: puna.Engine, tmp_path: Path) -> None:
    weather, timer = ({"name": name, "parameters": {}} for name in ("get_weather", "set_timer"))
    session = llm.session(tools=[weather])
    first = session.chat("Will it rain by the lake on Monday?", **GREEDY)
    call = {"name": "get_weather", "arguments": {"place": "the lake", "day": "Monday"}}
    assert session.messages[-1] == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }
    result = {"role": "ipython", "content": "rain"}
    second = session.chat([result], **GREEDY)
    assert second.usage.cached >= first.usage.total - 1
    for answer, held in ((first, session.messages[:1]), (second, session.messages[:3])):
        whole = llm.chat(held, tools=[weather], **GREEDY)
        assert isinstance(whole, puna.Completion)
        assert answer.tokens == whole.tokens
    assert session.fork().tools == [weather]
    session.save(tmp_path / "saved")
    session.close()
    with llm.session(tmp_path / "saved", readonly=True) as opened:
        assert opened.tools == [weather]
    with llm.session(tmp_path / "saved", readonly=True, tools=[timer]) as opened:
        assert opened.tools == [timer]
    with pytest.raises(puna.InvalidRequest, match="list of JSON schemas"):
        llm.session(tools="get_weather")  # type: ignore[arg-type]


def test_a_long_conversation_passes_chunk_boundaries(llm: puna.Engine) -> None:
    session = llm.session()
    while len(session) < 3 * 256:
        before = list(session.messages)
        question = f"Tell me a story about a {('fox', 'bear', 'cat')[len(before) % 3]}."
        answer = session.chat(question, seed=len(before), max_tokens=80)
        whole = alone(
            llm,
            [*before, {"role": "user", "content": question}],
            seed=len(before),
            max_tokens=80,
        )
        assert answer.tokens == whole.tokens


def test_images_stay_in_the_conversation(llm: puna.Engine, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    picture(llm, 1).save(path)
    session = llm.session()
    first = session.chat("What is in this picture?", images=[str(path)], **GREEDY)
    assert first.usage.image == llm.info.tokens_per_tile
    path.unlink()  # it was read when it was given
    second = session.chat("Tell me a story about a fox.", **GREEDY)
    assert second.usage.image == llm.info.tokens_per_tile
    assert second.usage.cached >= first.usage.total - 1
    third = session.chat("And in this one?", images=[picture(llm, 2)], **GREEDY)
    assert third.usage.image == 2 * llm.info.tokens_per_tile
    assert third.text == alone(llm, session.messages[:-1], **GREEDY).text


def test_another_picture_is_not_the_cached_one(llm: puna.Engine) -> None:
    question = "What is in this picture?"
    expected = [
        alone(llm, [{"role": "user", "content": question}], images=[picture(llm, i)], **GREEDY)
        for i in (3, 4)
    ]
    session = llm.session()
    for i, wanted in zip((3, 4), expected, strict=True):
        session.messages.clear()  # the same words again, around another picture
        answer = session.chat(question, images=[picture(llm, i)], **GREEDY)
        assert answer.text == wanted.text
    assert expected[0].text != expected[1].text


def test_a_system_message_and_given_history(llm: puna.Engine) -> None:
    session = llm.session()
    history = [
        {"role": "system", "content": "You tell stories."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Tell me a story about a dog."},
    ]
    answer = session.chat(history, **GREEDY)
    assert answer.text == alone(llm, history, **GREEDY).text
    assert session.messages == [*history, {"role": "assistant", "content": answer.text}]


def test_image_parts_in_messages(llm: puna.Engine) -> None:
    array = np.asarray(picture(llm, 5))
    parts = [{"type": "image"}, {"type": "text", "text": "What is in this picture?"}]
    named = [{"type": "image", "image": array}, parts[1]]
    answers = {
        llm.session().chat([{"role": "user", "content": content}], images=images, **GREEDY).text
        for content, images in ((parts, [array]), (named, None), (parts[1]["text"], [array]))
    }
    assert len(answers) == 1


def test_forks_go_their_own_ways(llm: puna.Engine) -> None:
    session = llm.session()
    session.chat("Tell me a story about a fox.", **GREEDY)
    fork = session.fork()
    held = len(session)
    mine = session.chat("Tell me a story about a cat.", **GREEDY)
    theirs = fork.chat("Tell me a story about a dog.", **GREEDY)
    assert theirs.usage.cached >= held - 1
    assert mine.text == alone(llm, session.messages[:-1], **GREEDY).text
    assert theirs.text == alone(llm, fork.messages[:-1], **GREEDY).text
    assert session.messages[:2] == fork.messages[:2]
    assert len(session.messages) == len(fork.messages) == 4


def test_leaving_a_stream_keeps_what_was_said(llm: puna.Engine) -> None:
    session = llm.session()
    said = ""
    for chunk in session.stream("Tell me a story about a fox.", **GREEDY):
        said += chunk.text
        if len(said) > 20:
            break
    assert session.messages[-1] == {"role": "assistant", "content": said}
    answer = session.chat("Tell me a story about a cat.", **GREEDY)
    assert answer.text == alone(llm, session.messages[:-1], **GREEDY).text
    assert answer.usage.cached > 0


def test_a_turn_that_fails_leaves_the_conversation_alone(llm: puna.Engine) -> None:
    session = llm.session()
    first = session.chat("Tell me a story about a fox.", **GREEDY)
    messages = list(session.messages)
    with pytest.raises(puna.InvalidRequest):
        session.chat("And then?", top_p=7)
    with pytest.raises(puna.ImageError):
        session.chat("And this?", images=["/nowhere.png"])
    with pytest.raises(puna.InvalidRequest):
        session.chat([])
    with pytest.raises(puna.ContextOverflow) as overflow:
        session.chat("fox " * llm.plan.context)
    assert overflow.value.limit == llm.plan.context
    assert session.messages == messages
    again = session.chat("Tell me a story about a cat.", **GREEDY)
    assert again.usage.cached >= first.usage.total - 1


def test_one_answer_at_a_time(llm: puna.Engine) -> None:
    session = llm.session()
    stream = session.stream("Tell me a story about a fox.", **GREEDY)
    next(stream)
    with pytest.raises(puna.InvalidRequest, match="in the middle of an answer"):
        session.chat("Tell me a story about a cat.", **GREEDY)
    assert session.messages == []
    stream.close()  # type: ignore[attr-defined]
    assert len(session.messages) == 2
    session.chat("Tell me a story about a cat.", **GREEDY)
    assert len(session.messages) == 4


def test_a_closed_session(llm: puna.Engine, tmp_path: Path) -> None:
    session = llm.session(tmp_path / "a")
    session.append("Once upon a time")
    with session:
        pass
    session.close()
    assert (len(session), session.tokens()) == (0, [])
    for call in (
        lambda: session.append("x"),
        lambda: session.chat("x"),
        lambda: session.stream("x"),
        lambda: session.branch(["x"]),
        lambda: session.truncate(0),
        lambda: session.save(tmp_path / "b"),
        session.save,
        session.fork,
    ):
        with pytest.raises(puna.InvalidRequest, match=r"^this session was closed; open another"):
            call()
    assert not (tmp_path / "b").exists()


def test_streams_run_in_the_order_they_are_read(llm: puna.Engine) -> None:
    session = llm.session()
    first = session.stream("Tell me a story about a fox.", **GREEDY)
    second = session.stream("Tell me a story about a cat.", **GREEDY)
    list(first)
    text = "".join(str(chunk) for chunk in second)
    assert text == alone(llm, session.messages[:-1], **GREEDY).text
    assert len(session.messages) == 4


def test_a_text_is_cut_and_goes_another_way(llm: puna.Engine) -> None:
    ids = [5 + i * i % 600 for i in range(700)]
    session = llm.session()
    session.append(ids)
    for length in (698, 600, 512, 511, 300, 256, 1, 0):
        session.truncate(length)
        assert session.tokens() == ids[:length]
        fresh = llm.session()
        fresh.append([*ids[:length], 7, 8, 9])
        here = session.branch([[7, 8, 9, 10]], temperature=0, max_tokens=8)[0]
        there = fresh.branch([[10]], temperature=0, max_tokens=8)[0]
        assert here.tokens == there.tokens
    session.append(ids[:300])
    session.append(ids[300:])
    assert session.tokens() == ids
    with pytest.raises(puna.InvalidRequest, match="701 tokens were asked for"):
        session.truncate(701)
    talk = llm.session()
    talk.chat("Hello", **GREEDY)
    with pytest.raises(puna.InvalidRequest, match="conversation"):
        talk.truncate(1)


def test_a_token_is_not_lost_where_another_session_fails() -> None:
    """One session has its token when the prompt of another, of more passes, meets the end of
    memory."""
    ids = [5 + i * i % 600 for i in range(8000)]
    memory = puna.plan("demo", context=8000).memory_needed
    with puna.load("demo", progress=False, threads=2, context=8000, memory=memory) as llm:
        core = llm._core_engine()
        alone = core.session()
        alone.prompt(ids[:50], [])
        alone.begin(greedy())
        expected = [core.step([alone])[0].token for _ in range(2)]
        assert expected[0] != expected[1]
        held = [core.session(), core.session()]
        for i, session in enumerate(held):
            session.prompt([i, *ids[:5500]], [])
            session.begin(greedy())
            core.step([session])
        short, long = core.session(), core.session()
        short.prompt(ids[:50], [])
        short.begin(greedy())
        long.prompt([3, *ids[:7000]], [])
        long.begin(greedy())
        with pytest.raises(puna.OutOfMemory):
            core.step([short, long])
        assert short.length == 51  # it has its token
        assert [core.step([short])[0].token for _ in range(2)] == expected


def test_branches_are_as_many_at_once_as_memory_allows() -> None:
    # For a few branches besides.
    needed = puna.plan("demo", context=600, kv="int8").memory_needed + (1 << 20)
    prompts = [[5 + i, 6 + i] for i in range(40)]
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 3, "ignore_eos": True}
    with puna.load("demo", context=600, kv="int8", memory=needed, progress=False) as tight:
        session = tight.session()
        session.append([5 + i * i % 600 for i in range(500)])
        answers = session.branch(prompts, **options)
    with puna.load("demo", context=600, kv="int8", progress=False) as wide:
        session = wide.session()
        session.append([5 + i * i % 600 for i in range(500)])
        expected = session.branch(prompts, **options)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


def test_a_conversation_in_a_directory_keeps_it(llm: puna.Engine, tmp_path: Path) -> None:
    """Also where another conversation has begun in the same way: its chunks go on being written
    there, and the directory is free as soon as the session is gone."""
    path = tmp_path / "a"
    llm.chat("Tell me a story about a fox.", **GREEDY)
    session = llm.session(path)
    while len(session) < 600:
        session.chat("Tell me a story about a fox.", **GREEDY)
    session._session.flush()
    assert llm.verify(path).good_tokens >= 512
    with pytest.raises(puna.SessionMismatch, match="being written"):
        llm.session(path)
    del session
    gc.collect()
    assert len(llm.session(path)) >= 512


def test_a_directory_is_free_when_its_session_is_closed(llm: puna.Engine, tmp_path: Path) -> None:
    """Whole chunks of 256 tokens are written in the background."""
    for turn in range(4):
        session = llm.session(tmp_path / "a")
        session.append([5 + turn] * 2049)  # the last one is computed with what follows
        session.close()
        assert len(llm.session(tmp_path / "a", readonly=True)) == 2048 * (turn + 1)


def test_pictures_that_were_not_computed_are_asked_for(llm: puna.Engine, tmp_path: Path) -> None:
    """A crash in the middle of a picture leaves rows of it whose pixels are gone."""
    image, pad = llm.info.image_token, 100
    for attempt in range(9):
        session = llm.session(tmp_path / str(attempt))
        few = GREEDY | {"max_tokens": 1}
        session.chat("a " * pad, **few)
        session.chat("What is in this picture?", images=[picture(llm, 3)], **few)
        tokens = session.tokens()
        if list(tokens[255:257]) == [image, image]:
            break
        pad += 256 - tokens.index(image) - tokens.count(image) // 2
    assert list(tokens[255:257]) == [image, image]
    session.save()
    session.close()
    path = tmp_path / str(attempt)
    (path / "tail").unlink()
    with puna.load("demo", progress=False, threads=2) as other:
        core = other._core_engine().open(str(path), True)
        assert list(core.tokens(0)) == list(tokens[:256])
        core.append([image, 5])
        with pytest.raises(puna.InvalidRequest, match="ends within a picture"):
            core.prefill()
