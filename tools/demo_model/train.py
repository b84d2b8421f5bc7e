"""Trains the demo model: `python -m tools.demo_model.train --minutes 60 --out build/demo`.

The schedule follows the clock, so that a run ends well on any machine. A checkpoint is written
every two minutes; started again with the same --out, the run goes on from there, and a longer
--minutes goes on with a finished run.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tools.demo_model.data import Stream, Writer
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.tokenizer import read_ranks, special_ids, train_tokenizer, write_ranks


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices (Jordan et al. 2024), [.., rows, cols]."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(buffer, group["momentum"]))
                rows, cols = parameter.shape[-2:]
                scale = max(1.0, rows / cols) ** 0.5
                parameter.mul_(1 - 0.1 * group["lr"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix."""
    x = matrix / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def optimizers(model: DemoModel) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers, AdamW for tables, router, norms and biases."""
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim >= 2 and not any(
            part in name for part in ("embedding.weight", "head.weight", "router", "positions")
        )
        (matrices if hidden or "patch_embedding" in name else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    return [Muon(matrices, lr=0.02), adam]


def rate(progress: float) -> float:
    """Share of the full learning rate: a short rise, a plateau, then a linear fall."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1 - progress) / 0.5) + 0.01)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)

    # A run keeps the tokenizer that it began with.
    ranks = options.out / "tokenizer.model"
    if not ranks.exists():
        write_ranks(train_tokenizer(), ranks)
    tokenizer = read_ranks(ranks)
    model = DemoModel(Shape(), special_ids()["<|patch|>"]).to(options.device)
    steppers = optimizers(model)
    base_rates = [group["lr"] for o in steppers for group in o.param_groups]
    saved = options.out / "checkpoint.pt"
    spent, step = 0.0, 0
    if saved.exists():
        state = torch.load(saved, map_location=options.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, part in zip(steppers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
        spent, step = state["spent"], state["step"]
    rng = random.Random(options.seed * 1_000_003 + step)
    stream = Stream(Writer(tokenizer, rng), rng, options.length)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {spent:.0f} s done", flush=True
    )

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in steppers],
            "spent": spent,
            "step": step,
        }
        torch.save(state, saved.with_suffix(".tmp"))
        saved.with_suffix(".tmp").replace(saved)

    budget = options.minutes * 60
    last_save = last_report = spent
    began = time.monotonic() - spent
    while spent < budget:
        share = rate(spent / budget)
        groups = [group for optimizer in steppers for group in optimizer.param_groups]
        for group, base in zip(groups, base_rates, strict=True):
            group["lr"] = base * share
        ids, weights, pixels = stream.batch(options.batch)
        ids, weights = ids.to(options.device), weights.to(options.device)
        logits = model(ids[:, :-1], None if pixels is None else pixels.to(options.device))
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        (loss + 0.01 * model.balance_loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        spent = time.monotonic() - began
        if spent - last_report > 30:
            last_report = spent
            loads = [
                min(b.experts.load).item() / b.experts.load.float().mean().item()
                for b in model.blocks
            ]
            print(
                f"{spent:6.0f} s  step {step}  loss {loss.item():.4f}  "
                f"least expert load {min(loads):.2f} of the mean",
                flush=True,
            )
        if math.isnan(loss.item()):
            raise RuntimeError("the loss is not a number; lower the learning rate")
        if spent - last_save > 120:
            last_save = spent
            save()
    save()


if __name__ == "__main__":
    main()
