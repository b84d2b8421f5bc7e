"""Threads, interruptions and closing: everything stops within a token, and nothing is mixed up."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import puna

# Long enough to be in the middle of when something happens, whatever the machine.
LONG = [5] * 120_000
ENDLESS: dict[str, Any] = {"ignore_eos": True, "max_tokens": 120_000}


def load() -> puna.Engine:
    return puna.load("demo", progress=False, threads=2)


@pytest.fixture(scope="module")
def llm() -> Iterator[puna.Engine]:
    with load() as llm:
        yield llm


def interrupt_after(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    return timer


def test_threads_share_an_engine(llm: puna.Engine) -> None:
    def work(i: int) -> list[Any]:
        story = llm.generate("Once upon a time", seed=i, max_tokens=40 + i)
        answer = llm.chat(
            f"Tell me a story about a {('fox', 'cat')[i % 2]}.", seed=i, max_tokens=40
        )
        session = llm.session()
        turns = [session.chat(q, seed=i, max_tokens=20).text for q in ("Hello.", "What is it?")]
        stream = "".join(str(c) for c in llm.stream("Hello.", seed=i, max_tokens=20))
        assert isinstance(story, puna.Completion)
        assert isinstance(answer, puna.Completion)
        logits = llm.logits(list(range(i, 50 + i))).tobytes()
        score = llm.score("Once upon a time").logprobs
        return [story.text, answer.text, turns, stream, logits, score]

    expected = [work(i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == expected


def test_threads_take_turns(llm: puna.Engine) -> None:
    done: list[float] = []

    def work() -> None:
        llm.generate("Once", **ENDLESS | {"max_tokens": 300})
        done.append(time.monotonic())

    threads = [threading.Thread(target=work) for _ in range(3)]
    start = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One after the other would end at 1/3, 2/3 and 3/3 of the time.
    assert min(done) - start > 0.6 * (max(done) - start)


def test_two_threads_do_not_share_a_session(llm: puna.Engine) -> None:
    session = llm.session()
    stream = session.stream("Hello.", **ENDLESS)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(session.chat, "Hello.")
        with pytest.raises(puna.InvalidRequest, match="in the middle of an answer"):
            other.result(timeout=20)


def test_threads_may_look_at_a_session_that_answers(llm: puna.Engine) -> None:
    session = llm.session()
    lengths: list[int] = []

    def look() -> None:
        while not ended.wait(0.001):
            length = len(session)
            assert len(session.tokens()) >= length
            lengths.append(length)

    ended = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        session.chat("Hello.", **ENDLESS | {"max_tokens": 300})
        ended.set()
        for one in looking:
            one.result(timeout=20)
    assert len(session) > 300
    assert len(set(lengths)) > 10


def test_threads_share_an_encoder(llm: puna.Engine) -> None:
    block, times = "Once upon a time, there was a fox. " * 5_000, 12
    encoder = llm.tokenizer.stream_encoder()
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(encoder.feed, [block] * times))
    # Equal blocks make the same text in any order.
    ids = sum(len(part) for part in parts) + len(encoder.finish())
    assert ids == len(llm.tokenizer.encode(block * times))


def test_computing_lets_other_python_threads_run(llm: puna.Engine) -> None:
    ticks = 0
    stop = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.wait(0.001):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    llm.generate(LONG, timeout=0.5)
    stop.set()
    thread.join()
    assert ticks > 50


@pytest.mark.parametrize("call", ["generate", "stream", "logits", "score", "session"])
def test_ctrl_c_stops_a_long_prompt(llm: puna.Engine, call: str) -> None:
    session = llm.session()
    calls = {
        "generate": lambda: llm.generate(LONG, **ENDLESS | {"max_tokens": 1}),
        "stream": lambda: list(llm.stream(LONG, **ENDLESS)),
        "logits": lambda: llm.logits(LONG[:30_000]),
        "score": lambda: llm.score(LONG),
        "session": lambda: session.chat("fox " * 50_000),
    }
    timer = interrupt_after(0.3)
    with pytest.raises(KeyboardInterrupt):
        calls[call]()
    stopped = time.monotonic()
    timer.join()
    assert time.monotonic() - stopped < 1
    # The engine goes on as if nothing had been asked.
    assert session.messages == []
    assert str(session.chat("Tell me a story about a fox.", temperature=0, max_tokens=20)) == str(
        llm.chat("Tell me a story about a fox.", temperature=0, max_tokens=20)
    )


def test_ctrl_c_keeps_what_a_session_said(llm: puna.Engine) -> None:
    session = llm.session()
    said: list[str] = []
    timer = interrupt_after(0.3)
    with pytest.raises(KeyboardInterrupt):
        for chunk in session.stream("Tell me a story about a fox.", **ENDLESS):
            said.append(chunk.text)
    timer.join()
    gc.collect()
    assert len(said) > 3
    assert session.messages[-1]["content"].startswith("".join(said))
    assert session.chat("Hello.", max_tokens=3).usage.completion == 3


@pytest.mark.parametrize("call", ["generate", "batch", "stream", "logits", "score"])
def test_close_from_another_thread(call: str) -> None:
    llm = load()
    calls = {
        "generate": lambda: llm.generate(LONG, **ENDLESS | {"max_tokens": 1}),
        "batch": lambda: llm.generate(["a", "b"], **ENDLESS),
        "stream": lambda: list(llm.stream("Hello.", **ENDLESS)),
        "logits": lambda: llm.logits(LONG[:30_000]),
        "score": lambda: llm.score(LONG),
    }
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(calls[call])
        time.sleep(0.3)
        assert not running.done()
        start = time.monotonic()
        llm.close()
        assert time.monotonic() - start < 1
        with pytest.raises(puna.EngineClosed):
            running.result(timeout=20)


def test_breaking_out_frees_what_was_held(llm: puna.Engine) -> None:
    def held() -> int:
        result = llm.generate("x", max_tokens=1)
        assert isinstance(result, puna.Completion)
        return result.timings.kv_bytes

    before = held()
    for _ in range(10):
        for _chunk in llm.stream([5] * 600, **ENDLESS):
            break
    assert held() == before


# The thread is in the core when Python ends: in a prompt, and between tokens.
@pytest.mark.parametrize("prompt", ["'Once ' * 300_000", "'Once'"])
def test_python_ends_while_a_daemon_thread_computes(prompt: str) -> None:
    code = f"""
