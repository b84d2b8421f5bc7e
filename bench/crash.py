"""Sessions on disk under fire: a process is killed while it reads and saves a text, over and over.

    python bench/crash.py --kills 300 --flips 10000 --json

A process opens a session, appends pieces of a text to it and now and then saves it, until SIGKILL
ends it at a random moment. Then everything that it had not synced is lost, or half of it, as
when the power fails (lost_writes.py). The next process goes on from what is found, until the text
is whole and another session begins. After each kill a third process looks:

* the session opens, `verify` finds no fault, and its text is a prefix of the text (`bad` counts
  those where this failed);
* all chunks and saves that were said to be durable are there (`most_recomputed`: tokens that had
  been read by calls which had returned and must be computed again; less than a chunk, always);
* the text's last logits, computed from what was found, have the same bits as if nothing had
  happened (`differing`).

Then single bits of a saved session are flipped: `verify` must find each, unless it is without
consequence (a second copy has it right, or the session is as short as if the last chunk had not
been written). `accepted` counts the others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lost_writes import LostWrites, preload
from machine import machine

CHUNK = 256  # of the demo model's attention
TOKENS = 12 * CHUNK + 100
QUESTION = [7, 8, 9]
TIMEOUT = 120.0


def text(seed: int) -> list[int]:
    """Ids that are in the demo's vocabulary; a few chunks and some more."""
    choice = random.Random(seed)
    return [5 + choice.randrange(600) for _ in range(TOKENS)]


def last_logits(session: Any, ids: list[int]) -> list[Any]:
    """What follows the whole text, with its probabilities, from where the session is."""
    if len(session) < len(ids):
        session.append(ids[len(session) :])
    answer = session.branch([QUESTION], max_tokens=4, temperature=0, logprobs=20)[0]
    return [
        [[top.token, top.logprob] for top in (item.chosen, *item.top)] for item in answer.logprobs
    ]


