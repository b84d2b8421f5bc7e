"""Figures of the model card: loss, bits per byte and what quantising costs, by kind of document:

`python -m tools.demo_model.figures --reference build/demo-hf [--model demo]` prints Markdown.

The reference is what `export` wrote, in bfloat16. All of it is computed by puna, over the tokens
that the assistant writes in held-out documents.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import puna
from tools.demo_model.data import Document
from tools.demo_model.held_out import held_out_writer
from tools.demo_model.model import SHAPES
from tools.demo_model.tokenizer import RANKS, read_ranks

QUANTS = ("int8", "int4", "table4_32", "int4_128")


@dataclass
class Figures:
    """Sums over the answers of one kind of document."""

    tokens: int = 0
    size: int = 0  # bytes
    nats: float = 0.0
    divergence: float = 0.0


def documents(ranks: Path, shape: str, count: int) -> dict[str, list[Document]]:
    """Held-out documents of every kind."""
    writer = held_out_writer(read_ranks(ranks), SHAPES[shape])
    return {name: [make() for _ in range(count)] for name, make in writer.kinds.items()}


def log_probabilities(llm: puna.Engine, document: Document) -> NDArray[np.float64]:
    """[answer tokens, vocabulary]."""
    pixels = np.stack(document.pictures) if document.pictures else None
    rows = llm.logits(document.ids[:-1], pixels)[np.array(document.weights[1:]) > 0]
    rows = rows.astype(np.float64)
    rows -= rows.max(1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(1, keepdims=True))


def measure(
    llm: puna.Engine, reference: puna.Engine, texts: dict[str, list[Document]]
) -> dict[str, Figures]:
    """Figures by kind, and of all."""
    found: dict[str, Figures] = defaultdict(Figures)
    for kind, parts in texts.items():
        for document in parts:
            own, true = (log_probabilities(one, document) for one in (llm, reference))
            answer = np.array(document.ids[1:])[np.array(document.weights[1:]) > 0]
            size = len(llm.tokenizer.decode(answer[answer < RANKS].tolist()).encode())
            for figures in (found[kind], found["all"]):
                figures.tokens += len(answer)
                figures.size += size
                figures.nats -= own[np.arange(len(answer)), answer].sum()
                figures.divergence += (np.exp(true) * (true - own)).sum()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="xs")
    parser.add_argument("--count", type=int, default=60, help="documents of each kind")
    options = parser.parse_args()
    texts = documents(options.reference / "tokenizer.model", options.shape, options.count)
    with puna.load(options.reference, progress=False) as reference:
        base = measure(reference, reference, texts)["all"]
        print("| weights | MB | loss, of bf16 | KL to bf16, nats per token |\n|---|---|---|---|")
        shipped = {}
        for quant in (None, *QUANTS):
            path = options.model if quant is None else options.reference
            with puna.load(path, quant=quant, progress=False) as llm:
                found = measure(llm, reference, texts)
                size = llm.plan.weight_bytes / 1e6
            shipped = shipped or found
            total = found["all"]
            print(
                f"| {quant or 'the shipped file'} | {size:.1f} | {total.nats / base.nats:.4f} "
                f"| {total.divergence / total.tokens:.5f} |"
            )
        print("\n| answers of | nats per token | bits per byte |\n|---|---|---|")
        for kind, figures in shipped.items():
            bits = figures.nats / math.log(2) / figures.size
            print(f"| {kind} | {figures.nats / figures.tokens:.4f} | {bits:.4f} |")


if __name__ == "__main__":
    main()
