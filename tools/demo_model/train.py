"""Trains the demo model: `python -m tools.demo_model.train --minutes 60 --out build/demo`.

The schedule follows the clock, so that a run ends well on any machine. A checkpoint is written
every two minutes; started again with the same --out, the run goes on from there, and a longer
--minutes goes on with a finished run.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tools.demo_model.data import Stream, Writer, haystacks
from tools.demo_model.held_out import report
from tools.demo_model.model import SHAPES, DemoModel
from tools.demo_model.muon import Muon
from tools.demo_model.tokenizer import read_ranks, special_ids, train_tokenizer, write_ranks
from tools.demo_model.warm_start import take_up

# Of the documents in a packed sequence. Captions are short and soon learned; answers take longer.
MIX = {
    "caption": 0.06,
    "scene_json": 0.08,
    "story": 0.12,
    "record": 0.18,
    "tool_call": 0.24,
    "sum": 0.32,
    # Of models with tiles to read.
    "word": 0.12,
    "emoji": 0.12,
}
SHORTEST_HAYSTACK = 96
LONGEST_HAYSTACK = 1 << 24


def optimizers(model: DemoModel, share: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers, AdamW for tables, router, norms and biases."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hidden = parameter.ndim >= 2 and not any(
            part in name for part in ("embedding.weight", "head.weight", "router", "positions")
        )
        (matrices if hidden or "patch_embedding" in name else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=3e-3 * share, betas=(0.9, 0.95), weight_decay=0.01)
    return [Muon(matrices, lr=0.02 * share), adam]


def rate(progress: float) -> float:
    """Share of the full learning rate: a short rise, a plateau, then a linear fall."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1 - progress) / 0.3) + 0.01)


