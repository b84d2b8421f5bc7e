"""puna's tokenizer beside others, on Llama 4's vocabulary.

    python -m venv peers && peers/bin/pip install tiktoken tokenizers numpy Django Sphinx
    peers/bin/pip install --no-deps gigatoken fastokens quicktok-v1
    python bench/tokenizer.py --peers peers/bin/python --json bench/results/tokenizer.json

The vocabulary is that of the package llama-models; transformers writes it as tokenizer.json. Every
figure is the CPU time of one pinned thread over a text that the process has not seen, a process for
each; medians over the rounds, in which the tokenizers take turns. Ids are compared with tiktoken's
before a time counts, where tiktoken fails with puna's. Loading is measured with files that are in
memory, puna's without its cache and with it; --loads does that alone and leaves the other rows of
the JSON as they are.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.resources
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS = ("tiktoken", "tokenizers", "gigatoken", "fastokens", "quicktok")
OWN = ("puna", "puna_stream")
# What is loaded by which worker, and whether it may be in puna's cache.
LOADS = {
    "puna": ("puna", False),
    "puna, tokenizer.json": ("puna_json", False),
    "puna, from its cache": ("puna", True),
    "puna, tokenizer.json, from its cache": ("puna_json", True),
    **{name: (name, False) for name in PEERS},
}
TIMEOUT = 60  # seconds; the slowest peers need more for some texts, which is noted


def write_json(model: Path, target: Path) -> None:
    """tokenizer.json of tokenizer.model, as transformers converts it."""
    from llama_models.llama4.tokenizer import Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    meta = Tokenizer(model)
    names = sorted(meta.special_tokens, key=meta.special_tokens.__getitem__)
    options = {"pattern": meta.O200K_PATTERN, "extra_special_tokens": names}
    TikTokenConverter(str(model), **options).converted().save(str(target))


def measure(
    python: str, name: str, model: Path, document: Path, text: Path, *, cache: str = "off"
) -> dict[str, Any]:
    """One process, with puna's cache in a folder or off; {"failed": why} if it gives no result."""
    worker = HERE / "workers" / "tokenizer_worker.py"
    command = [python, str(worker), name, str(model), str(document), str(text)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=os.environ | {"PUNA_CACHE": cache},
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"over {TIMEOUT} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"failed": lines[-1][:120]}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def loads_of(model: Path, document: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of CPU time in which each is loaded."""
    text = document.parent / "short.txt"
    text.write_text("A short text.", encoding="utf-8")
    seconds: dict[str, list[float]] = {what: [] for what in LOADS}
    for turn in range(options.rounds + 1):
        for what, (name, cached) in LOADS.items():
            python = sys.executable if name.startswith("puna") else options.peers
            cache = str(document.parent / "cache") if cached else "off"
            run = measure(python, name, model, document, text, cache=cache)
            if turn > 0 and "failed" not in run:  # the first one fills the caches
                seconds[what].append(run["load"])
    found = {what: statistics.median(runs) for what, runs in seconds.items() if runs}
    print("  ".join(f"{what} {1e3 * value:.1f} ms" for what, value in found.items()), flush=True)
    return found


def row_of(text: Path, model: Path, document: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What all tokenizers do with a text."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*OWN, *PEERS)}
    for _ in range(options.rounds):
        for name, runs in found.items():
            if runs and "failed" in runs[-1]:
                continue
            python = sys.executable if name in OWN else options.peers
            runs.append(measure(python, name, model, document, text))
    reference = found["tiktoken"][0].get("digest") or found["puna"][0]["digest"]
    row: dict[str, Any] = {"text": text.stem, "bytes": found["puna"][0]["bytes"], "MB/s": {}}
    row |= {"decode MB/s": {}, "rss": {}, "differs": [], "failed": {}}
    for name, runs in found.items():
        if "failed" in runs[-1]:
            row["failed"][name] = runs[-1]["failed"]
            continue
        megabytes = row["bytes"] / 1e6
        row["MB/s"][name] = megabytes / statistics.median(run["encode"] for run in runs)
        row["rss"][name] = max(run["rss"] for run in runs)
        if "decode" in runs[0] and name != "puna_stream":
            seconds = max(statistics.median(run["decode"] for run in runs), 1e-6)
            row["decode MB/s"][name] = megabytes / seconds
        if any(run["digest"] != reference for run in runs):
            row["differs"].append(name)
    speeds = "  ".join(f"{name} {speed:.1f}" for name, speed in row["MB/s"].items())
    print(f"{text.stem}: {speeds}; differ: {row['differs']}; {row['failed']}", flush=True)
    assert not set(OWN) & set(row["differs"]), "wrong ids"
    return row


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--peers", required=True, help="an interpreter that has the others")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="texts whose name holds this")
    parser.add_argument("--loads", action="store_true", help="measure loading alone")
    options = parser.parse_args()
    model = Path(str(importlib.resources.files("llama_models"))) / "llama4" / "tokenizer.model"
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "tokenizer.json"
        write_json(model, document)
        loads = loads_of(model, document, options)
        if options.loads:
            if options.json:
                result = json.loads(options.json.read_text(encoding="utf-8")) | {"loads": loads}
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            return
        texts = Path(folder) / "texts"
        command = [options.peers, str(HERE / "tokenizer_corpora.py"), str(texts)]
        subprocess.run(command, check=True)
        order = [
            path
            for path in sorted(texts.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            if (options.only or "") in path.stem
        ]
        result = {
            "date": datetime.date.today().isoformat(),
            "processor": processor(),
            "load_average": round(os.getloadavg()[0], 1),
            "rounds": options.rounds,
            "versions": versions(options.peers),
            "loads": loads,
            "rows": [],
        }
        for text in order:
            result["rows"].append(row_of(text, model, document, options))
            if options.json:
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def versions(python: str) -> dict[str, str]:
    """Of the peers' packages."""
    names = [*PEERS[:4], "quicktok-v1"]
    script = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return dict(zip(PEERS, done.stdout.split(), strict=True))


def processor() -> str:
    """Its name as Linux tells it, or the architecture."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
