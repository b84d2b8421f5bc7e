"""puna beside llama.cpp and ik_llama.cpp on the same GGUF file, in turns in one run.

It installs nothing. The peers are built from their source packages, with the flags of this machine:

    python -m venv llama && CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_OPENSSL=OFF" \\
        llama/bin/pip install --no-binary llama-cpp-python llama-cpp-python==0.3.36
    python -m venv ik && CMAKE_ARGS="-DGGML_NATIVE=ON -DGGML_IQK_FA_ALL_QUANTS=OFF" \\
        ik/bin/pip install --no-binary ik-llama-cpp-python ik-llama-cpp-python==0.1.5

(the second flag of each leaves out parts that are not measured; where the source package of the
second lacks vendor/ik_llama.cpp/common/cmake/build-info-gen-cpp.cmake, unpack it, write that file
with a configure_file() of common/build-info.cpp.in to common/build-info.cpp, and install the
folder), and then, with puna, gguf and
numpy installed:

    python bench/compare_llama_cpp.py --llama-cpp llama/bin/python --ik ik/bin/python

The file is a synthetic slice with the true layer shapes and a vocabulary of 8192 instead of 202048
(see synthetic_gguf.py); it is written once into --directory. Each engine runs in a process of its
own, so that its memory is its own; one computes while the others sleep. Every round measures every
row once in every engine (decoding, which is short, five times), the first engine another one each
round; medians over the rounds are
compared. Each peer has its best settings: weights repacked at loading into memory of its own with
huge pages, and flash attention and micro-batch as its own first round finds them faster, row by
row. Read README.md beside this file for how to read the result.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import machine
from synthetic_gguf import FAMILIES, RECIPES, Slice, normal_tokens, write

WORKERS = Path(__file__).parent / "workers"
RESULTS = Path(__file__).parent / "results"
DECODED = 64
# How often decoding is measured in a round: it is short, and as noisy as the memory of a machine
# that others use as well.
DECODE_REPEATS = 5
# Tokens of a prompt that goes on at a depth; so few that from 8000 it ends within the same chunk,
# since llama.cpp cannot cut its cache back to a chunk that it has left.
CONTINUED = 128
# puna and the peers hold the weights in memory of their own, and the file may be mapped or cached
# besides.
COPIES_OF_FILE = 1.15


class Worker:
    """One engine in its own process."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        # Huge pages for what malloc gives: the only way for llama.cpp, where the system leaves it
        # to the program.
        environment = dict(os.environ, GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
        if name == "puna":
            environment.pop("GLIBC_TUNABLES")  # it asks for them itself
        self._log = log
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a request and waits for its answer."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise EngineError(f"{self.name} ended with {self._process.wait()}; see {self._log}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer["ok"]

    def close(self) -> None:
        """Ends the process and waits until its memory is free."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self._process.stdin.close()
        self._process.wait(60)


class EngineError(Exception):
    """An engine could not do what was asked; the others go on without it."""


@dataclass
class Row:
    """One thing that is measured, and the seconds it took in each round of each engine."""

    kind: str  # prefill | decode
    tokens: int
    depth: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    ceilings: list[dict[str, float]] = field(default_factory=list)  # measured beside it

    def measure(self, worker: Worker, variant: dict[str, Any], vocabulary: int) -> float:
        """Seconds of one run."""
        return worker.ask(
            self.kind, count=self.tokens, depth=self.depth, vocabulary=vocabulary, variant=variant
        )

    @property
    def repeats(self) -> int:
        """How often it is measured in a round."""
        return DECODE_REPEATS if self.kind == "decode" else 1

    def rate(self, engine: str) -> float | None:
        """Median tokens per second."""
        seconds = self.seconds.get(engine)
        return self.tokens / statistics.median(seconds) if seconds else None

    def ceiling(self, name: str) -> float | None:
        """Median of a ceiling, in 10^9 per second; None if it was not measured."""
        values = [sample[name] for sample in self.ceilings if name in sample]
        return statistics.median(values) if values else None


class Exclusive:
    """Locks that keep other work off the machine while something is measured; see --lock."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Waits for the locks and holds them."""
        with contextlib.ExitStack() as stack:
            for path in self._paths:
                file = stack.enter_context(path.open("a"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


class Comparison:
    """All engines on one file with one number of threads."""

    def __init__(self, arguments: argparse.Namespace, model: Slice, path: Path, threads: int):
        self.arguments, self.model, self.path, self.threads = arguments, model, path, threads
        self.commands = _commands(arguments)
        self.exclusive = Exclusive(arguments.lock)
        self.puna_path = path
        if arguments.puna_quant:
            self.puna_path = _packed(path, arguments.puna_quant, arguments.puna_override)
        self.rows = [Row("prefill", tokens, 0) for tokens in arguments.prefill]
        self.rows += [Row("prefill", CONTINUED, depth) for depth in arguments.depths if depth]
        self.rows += [Row("decode", DECODED, depth) for depth in arguments.depths]
        self.context = (
            max(*arguments.prefill, *(depth + CONTINUED for depth in arguments.depths), 512) + 256
        )
        self.loads: dict[str, dict[str, float]] = {}
        self.memory: dict[str, dict[str, int]] = {}
        self.logits: dict[str, list[float]] = {}
        self.failures: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}
        self._warm: set[tuple[str, int]] = set()  # engines since they were opened, and rows

    def run(self) -> None:
        """Measures everything."""
        together = self._fits_together()
        print(
            f"\n{self.path.name}, {self.threads} thread(s), engines "
            f"{'side by side' if together else 'loaded one after the other in every round'}"
        )
        try:
            for path in {self.path, self.puna_path}:
                _read_once(path)
            for name in list(self.commands):
                self._attempt(name, self._first_load)
                if not together:
                    self._close(name)
            for round_ in range(self.arguments.rounds):
                names = [name for name in self.commands if name not in self.failures]
                names = names[round_ % len(names) :] + names[: round_ % len(names)] if names else []
                if together:
                    for row in self.rows:
                        for _ in range(row.repeats):
                            self._sample_ceilings(row)
                            for name in names:
                                self._attempt(name, self._measure, row)
                else:
                    for name in names:
                        for row in self.rows:
                            for _ in range(row.repeats):
                                self._sample_ceilings(row)
                                self._attempt(name, self._measure, row)
                        self._close(name)
        finally:
            for name in list(self._workers):
                self._close(name)

    def _attempt(self, name: str, run: Any, *arguments: Any) -> None:
        if name in self.failures:
            return
        try:
            run(name, *arguments)
        except EngineError as error:
            print(f"  {name} is out: {error}")
            self.failures[name] = str(error).strip().splitlines()[-1]
            self._close(name)

    def _first_load(self, name: str) -> None:
        """Load times, cold and warm, and the logits of a prompt for the comparison of results."""
        times = {}
        if name == "puna" and self.arguments.packed:
            times["packed"] = self._load_packed()
        for state in ("cold", "warm"):
            self._close(name)
            if state == "cold":
                _drop_from_cache(self._file(name))
            with self.exclusive():
                times[state] = self._open(name)
        self.loads[name] = times
        tokens = min(128, min(self.arguments.prefill, default=128))
        self.logits[name] = self._workers[name].ask(
            "logits", count=tokens, vocabulary=normal_tokens(self.model)
        )
        print(
            f"  {name}: loaded in {times['cold']:.2f} s cold, {times['warm']:.2f} s warm",
            flush=True,
        )

    def _load_packed(self) -> float:
        """The time of loading the same weights in puna's packed form."""
        packed = _packed(self.path)
        _read_once(packed)
        self._close("puna")
        with self.exclusive():
            return self._open("puna", packed)

    def _file(self, name: str) -> Path:
        return self.puna_path if name == "puna" else self.path

    def _open(self, name: str, path: Path | None = None) -> float:
        self._warm = {(warm, row) for warm, row in self._warm if warm != name}
        log = Path(tempfile.gettempdir()) / f"compare-{name}.log"
        self._workers[name] = Worker(name, self.commands[name], log)
        return self._workers[name].ask(
            "load",
            path=str(path or self._file(name)),
            threads=self.threads,
            context=self.context,
            options=self._puna_options() if name == "puna" else {},
        )

    def _puna_options(self) -> dict[str, Any]:
        options = json.loads(self.arguments.puna_options)
        if self.arguments.sessions:
            options["sessions"] = self.arguments.sessions
        return options

    def _close(self, name: str) -> None:
        worker = self._workers.pop(name, None)
        if worker is None:
            return
        with contextlib.suppress(EngineError, OSError):
            now = worker.ask("memory")
            self.memory[name] = {
                key: max(value, self.memory.get(name, {}).get(key, 0)) for key, value in now.items()
            }
        worker.close()

    def _measure(self, name: str, row: Row) -> None:
        if name not in self._workers:
            self._open(name)
        worker = self._workers[name]
        vocabulary = normal_tokens(self.model)
        if name not in row.variants:
            row.variants[name] = self._best_variant(worker, row, vocabulary)
        if (name, id(row)) not in self._warm:
            # Once without the clock: caches are filled, and the prompt of a depth is computed.
            row.measure(worker, row.variants[name], vocabulary)
            self._warm.add((name, id(row)))
        with self.exclusive():
            seconds = row.measure(worker, row.variants[name], vocabulary)
        row.seconds.setdefault(name, []).append(seconds)
        print(
            f"    {row.kind} {row.tokens} at {row.depth}, {name}: "
            f"{row.tokens / seconds:.1f} tokens/s",
            flush=True,
        )

    def _best_variant(self, worker: Worker, row: Row, vocabulary: int) -> dict[str, Any]:
        variants = worker.ask("variants", kind=row.kind)
        if row.kind == "prefill":
            # A larger micro-batch than the prompt changes nothing.
            variants = [v for v in variants if v.get("ubatch", 0) <= max(row.tokens, 512)]
        if len(variants) == 1:
            return variants[0]
        best: dict[int, float] = {}
        for index, variant in enumerate(variants):
            row.measure(worker, variant, vocabulary)
            with self.exclusive():
                best[index] = min(row.measure(worker, variant, vocabulary) for _ in range(2))
        return variants[min(best, key=lambda index: best[index])]

    def _sample_ceilings(self, row: Row) -> None:
        if not self.arguments.puna_bench:
            return
        command = [self.arguments.puna_bench, "ops", "--only", "no kernel", "--rounds", "1"]
        command += ["--threads", str(self.threads), "--json"]
        with self.exclusive():
            result = subprocess.run(command, capture_output=True, text=True, check=True)
        row.ceilings.append(json.loads(result.stdout)["facts"])

    def _fits_together(self) -> bool:
        each = self.path.stat().st_size * COPIES_OF_FILE
        kv = self.context * self.model.layers * 4096 * len(self.arguments.depths)
        need = len(self.commands) * (each + kv) + self.path.stat().st_size
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return need < (int(fields["MemAvailable"].split()[0]) << 10)

    # --- results ---------------------------------------------------------------------------------

    def result_rows(self) -> list[dict[str, Any]]:
        """One flat object per measured row; speeds are tokens per second, loads are seconds."""
        rows = [self._speed_row(row) for row in self.rows]
        for state in ("cold", "warm", "packed"):
            values = {
                name: round(times[state], 3) for name, times in self.loads.items() if state in times
            }
            if not values:
                continue
            row = {
                "kind": "load",
                **self._common(),
                "tokens": 0,
                "depth": 0,
                "state": state,
                **values,
            }
            peers = [value for name, value in values.items() if name != "puna"]
            if "puna" in values and peers:
                # As everywhere, above 1 is faster than the better peer.
                row["ratio_best_peer"] = round(min(peers) / values["puna"], 3)
            rows.append(row)
        return rows

    def _common(self) -> dict[str, Any]:
        common: dict[str, Any] = {
            "model": self.model.model,
            "type": self.model.recipe,
            "layers": self.model.layers,
            "threads": self.threads,
        }
        if self.arguments.puna_quant:
            overrides = self.arguments.puna_override
            common["puna_quant"] = ", ".join([self.arguments.puna_quant, *overrides])
        return common

    def _speed_row(self, row: Row) -> dict[str, Any]:
        rates = {name: row.rate(name) for name in self.commands}
        known = {name: rate for name, rate in rates.items() if rate is not None}
        result: dict[str, Any] = {
            "kind": row.kind,
            **self._common(),
            "tokens": row.tokens,
            "depth": row.depth,
        }
        result |= {name: round(rate, 2) for name, rate in known.items()}
        peers = [rate for name, rate in known.items() if name != "puna"]
        if "puna" in known and peers:
            result["ratio_best_peer"] = round(known["puna"] / max(peers), 3)
        if row.kind == "decode":
            depth = row.depth + row.tokens // 2
            work = self.model.decode_bytes() + self.model.kv_bytes(depth)
            unit, ceiling = "GB/s", row.ceiling("read GB/s")
        else:
            work = self.model.prefill_operations()
            unit, ceiling = "GOP/s", row.ceiling("int8 peak GOP/s")
        if self.arguments.puna_quant and row.kind == "decode":
            known.pop("puna", None)  # its bytes are not those of the file
        result[unit] = {name: round(rate * work / 1e9, 2) for name, rate in known.items()}
        if ceiling:
            result["ceiling"] = round(ceiling, 2)
            result["share_of_ceiling"] = {
                name: round(rate * work / 1e9 / ceiling, 3) for name, rate in known.items()
            }
        result["settings"] = {n: v for n, v in row.variants.items() if v}
        return result

    def agreement(self) -> dict[str, float]:
        """Cosine of each engine's logits with those of the first peer, to show that they agree."""
        reference = next((name for name in self.logits if name != "puna"), None)
        if reference is None:
            return {}
        a = self.logits[reference]
        return {
            name: round(_cosine(a, b), 5) for name, b in self.logits.items() if name != reference
        }


def _cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def _commands(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """How the worker of each engine is started."""
    peer = str(WORKERS / "llama_cpp_worker.py")
    commands = {}
    if not arguments.peers_only:
        commands["puna"] = [sys.executable, str(WORKERS / "puna_worker.py")]
    if arguments.llama_cpp:
        commands["llama_cpp"] = [arguments.llama_cpp, peer, "llama.cpp"]
    if arguments.ik:
        commands["ik_llama_cpp"] = [arguments.ik, peer, "ik"]
    return commands


def _packed(path: Path, quant: str = "", overrides: Sequence[str] = ()) -> Path:
    """The weights of a GGUF file in puna's packed form beside it, made if it is not there."""
    name = re.sub(r"[^0-9A-Za-z_.]+", "-", "-".join([quant, *overrides]))
    packed = path.with_suffix(f".{name}.packed" if name else ".packed")
    if not (packed / "config.json").exists():
        command = [sys.executable, "-m", "puna", "quantize", str(path), str(packed)]
        if quant:
            command += ["--quant", quant]
        for override in overrides:
            command += ["--quant-override", override]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return packed


def _files(path: Path) -> list[Path]:
    """A file, or those of a directory."""
    return [file for file in path.iterdir() if file.is_file()] if path.is_dir() else [path]


def _read_once(path: Path) -> None:
    """Reads it, so that what caches it below this system has it for the first engine too."""
    buffer = bytearray(1 << 24)
    for each in _files(path):
        with each.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _drop_from_cache(path: Path) -> None:
    for each in _files(path):
        with each.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _print_table(comparison: Comparison) -> None:
    names = list(comparison.commands)
    widths = [max(12, len(name)) for name in names]
    header = "".join(f"  {name:>{width}}" for name, width in zip(names, widths, strict=True))
    print(f"\n{'tokens/s':24}{header}  {'ratio':>6}  share of ceiling")
    for row in comparison.result_rows():
        if row["kind"] == "load":
            label = f"load {row['state']}, s"
        else:
            label = f"{row['kind']} {row['tokens']} at {row['depth']}"
        cells = "".join(
            f"  {row.get(name, '-'):>{width}}" for name, width in zip(names, widths, strict=True)
        )
        shares = row.get("share_of_ceiling", {})
        share = ", ".join(f"{name} {100 * value:.0f} %" for name, value in shares.items())
        print(f"{label:24}{cells}  {row.get('ratio_best_peer', '-'):>6}  {share}")
    for name, memory in comparison.memory.items():
        print(
            f"peak memory of {name}: {memory['peak'] / 1e9:.2f} GB "
            f"({memory['peak'] / comparison.path.stat().st_size:.2f} of the file)"
        )
    print(f"cosine of logits: {comparison.agreement()}")
    for name, failure in comparison.failures.items():
        print(f"{name} failed: {failure}")


def _whole_numbers(text: str) -> list[int]:
    return [int(item) for item in text.split(",") if item]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", maxsplit=1)[0],
        epilog="More in the first lines of this file.",
    )
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="interpreter with llama-cpp-python")
    parser.add_argument("--ik", metavar="PYTHON", help="interpreter with ik-llama-cpp-python")
    parser.add_argument("--model", choices=FAMILIES, default="scout")
    parser.add_argument("--type", choices=RECIPES, default="Q4_0")
    parser.add_argument("--layers", type=int, help="default: 4")
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="of the GGUF file"
    )
    parser.add_argument("--prefill", type=_whole_numbers, default=[128, 512, 2048], metavar="N,N")
    # Just below a multiple of the chunk of 8192 local layers have the most to read.
    parser.add_argument("--depths", type=_whole_numbers, default=[0, 8000, 32000], metavar="N,N")
    parser.add_argument("--threads", type=_whole_numbers, default=[1, 2], metavar="N,N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="prefill 128 and 512, decode at depth 0, 2 threads, 3 rounds",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="also time loading puna's packed form of the file, made beside it and warm",
    )
    parser.add_argument(
        "--puna-quant",
        metavar="QUANT",
        help="puna with a weight format of its own, made of the file, beside the peers with the "
        "file",
    )
    parser.add_argument(
        "--puna-override",
        action="append",
        default=[],
        metavar="PATTERN=FORMAT",
        help="as --quant-override of puna quantize",
    )
    parser.add_argument("--peers-only", action="store_true", help="leave puna out")
    parser.add_argument(
        "--puna-options", default="{}", metavar="JSON", help="more keywords of puna.load"
    )
    parser.add_argument(
        "--sessions",
        metavar="DIR",
        help="where puna saves the prompts of depths, so that a run after the first resumes them",
    )
    parser.add_argument(
        "--puna-bench", default=_puna_bench(), metavar="PATH", help="measures the ceilings"
    )
    parser.add_argument(
        "--lock",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="held exclusively during each measurement, where a machine is shared",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="default: bench/results/llama_cpp_MODEL_TYPE.json; 'none' writes none",
    )
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.prefill, arguments.depths = [128, 512], [0]
        arguments.threads, arguments.rounds = [2], 3
    return arguments


