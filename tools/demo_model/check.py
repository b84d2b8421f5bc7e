"""Checks an exported demo model: `python -m tools.demo_model.check --run build/demo --model DIR`.

Against `transformers`, that the directory holds the network that was trained; against `tiktoken`,
that it holds its tokenizer; on held-out documents, that each expert has work. It also prints the
held-out loss. Needs torch, transformers, tokenizers and tiktoken.
"""

from __future__ import annotations

import argparse
import base64
import random
from pathlib import Path

import tiktoken
import torch
import torch.nn.functional as F  # noqa: N812
from tokenizers import Tokenizer
from transformers import Llama4ForConditionalGeneration

from puna.demo.scene import random_scene
from tools.demo_model.data import Stream, Writer
from tools.demo_model.model import DemoModel, Shape
from tools.demo_model.stories import random_story
from tools.demo_model.tokenizer import PATTERN, RANKS, read_ranks, special_ids

HELD_OUT_SEED = 999_000_001  # training draws from generators seeded near 0
# Relative to the largest logit. transformers takes RoPE's angle from the position in fp32, not from
# its remainder in the chunk: at position 777 the angle is off by up to 777 * 2**-24 = 5e-5.
LOGIT_TOLERANCE = 5e-5
LEAST_LOAD = 0.25  # of the mean: below this an expert is as good as dead


def trained_model(run: Path) -> DemoModel:
    """The trainer's own network with its weights rounded as they are shipped."""
    model = DemoModel(Shape(), special_ids()["<|patch|>"])
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["model"]
    model.load_state_dict({name: value.bfloat16().float() for name, value in state.items()})
    return model.eval()


@torch.no_grad()
def check_logits(model: DemoModel, directory: Path, tokenizer: Tokenizer) -> bool:
    """Text over several chunk boundaries, and documents with pictures."""
    reference = Llama4ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng = random.Random(HELD_OUT_SEED)
    length = 3 * model.shape.chunk + 9
    text = torch.tensor([[rng.randrange(RANKS) for _ in range(length)]])
    ids, _, tiles = Stream(Writer(tokenizer, rng), rng, length).batch(2)
    passed = True
    for kind, tokens, pixels in (("text", text, None), ("pictures", ids, tiles)):
        own = model(tokens, pixels)
        other = reference(input_ids=tokens, pixel_values=pixels).logits
        difference = ((own - other).abs().max() / own.abs().max()).item()
        passed &= difference <= LOGIT_TOLERANCE
        print(f"logits, {kind}: largest difference {difference:.1e} of the largest logit")
    return passed


def check_tokenizer(directory: Path, tokenizer: Tokenizer) -> bool:
    """The written ranks under tiktoken against the tokenizer of the training."""
    lines = (directory / "tokenizer.model").read_text(encoding="ascii").splitlines()
    pairs = [line.split() for line in lines]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    other = tiktoken.Encoding("demo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(HELD_OUT_SEED)
    letters = "aeiou thsrn THE .,!?'0123456789\n\r\t/é\u0301ñ\u4e2d\u6587\U0001f600"
    different = 0
    for _ in range(2000):
        noise = "".join(rng.choice(letters) for _ in range(80))
        for text in (noise, random_story(rng).text(), random_scene(rng).caption()):
            own = tokenizer.encode(text, add_special_tokens=False).ids
            different += own != other.encode(text, disallowed_special=())
    print(f"tokenizer: {different} of 6000 texts differ")
    return different == 0


@torch.no_grad()
def check_experts(model: DemoModel, tokenizer: Tokenizer) -> bool:
    """The load of each expert, and the loss, on held-out documents."""
    rng = random.Random(HELD_OUT_SEED)
    ids, weights, tiles = Stream(Writer(tokenizer, rng), rng, 384).batch(32)
    logits = model(ids[:, :-1], tiles)
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    answers = weights[:, 1:].flatten() == 1
    print(f"held-out loss over the answers: {losses[answers].mean().item():.4f} nats per token")
    least = 1.0
    for i, block in enumerate(model.blocks):
        load = block.experts.load.float()
        shares = (load / load.mean()).tolist()
        least = min(least, *shares)
        print(f"load of the experts of layer {i}: " + "  ".join(f"{share:.2f}" for share in shares))
    return least >= LEAST_LOAD


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="the --out of the training")
    parser.add_argument("--model", type=Path, required=True, help="what the export wrote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = read_ranks(options.run / "tokenizer.model")
    model = trained_model(options.run)
    passed = [
        check_logits(model, options.model, tokenizer),
        check_tokenizer(options.model, tokenizer),
        check_experts(model, tokenizer),
    ]
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