import puna, threading, time
llm = puna.load("demo", threads=1, progress=False)
def work():
    try:
        llm.generate({prompt}, max_tokens=10**7, ignore_eos=True)
    except puna.EngineClosed:
        pass
threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_engines_are_independent() -> None:
    with load() as one, load() as two:
        expected = str(one.generate("Once upon a time", seed=1, max_tokens=20))
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(
                lambda llm: str(llm.generate("Once upon a time", seed=1, max_tokens=20)),
                [one, two] * 5,
            )
            assert set(results) == {expected}
        one.close()
        assert str(two.generate("Once upon a time", seed=1, max_tokens=20)) == expected


def test_a_forked_process_computes(llm: puna.Engine) -> None:
    expected = str(llm.generate("Once upon a time", temperature=0, max_tokens=20))
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion may leave this block
        status = 1
        try:
            text = str(llm.generate("Once upon a time", temperature=0, max_tokens=20))
            os.write(writer, text.encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read().decode() == expected
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_process_leaves_the_files_of_its_parent(tmp_path: Path) -> None:
    disk = tmp_path / "kv"
    with puna.load("demo", progress=False, threads=2, kv_offload=f"disk:{disk}") as llm:
        session = llm.session()
        session.append([5 + i % 600 for i in range(2000)])
        session._session.flush()
        files = sorted(disk.rglob("*"))
        assert len(files) > 4
        child = os.fork()
        if child == 0:
            status = 1
            try:
                session.close()
                llm.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert sorted(disk.rglob("*")) == files
        session.append([7] * 300)
        assert len(session.branch([[8]], temperature=0, max_tokens=2)[0].tokens) == 2
