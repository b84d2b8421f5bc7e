"""Ten million tokens, end to end: a long list of records is read once and asked about.

    python bench/ledger.py --tokens 10485756 --queries 1000 --kv int8 --json

writes the ledger model (tests/oracle/ledger.py) as a checkpoint into a temporary directory, makes a
prompt of random records K1 K2 V, reads it with puna, and asks for the V of some by their K1 K2: the
first and the last record, and random ones. Every answer is known; attention in the last layer goes
over the whole context, so each must find one key in millions. Records that straddle a boundary of
the attention chunks have lost their key and are reported apart: an engine that attends in a sliding
window would find them.

`--ram` bounds the memory for weights and KV cache together; with `--disk DIR` pages that do not fit
go there. The last line of `--json` is an object with all that was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import puna
from machine import machine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from oracle.ledger import Ledger  # noqa: E402

CHUNK = 8192
MOST_TOKENS = 10485760  # Scout's context
STRADDLERS = 20
PIECE = 1 << 16  # tokens handed over at a time


def questions(count: int, records: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records to ask for, the first and the last among them, and of straddlers."""
    straddling = (3 * np.arange(records) + 2) % CHUNK < 2
    whole, lost = np.flatnonzero(~straddling), np.flatnonzero(straddling)
    random = np.random.default_rng(seed)
    ends = np.unique(whole[[0, -1]])
    wanted = min(count, len(whole)) - len(ends)
    asked = random.choice(whole[1:-1], max(wanted, 0), replace=False)
    return np.concatenate([ends, asked]), random.permutation(lost)[:STRADDLERS]


def seconds_since(start: float) -> float:
    """Rounded to what matters."""
    return round(time.perf_counter() - start, 3)


def ask(session: puna.Session, records: np.ndarray, indices: np.ndarray) -> int:
    """How many of the records' values are found."""
    prompts = [records[i, :2] for i in indices]
    found = session.branch(prompts, max_tokens=1, temperature=0)
    return sum(answer.tokens == (records[i, 2],) for i, answer in zip(indices, found, strict=True))


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that is measured."""
    start = time.perf_counter()
    ledger = Ledger(chunk=CHUNK, third=2048, kv_heads=options.kv_heads, max_position=MOST_TOKENS)
    count = options.tokens // 3
    if 3 * count % CHUNK == CHUNK - 1:
        count -= 1  # or the boundary would part the K1 and K2 of a question
    records = ledger.records(count, options.seed)
    tokens = records.ravel()
    asked, straddlers = questions(options.queries, len(records), options.seed)
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "tokens": len(tokens),
        "records": len(records),
        "kv": options.kv,
        "kv_heads": options.kv_heads,
        "ram": options.ram,
        "disk": options.disk is not None,
    }
    with tempfile.TemporaryDirectory() as directory:
        path = ledger.write(Path(directory), "bfloat16")
        result["make_seconds"] = seconds_since(start)
        llm = puna.load(
            path,
            kv=options.kv,
            kv_offload=f"disk:{options.disk}" if options.disk else "auto",
            memory=options.ram,
            context=min(len(tokens) + 8, MOST_TOKENS),
            threads=options.threads,
            progress=False,
        )
        with llm:
            session = llm.session()
            began = time.perf_counter()
            session.append(tokens[at : at + PIECE] for at in range(0, len(tokens), PIECE))
            result["prefill_seconds"] = seconds_since(began)
            result["prefill_tokens_per_second"] = round(
                len(tokens) / (time.perf_counter() - began), 1
            )
            began = time.perf_counter()
            result["right"] = ask(session, records, asked)
            result["queries"] = len(asked)
            result["query_seconds"] = seconds_since(began)
            result["straddlers_found"] = ask(session, records, straddlers)
            result["straddlers"] = len(straddlers)
            result["device"] = llm.plan.device
            result["kv_bytes_per_token"] = llm.plan.kv_bytes_per_token
    result["seconds"] = seconds_since(start)
    result["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result["machine"] = machine()
    return result


def main() -> int:
    """Prints what was found; fails if an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--kv", default="int8", help="format of the KV cache")
    parser.add_argument("--ram", help='bytes for weights and KV cache, or like "8G"')
    parser.add_argument("--disk", type=Path, help="directory for what does not fit")
    parser.add_argument("--kv-heads", type=int, choices=(1, 2), default=1, help="2 that are alike")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print an object")
    options = parser.parse_args()
    if options.tokens < 9 or options.tokens > MOST_TOKENS - 4:
        parser.error(f"--tokens must be 9 to {MOST_TOKENS - 4}")
    result = run(options)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<26}{value}")
    return 0 if result["right"] == result["queries"] else 1


if __name__ == "__main__":
    sys.exit(main())
