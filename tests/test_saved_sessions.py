"""Sessions on disk, and keys and values that do not fit into memory, through the public API."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import puna
from puna import session_notes
from puna.demo.scene import draw, random_scene

TEXT = {"type": "text", "text": "What is this?"}
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
STORY = "Once upon a time there was a fox who lived in a hollow tree near the river. "


def load(**options: Any) -> puna.Engine:
    return puna.load("demo", progress=False, threads=2, **options)


@pytest.fixture(scope="module", params=["auto", "int8", "int4"])
def llm(request: pytest.FixtureRequest) -> Iterator[puna.Engine]:
    with load(kv=request.param) as llm:
        yield llm


def continuation(session: puna.Session, ids: list[int]) -> tuple[int, ...]:
    return session.branch([ids], **GREEDY)[0].tokens


def test_a_text_is_there_again(llm: puna.Engine, tmp_path: Path) -> None:
    ids = llm.tokenizer.encode(STORY * 50)[:900]
    session = llm.session()
    session.append(ids)
    session.save(tmp_path / "a")
    held = session.tokens()
    expected = continuation(session, [5, 6])
    for readonly in (True, False):
        again = llm.session(tmp_path / "a", readonly=readonly)
        assert again.tokens() == held
        answer = again.branch([[5, 6]], **GREEDY)[0]
        assert answer.tokens == expected
        assert answer.usage.cached == len(held) - 1  # only what had not been computed is
        again.close()
    with load(kv=llm.plan.kv) as other:
        assert continuation(other.session(tmp_path / "a"), [5, 6]) == expected


def test_a_conversation_goes_on(llm: puna.Engine, tmp_path: Path) -> None:
    picture = draw(random_scene(random.Random(3)), llm.info.image_size)
    session = llm.session()
    session.chat("What is in this picture?", images=[picture], **GREEDY)
    session.save(tmp_path / "a")
    messages = list(session.messages)
    expected = session.chat("Tell me a story about a fox.", **GREEDY)
    again = llm.session(tmp_path / "a")
    assert [m["role"] for m in again.messages] == [m["role"] for m in messages]
    answer = again.chat("Tell me a story about a fox.", **GREEDY)
    assert answer.tokens == expected.tokens
    assert answer.usage.cached > llm.info.tokens_per_tile
    again.save()
    assert len(llm.session(tmp_path / "a", readonly=True).messages) == 4


def test_the_same_picture_twice_in_a_row(llm: puna.Engine, tmp_path: Path) -> None:
    """Two pictures, when they come back, too: what follows them is not computed again."""
    picture = draw(random_scene(random.Random(3)), llm.info.image_size)
    session = llm.session()
    session.chat("What is in these pictures?", images=[picture, picture], **GREEDY)
    session.save(tmp_path / "a")
    held = len(session)
    expected = session.chat("Tell me a story about a fox.", **GREEDY)
    again = llm.session(tmp_path / "a")
    answer = again.chat("Tell me a story about a fox.", **GREEDY)
    assert answer.tokens == expected.tokens
    assert answer.usage.cached == expected.usage.cached == held - 1


def test_a_session_opened_takes_the_memory_that_was_planned(
    llm: puna.Engine, tmp_path: Path
) -> None:
    """Its pages come from files; those that are computed have all of the context's room."""
    ids = [5 + i * i % 600 for i in range(3000)]
    session = llm.session()
    session.append(ids)
    session.save(tmp_path / "a")
    expected = continuation(session, [7, 8])
    plan = puna.plan("demo", kv=llm.plan.kv, context=4000)
    with load(kv=llm.plan.kv, context=4000, memory=plan.memory_needed) as tight:
        again = tight.session(tmp_path / "a")
        assert continuation(again, [7, 8]) == expected
        again.append([5 + i % 600 for i in range(900)])
        again.branch([[9]], temperature=0, max_tokens=1)


def test_what_was_not_saved_is_there_up_to_a_chunk(llm: puna.Engine, tmp_path: Path) -> None:
    """The demo's chunks are of 256 tokens."""
    script = (
        "import os, sys, puna\n"
        f"llm = puna.load('demo', progress=False, kv={llm.plan.kv!r})\n"
        "session = llm.session(sys.argv[1])\n"
        "session.append([5 + i % 600 for i in range(1000)])\n"
        "session._session.flush()\n"
        "os._exit(9)\n"
    )
    path = tmp_path / "a"
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False, timeout=120)
    assert done.returncode == 9
    again = llm.session(path)
    ids = [5 + i % 600 for i in range(1000)]
    assert again.tokens() == ids[:768]
    again.append(ids[768:])
    fresh = llm.session()
    fresh.append(ids)
    assert continuation(again, [7, 8]) == continuation(fresh, [7, 8])