def work(kv: str, path: Path, ids: list[int], seed: int, tell: Callable[[Any], None]) -> None:
    """Reads the text, telling after each call how many of its tokens are durable and read."""
    choice = random.Random(seed)
    import puna

    with puna.load("demo", kv=kv, threads=1, progress=False) as llm:
        tell([0, 0])
        session = llm.session(path)
        while len(session) < len(ids):
            held = len(session)
            session.append(ids[held : held + choice.randint(1, 300)])
            computed = len(session) - 1
            tell([computed // CHUNK * CHUNK, computed])
            if choice.random() < 0.4:
                session.save()
                tell([computed, computed])


def look(kv: str, path: Path, ids: list[int], tell: Callable[[Any], None]) -> None:
    """Tells what is wrong with what is found, how long it is, and what follows the text."""
    import puna

    with puna.load("demo", kv=kv, threads=1, progress=False) as llm:
        if not (path / "journal").exists():
            session, faults = llm.session(), []
        else:
            report = llm.verify(path)
            faults = [report.fault] if report.fault else []
            session = llm.session(path, readonly=True)
        held = session.tokens()
        if held != ids[: len(held)]:
            faults.append(f"the {len(held)} tokens found are not those of the text")
            session = llm.session()
        tell({"faults": faults, "length": len(held), "logits": last_logits(session, ids)})


def flip_bits(kv: str, path: Path, flips: int, tell: Callable[[Any], None]) -> None:
    """Counts what becomes of flipped bits in the session at the path."""
    import puna

    choice = random.Random(flips)
    counts = {"found": 0, "harmless": 0, "shorter": 0, "accepted": 0}
    with puna.load("demo", kv=kv, threads=1, progress=False) as llm:
        session = llm.session(path, readonly=True)
        whole, expected = session.tokens(), session.branch([QUESTION], temperature=0, max_tokens=4)
        session.close()
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.stat().st_size]
        for _ in range(flips):
            file = choice.choice(files)
            place, bit = choice.randrange(file.stat().st_size), 1 << choice.randrange(8)
            with file.open("r+b", buffering=0) as changed:
                byte = os.pread(changed.fileno(), 1, place)[0]
                os.pwrite(changed.fileno(), bytes([byte ^ bit]), place)
                fate = _fate(llm, path, whole, expected)
                os.pwrite(changed.fileno(), bytes([byte]), place)
            counts[fate] += 1
    tell(counts)


def _fate(llm: Any, path: Path, whole: list[int], expected: list[Any]) -> str:
    if llm.verify(path).fault:
        return "found"
    session = llm.session(path, readonly=True)
    held = session.tokens()
    if len(held) < len(whole):
        return "shorter" if held == whole[: len(held)] else "accepted"
    answer = session.branch([QUESTION], temperature=0, max_tokens=4)
    return "harmless" if held == whole and answer[0].tokens == expected[0].tokens else "accepted"


class Process:
    """A function in a process of its own, and what it tells."""

    def __init__(self, run: Callable[..., None], *arguments: Any) -> None:
        """Starts it; its last argument is the function by which it tells."""
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            status = 1
            try:
                run(*arguments, lambda said: os.write(writing, json.dumps(said).encode() + b"\n"))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        self._reading = reading

    def wait_for_a_word(self) -> None:
        """Until it tells something, or ends."""
        select.select([self._reading], [], [], TIMEOUT)

    def kill(self) -> None:
        """At once."""
        os.kill(self.pid, signal.SIGKILL)

    def result(self) -> tuple[list[Any], bool]:
        """All that it told, and whether it came to its end."""
        with os.fdopen(self._reading, "rb") as pipe:
            lines = pipe.read().split(b"\n")
        _, status = os.waitpid(self.pid, 0)
        return [json.loads(line) for line in lines[:-1]], status == 0


def told(run: Callable[..., None], *arguments: Any) -> Any:
    """The last thing that a process tells; it must come to its end."""
    lines, good = Process(run, *arguments).result()
    if not good:
        raise RuntimeError(f"{run.__name__} failed")
    return lines[-1]


def seconds_of_a_life(kv: str, directory: Path) -> float:
    """From the first word of a process that is left in peace to its end."""
    worker = Process(work, kv, directory / "peace", text(0), 0)
    worker.wait_for_a_word()
    start = time.monotonic()
    _, ended = worker.result()
    if not ended:
        raise RuntimeError("a process that was not killed failed")
    return time.monotonic() - start


def crash(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """All kills; runs where syncs are remembered."""
    watched = Path(os.environ["LOST_WRITES_WATCHED"])
    lost = LostWrites(watched, Path(os.environ["LOST_WRITES_DURABLE"]))
    path, choice = watched / "session", random.Random(options.seed)
    # The sooner, the more often a session is opened again before its text is whole.
    longest = 0.6 * seconds_of_a_life(options.kv, directory)
    counts = dict.fromkeys(("kills", "ended_before", "sessions", "opened", "bad", "differing"), 0)
    most_recomputed, held = 0, TOKENS
    ids: list[int] = []
    expected: list[Any] = []
    while counts["kills"] < options.kills:
        if held >= TOKENS - 1:
            lost.start()
            counts["sessions"] += 1
            ids, held = text(options.seed + counts["sessions"]), 0
            expected = told(look, options.kv, directory / "none", ids)["logits"]
        worker = Process(work, options.kv, path, ids, choice.randrange(1 << 30))
        worker.wait_for_a_word()
        time.sleep(choice.uniform(0, longest))
        worker.kill()
        said, ended = worker.result()
        counts["ended_before" if ended else "kills"] += 1
        durable = max([held, *(line[0] for line in said)])
        computed = max([held, *(line[1] for line in said)])
        lost.lose(choice)

        counts["opened"] += (path / "journal").exists()
        found = told(look, options.kv, path, ids)
        held, faults = found["length"], found["faults"]
        if held < durable:
            faults.append(f"of {durable} durable tokens {held} are found")
        for fault in faults:
            print(f"kill {counts['kills']}: {fault}", file=sys.stderr)
        counts["bad"] += bool(faults)
        counts["differing"] += found["logits"] != expected
        most_recomputed = max(most_recomputed, computed - held)
        if faults:
            held = TOKENS  # another session
    return {
        **counts,
        "most_recomputed": most_recomputed,
        "lost_names": lost.names,
        "lost_blocks": lost.blocks,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Kills, then flipped bits."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        environment = preload(directory, directory / "watched", directory / "durable")
        environment["OPENBLAS_NUM_THREADS"] = "1"
        command = [sys.executable, __file__, *sys.argv[1:], "--inside", folder]
        inside = subprocess.run(
            command, env=os.environ | environment, stdout=subprocess.PIPE, check=True
        )
        result = {
            "date": datetime.date.today().isoformat(),
            "kv": options.kv,
            **json.loads(inside.stdout),
        }
        saved = directory / "flipped"
        told(save_one, options.kv, saved)
        result["flips"] = options.flips
        result |= told(flip_bits, options.kv, saved, options.flips)
        shutil.rmtree(saved)
    return result | {"seconds": round(time.monotonic() - start, 1), "machine": machine()}


def save_one(kv: str, path: Path, tell: Callable[[Any], None]) -> None:
    """A session of a few chunks and a tail."""
    import puna

    with puna.load("demo", kv=kv, threads=1, progress=False) as llm:
        session = llm.session()
        session.append(text(0)[: 2 * CHUNK + 60])
        session.save(path)
        tell(len(session))


def main() -> int:
    """Prints what was found; fails if a session was bad or a flipped bit was accepted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--kv", default="int8", help="format of the KV cache")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print an object")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(crash(options, options.inside)))
        return 0
    result = run(options)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<18}{value}")
    good = result["bad"] == result["differing"] == result["accepted"] == 0
    return 0 if good and result["most_recomputed"] < CHUNK else 1


if __name__ == "__main__":
    sys.exit(main())