def loss_of(logits: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over the wanted rows."""
    wanted = weights > 0
    losses = F.cross_entropy(logits, ids[wanted], reduction="none")
    weight = weights[wanted]
    return (losses * weight).sum() / weight.sum()


class Run:
    """A training run and what is kept of it on disk."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        ranks = options.out / "tokenizer.model"
        self.tokenizer = read_ranks(ranks)
        self.model = DemoModel(SHAPES[options.shape], special_ids()["<|patch|>"]).to(options.device)
        self.spent, self.step, self.reach = 0.0, 0, 1024.0
        self.saved = options.out / "checkpoint.pt"
        self.model.vision.requires_grad_(not options.freeze_vision)
        self.steppers = optimizers(self.model, options.rate)
        self.base_rates = [group["lr"] for o in self.steppers for group in o.param_groups]
        if self.saved.exists():
            self._resume()
        elif options.start:
            take_up(self.model, self.tokenizer, options.start)
        self.began = time.monotonic() - self.spent

    def _resume(self) -> None:
        state = torch.load(self.saved, map_location=self.options.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.spent, self.step, self.reach = state["spent"], state["step"], state["reach"]
        for optimizer, part in zip(self.steppers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)

    def save(self) -> None:
        """Writes the checkpoint, never half of one."""
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.steppers],
            "spent": self.spent,
            "step": self.step,
            "reach": self.reach,
        }
        torch.save(state, self.saved.with_suffix(".tmp"))
        self.saved.with_suffix(".tmp").replace(self.saved)

    def update(self, stream: Stream, writer: Writer) -> tuple[float, float]:
        """One step; the losses of the documents and of the haystacks."""
        device, model = self.options.device, self.model
        ids, weights, pixels = stream.batch(self.options.batch)
        ids, weights = ids.to(device), weights[:, 1:].to(device)
        pixels = None if pixels is None else pixels.to(device)
        logits = model(ids[:, :-1], pixels, weights > 0)
        loss = loss_of(logits, ids[:, 1:], weights)
        (loss + 0.01 * model.balance_loss()).backward()
        hay = haystacks(writer, self.options.haystacks, SHORTEST_HAYSTACK, int(self.reach))
        ids, weights = hay.ids.to(device), hay.weights[:, 1:].to(device)
        logits = model(
            ids[:, :-1],
            wanted=weights > 0,
            repeats=hay.repeats.to(device),
            positions=hay.positions.to(device),
        )
        far = loss_of(logits, ids[:, 1:], weights)
        (0.5 * far).backward()
        loss, far = self._agree(loss.detach(), far.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in self.steppers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), far.item()

    def _agree(self, *numbers: Tensor) -> Tensor:
        """The mean over the processes: of the gradients, in place, of the clock, of `numbers`."""
        clock = torch.tensor(time.monotonic() - self.began, dtype=torch.float32)
        gradients = []
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:  # no pictures in this batch
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        parts = [*gradients, clock, *numbers]
        flat = torch.cat([part.float().flatten() for part in parts])
        if self.options.processes > 1:
            torch.distributed.all_reduce(flat)
            flat /= self.options.processes
        pieces = flat.split([part.numel() for part in parts])
        for gradient, piece in zip(gradients, pieces, strict=False):
            gradient.copy_(piece.view_as(gradient))
        self.spent = pieces[len(gradients)].item()
        return torch.cat(pieces[len(gradients) + 1 :])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="xs")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--haystacks", type=int, default=6, help="passkey documents in a step")
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="each with a batch and a thread")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rate", type=float, default=1.0, help="share of the learning rates")
    parser.add_argument("--from", dest="start", type=Path, help="an exported model to begin with")
    parser.add_argument("--freeze-vision", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    # A run keeps the tokenizer that it began with.
    ranks = options.out / "tokenizer.model"
    if not ranks.exists():
        write_ranks(train_tokenizer(), ranks)
    if options.processes == 1:
        train(0, options)
    else:
        torch.multiprocessing.spawn(train, (options,), options.processes)


def train(rank: int, options: argparse.Namespace) -> None:
    """One of the processes of a run; all hold the same weights at every step."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    if options.processes > 1:
        meeting = f"file://{(options.out / f'meeting.{os.getppid()}').absolute()}"
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=options.processes
        )
    run = Run(options)
    seed = (options.seed * 1_000_003 + run.step) * options.processes + rank
    writer = Writer(run.tokenizer, run.model.shape, random.Random(seed))
    mix = {kind: share for kind, share in MIX.items() if kind in writer.kinds}
    stream = Stream(writer, options.length, mix)
    if rank == 0:
        count = sum(p.numel() for p in run.model.parameters())
        print(f"{count:,} parameters, {run.spent:.0f} s done", flush=True)
    budget = options.minutes * 60
    last_save = last_report = last_check = run.spent
    mean_far = 4.0
    while run.spent < budget:
        share = rate(run.spent / budget)
        groups = [group for optimizer in run.steppers for group in optimizer.param_groups]
        for group, base in zip(groups, run.base_rates, strict=True):
            group["lr"] = base * share
        loss, far = run.update(stream, writer)
        if math.isnan(loss) or math.isnan(far):
            raise RuntimeError("the loss is not a number; lower the learning rate")
        mean_far += 0.05 * (far - mean_far)
        # The haystacks grow as soon as the keys are found in those that there are.
        if mean_far < 0.25:
            run.reach = min(LONGEST_HAYSTACK, run.reach * 1.02)
        if rank:
            continue
        if run.spent - last_report > 30:
            last_report = run.spent
            print(
                f"{run.spent:6.0f} s  step {run.step}  loss {loss:.4f}  "
                f"passkey {mean_far:.3f} up to {run.reach:,.0f}",
                flush=True,
            )
        if run.spent - last_check > 240:
            last_check = run.spent
            print(report(run.model, run.tokenizer), flush=True)
        if run.spent - last_save > 120:
            last_save = run.spent
            run.save()
    if rank == 0:
        run.save()
        print(report(run.model, run.tokenizer), flush=True)


if __name__ == "__main__":
    main()
