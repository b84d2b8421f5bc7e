"""Computes jobs on a device, in a process of its own: the CUDA library is chosen once a process.

Reads a list of jobs from a JSON file, and writes the logits of each, and the tokens of a greedy
continuation, to an .npz file: `python -m oracle.on_device JOBS OUT`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Job:
    """A prompt for a checkpoint; `cuts`: the lengths of the pieces that it is computed in."""

    path: str
    tokens: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    pixels: str | None = None  # of an .npy file
    cuts: list[int] | None = None
    continuation: int = 0  # tokens
    sampling: dict[str, Any] = field(default_factory=dict)  # of the continuation; greedy
    beside: list[list[int]] = field(default_factory=list)  # prompts continued in the same batch
    # A saved session, which is continued by the prompt instead, and where it is saved afterwards.
    session: str | None = None
    saved: str | None = None


@dataclass(frozen=True)
class Result:
    """Logits of every token of the prompt, the continuation, what computed them, and warnings.

    Of a session, log-probabilities of the continuation instead.
    """

    logits: np.ndarray
    continuation: list[int]
    device: str
    warnings: list[str]


def compute(jobs: list[Job], folder: Path, library: str | None = None) -> list[Result]:
    """Results of jobs, with `library` in place of libpuna_cuda.so."""
    listing, out = folder / "jobs.json", folder / "results.npz"
    listing.write_text(json.dumps([asdict(job) for job in jobs]))
    environment = dict(os.environ)
    if library is not None:
        environment["PUNA_CUDA_LIBRARY"] = library
    command = [sys.executable, "-m", "oracle.on_device", str(listing), str(out)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as found:
        return [
            Result(
                found[f"logits{i}"],
                found[f"tokens{i}"].tolist(),
                str(found[f"device{i}"]),
                found[f"warnings{i}"].tolist(),
            )
            for i in range(len(jobs))
        ]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _run(job: Job) -> Result:
    import puna

    messages = _Messages()
    logging.getLogger("puna").handlers = [messages]
    with puna.load(job.path, progress=False, **job.options) as llm:
        if job.session is not None:
            session = llm.session(job.session, readonly=True)
            session.append(job.tokens)
            (answer,) = session.branch(
                [job.tokens[:1]],
                temperature=0,
                max_tokens=job.continuation,
                ignore_eos=True,
                logprobs=3,
            )
            if job.saved is not None:
                session.save(job.saved)
            probabilities = np.array(
                [[each.logprob for each in (of.chosen, *of.top)] for of in answer.logprobs]
            )
            return Result(probabilities, list(answer.tokens), llm.plan.device, messages.texts)
        pixels = None if job.pixels is None else np.load(job.pixels)
        logits = llm.logits(job.tokens, pixels, cuts=job.cuts)
        tokens: list[int] = []
        if job.continuation:
            made = llm.generate(
                [job.tokens, *job.beside],
                **{"temperature": 0, "max_tokens": job.continuation, "ignore_eos": True}
                | job.sampling,
            )
            assert isinstance(made, list)
            tokens = list(made[0].tokens)
        return Result(logits, tokens, llm.plan.device, messages.texts)


if __name__ == "__main__":
    RESULTS: dict[str, Any] = {}
    for number, raw in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        result = _run(Job(**raw))
        RESULTS[f"logits{number}"] = result.logits
        RESULTS[f"tokens{number}"] = np.array(result.continuation, np.int64)
        RESULTS[f"device{number}"] = np.array(result.device)
        RESULTS[f"warnings{number}"] = np.array(result.warnings, np.str_)
    np.savez(sys.argv[2], **RESULTS)