def _puna_bench() -> str | None:
    beside = Path(sys.executable).parent / "puna-bench"
    return str(beside) if beside.exists() else shutil.which("puna-bench")


def main() -> None:
    """Runs the comparison and writes its result."""
    arguments = _arguments()
    layers = arguments.layers or FAMILIES[arguments.model].layers
    model = Slice(arguments.model, arguments.type, layers)
    path = write(model, arguments.directory)
    comparisons = []
    for threads in arguments.threads:
        comparison = Comparison(arguments, model, path, threads)
        comparison.run()
        _print_table(comparison)
        comparisons.append(comparison)
    result = {
        "what": f"synthetic slice of Llama 4 {model.model}: true layer shapes, {layers} layers, "
        f"vocabulary {model.vocabulary}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "file_bytes": path.stat().st_size,
        "rounds": arguments.rounds,
        "rows": [row for comparison in comparisons for row in comparison.result_rows()],
        "ceilings": {
            c.threads: c.rows[-1].ceilings[-1] for c in comparisons if c.rows[-1].ceilings
        },
        "peak_memory": {c.threads: c.memory for c in comparisons},
        "cosine_of_logits": {c.threads: c.agreement() for c in comparisons},
        "failures": {c.threads: c.failures for c in comparisons if c.failures},
    }
    own = f"_puna_{arguments.puna_quant}" if arguments.puna_quant else ""
    target = arguments.json or RESULTS / f"llama_cpp_{model.model}_{model.recipe}{own}.json"
    if str(target) != "none":
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {target}")


if __name__ == "__main__":
    main()