def test_faults_are_found_and_named(llm: puna.Engine, tmp_path: Path) -> None:
    session = llm.session()
    session.append([5 + i % 600 for i in range(800)])
    session.save(tmp_path / "a")
    report = llm.verify(tmp_path / "a")
    assert (report.chunks, report.good_tokens, report.fault) == (3, len(session) - 1, "")
    chunk = max((tmp_path / "a" / "chunks").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(chunk.read_bytes())
    data[len(data) // 2] ^= 4
    copy = chunk.with_suffix(".copy")
    copy.write_bytes(data)
    copy.replace(chunk)
    report = llm.verify(tmp_path / "a")
    assert report.fault
    assert report.good_tokens % 256 == 0
    assert report.good_tokens < 768
    with pytest.raises(puna.InvalidRequest, match="extent is 'all'"):
        llm.verify(tmp_path / "a", "all")  # type: ignore[arg-type]


def test_a_damaged_session_is_cut_to_what_is_good(llm: puna.Engine, tmp_path: Path) -> None:
    ids = [5 + i % 600 for i in range(800)]
    session = llm.session()
    session.append(ids)
    session.save(tmp_path / "a")
    assert llm.truncate(tmp_path / "a", 800) == 799  # the last one had not been computed
    next((tmp_path / "a" / "chunks").iterdir()).unlink()
    with pytest.raises(puna.SessionMismatch, match="keeps the rest") as refused:
        llm.session(tmp_path / "a")
    good = int(re.search(r"to (\d+) tokens", str(refused.value))[1])  # type: ignore[index]
    assert llm.truncate(tmp_path / "a", good + 100) == good  # whole chunks
    again = llm.session(tmp_path / "a")
    assert again.tokens() == ids[:good]
    with pytest.raises(puna.SessionMismatch, match="is being written"):
        llm.truncate(tmp_path / "a", 0)
    again.append(ids[good:])
    assert continuation(again, [7, 8]) == continuation(session, [7, 8])
    with pytest.raises(puna.SessionMismatch, match="not a session"):
        llm.truncate(tmp_path / "nowhere", 0)
    with pytest.raises(puna.InvalidRequest, match="length is -1"):
        llm.truncate(tmp_path / "a", -1)


def test_a_conversation_goes_on_after_it_was_cut(llm: puna.Engine, tmp_path: Path) -> None:
    session = llm.session()
    while len(session) < 300:
        session.chat("Tell me a story about a fox.", temperature=0, max_tokens=60)
    session.save(tmp_path / "a")
    expected = session.chat("What is it?", **GREEDY)
    assert llm.truncate(tmp_path / "a", 300) == 256
    again = llm.session(tmp_path / "a")
    assert len(again) == 256
    answer = again.chat("What is it?", **GREEDY)
    assert answer.tokens == expected.tokens
    assert answer.usage.cached == 256


def test_sessions_of_others_are_refused(llm: puna.Engine, tmp_path: Path) -> None:
    session = llm.session()
    session.append([5 + i % 600 for i in range(300)])
    session.save(tmp_path / "a")
    with load(kv="fp32") as other, pytest.raises(puna.SessionMismatch, match="session"):
        other.session(tmp_path / "a")
    with pytest.raises(puna.SessionMismatch, match="nowhere"):
        llm.session(tmp_path / "nowhere", readonly=True)
    with pytest.raises(puna.InvalidRequest, match="give one"):
        llm.session().save()
    notes = tmp_path / "a" / "conversation.json"
    notes.write_text("{")
    with pytest.raises(puna.SessionMismatch, match="is damaged"):
        llm.session(tmp_path / "a")


def test_one_too_long_for_the_context_is_left_to_others(llm: puna.Engine, tmp_path: Path) -> None:
    with llm.session(tmp_path / "a") as session:
        session.append(llm.tokenizer.encode(STORY * 50)[:900])
        session.save()
    with load(kv=llm.plan.kv, context=512) as small:
        with pytest.raises(puna.ContextOverflow, match="load with context=900 or more"):
            small.session(tmp_path / "a")
        with llm.session(tmp_path / "a") as session:
            assert len(session) == 900
    with load(kv=llm.plan.kv, context=899) as small:  # all but the id that is not computed yet
        with pytest.raises(puna.ContextOverflow, match="load with context=900 or more"):
            small.session(tmp_path / "a")
        with llm.session(tmp_path / "a") as session:
            assert len(session) == 900
    with load(kv=llm.plan.kv, context=900) as large:
        assert len(large.session(tmp_path / "a")) == 900


def test_messages_that_were_edited(llm: puna.Engine, tmp_path: Path) -> None:
    """They are saved as they would be sent: a message may have no content, a picture be a file."""
    picture = draw(random_scene(random.Random(3)), llm.info.image_size)
    picture.save(tmp_path / "picture.png")
    session = llm.session()
    call = {"function": {"name": "sum", "arguments": {"a": 1}}}
    path = str(tmp_path / "picture.png")
    session.messages += [
        {"role": "user", "content": [{"type": "image", "path": path}, TEXT]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    session.save(tmp_path / "a")
    asked, answered = llm.session(tmp_path / "a", readonly=True).messages
    assert np.array_equal(asked["content"][0]["image"], np.asarray(picture))
    assert answered["tool_calls"] == [call]
    session.messages.append({"role": "user"})
    with pytest.raises(puna.InvalidRequest, match="has no content"):
        session.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_files_of_others_are_not_written_over(llm: puna.Engine, tmp_path: Path) -> None:
    held = {"header": b"mine" * 4000, "tokens": b"mine", "notes.txt": b"mine"}
    for name, content in held.items():
        (tmp_path / name).write_bytes(content)
    session = llm.session()
    session.append("Once upon a time")
    for call in (lambda: llm.session(tmp_path), lambda: session.save(tmp_path)):
        with pytest.raises(
            puna.SessionMismatch, match=r"holds notes.txt, and no session; give a new"
        ):
            call()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    # Nor is what is left of a session without its journal taken for an empty one.
    session.save(tmp_path / "a")
    (tmp_path / "a" / "journal").unlink()
    with pytest.raises(puna.SessionMismatch, match=r"holds conversation.json, and no session"):
        llm.session(tmp_path / "a")


def test_a_name_that_is_too_long(llm: puna.Engine) -> None:
    with pytest.raises(puna.StorageError, match="File name too long"):
        llm.session("x" * 300)


def test_pages_on_disk_give_the_same_answers(llm: puna.Engine, tmp_path: Path) -> None:
    ids = [5 + i * i % 600 for i in range(12_000)]
    resident = llm.session()
    resident.append(ids)
    expected = [continuation(resident, [i, i + 1]) for i in (5, 50)]
    options: dict[str, Any] = {"kv": llm.plan.kv, "context": 13_000}
    tight = puna.plan("demo", disk="1G", memory="1M", **options).memory_needed + (1 << 19)
    with load(kv_offload=f"disk:{tmp_path}", memory=tight, **options) as small:
        assert small.plan.kv_disk_bytes > 0  # not all of it fits into memory
        reader = small.session()
        reader.append(ids)
        assert [continuation(reader, [i, i + 1]) for i in (5, 50)] == expected
    assert not list(tmp_path.iterdir())  # gone with the engine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"computed": float("inf")}, "infinity"),
        ({"computed": float("nan")}, "NaN"),
        ({"computed": []}, "int"),
        ({"pending": [10**30]}, f"{10**30} is no token id"),
        ({"pending": [1, -1]}, "-1 is no token id"),
        ({"pending": [float("inf")]}, "infinity"),
        (None, "recursion"),
    ],
)
def test_damaged_notes(tmp_path: Path, change: dict[str, Any] | None, message: str) -> None:
    """Also where the checksum is right."""
    content = {"messages": [], "reads": True, "computed": 3, "pending": [4, 5], "tools": []}
    path = tmp_path / "conversation.json"

    def write(content: dict[str, Any]) -> None:
        digest = session_notes._digest(content)
        path.write_text(json.dumps({"version": 3, "sha256": digest, "content": content}))

    write(content)
    assert session_notes.read_notes(tmp_path).pending == [4, 5]
    if change is None:
        path.write_text("[" * 200_000)
    else:
        write({**content, **change})
    with pytest.raises(puna.SessionMismatch, match=f"is damaged .*{message}.*; delete it to go on"):
        session_notes.read_notes(tmp_path)
