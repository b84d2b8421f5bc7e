"""Measures the network in training on held-out documents, by kind."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from torch import Tensor

from tools.demo_model.data import Document, Writer, haystacks, joined
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.tokenizer import special_ids

SEED = 999_000_001  # training draws from generators seeded near 0
_DISTANCES = (256, 4096, 65536, 1 << 20)


def held_out_writer(tokenizer: Tokenizer, shape: Shape) -> Writer:
    """Writes the same documents each time, none of which training saw."""
    return Writer(tokenizer, shape, random.Random(SEED), held_out=True)


def padded(documents: list[Document]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Documents side by side: ids, weights, tiles."""
    length = max(len(document.ids) for document in documents)
    pad = special_ids()["<|finetune_right_pad|>"]
    for document in documents:
        document.add([pad] * (length - len(document.ids)), 0.0)
    return joined(documents)


@torch.no_grad()
def report(model: DemoModel, tokenizer: Tokenizer, count: int = 48) -> str:
    """A line for each kind: loss, and the share of documents all of whose answers are right.

    Right: each token is the likeliest after the true ones before it, which is to say that greedy
    decoding writes the answer. A story is one of many that would do; its answers are all that
    counts.
    """
    writer = held_out_writer(tokenizer, model.shape)
    lines = []
    for name, make in writer.kinds.items():
        ids, weights, tiles = padded([make() for _ in range(count)])
        logits = model(ids[:, :-1], tiles, weights[:, 1:] > 0)
        lines.append(_line(name, logits, ids[:, 1:], weights[:, 1:]))
    for distance in _DISTANCES:
        hay = haystacks(writer, count, distance, distance)
        ids, weights = hay.ids[:, 1:], hay.weights[:, 1:]
        logits = model(
            hay.ids[:, :-1], wanted=weights > 0, repeats=hay.repeats, positions=hay.positions
        )
        lines.append(_line(f"passkey {distance}", logits, ids, weights))
    loads = expert_loads(model, tokenizer, count // 4)
    lines.append(f"    load of an expert, of the mean: {loads.min():.2f} to {loads.max():.2f}")
    return "\n".join(lines)


def _line(name: str, logits: Tensor, ids: Tensor, weights: Tensor) -> str:
    wanted = weights > 0
    loss = F.cross_entropy(logits, ids[wanted]).item()
    wrong = torch.zeros(ids.shape, dtype=torch.bool)
    wrong[wanted] = logits.argmax(-1) != ids[wanted]
    right = (~(wrong & (weights == 1)).any(1)).float().mean().item()
    return f"    {name:<16} loss {loss:.4f}  right {right:.3f}"


@torch.no_grad()
def expert_loads(model: DemoModel, tokenizer: Tokenizer, count: int) -> Tensor:
    """[layers, experts]: each expert's share of the tokens of all kinds of documents; mean 1."""
    writer = held_out_writer(tokenizer, model.shape)
    loads = torch.zeros(model.shape.layers, model.shape.experts)
    for make in writer.kinds.values():
        for _ in range(count):
            ids, _, tiles = joined([make()])
            model(ids, tiles)
            for i, block in enumerate(model.blocks):
                loads[i] += block.experts.load
    return loads / loads.mean(1, keepdim=True)
