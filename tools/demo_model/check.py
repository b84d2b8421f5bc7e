"""Checks an exported demo model: `python -m tools.demo_model.check --model build/demo-hf`.

Against `transformers`, that the trainer's network computes what it does; against `tiktoken`, that
the tokenizer does; on held-out documents, that each expert has work. It also prints what held_out
reports. Needs torch, transformers, tokenizers and tiktoken.
"""

from __future__ import annotations

import argparse
import base64
import random
from pathlib import Path

import tiktoken
import torch
from tokenizers import Tokenizer
from transformers import Llama4ForConditionalGeneration

from puna.demo.scene import random_scene
from puna.demo.stories import random_story
from tools.demo_model.data import Stream
from tools.demo_model.held_out import SEED, expert_loads, held_out_writer, report
from tools.demo_model.model import SHAPES, DemoModel
from tools.demo_model.tokenizer import PATTERN, RANKS, read_ranks, special_ids
from tools.demo_model.train import MIX
from tools.demo_model.warm_start import take_up

# Relative to the largest logit. transformers takes RoPE's angle from the position in fp32, not from
# its remainder in the chunk: at position 777 the angle is off by up to 777 * 2**-24 = 5e-5.
LOGIT_TOLERANCE = 5e-5
LEAST_LOAD = 0.25  # of the mean: below this an expert is as good as dead


@torch.no_grad()
def check_logits(model: DemoModel, directory: Path, tokenizer: Tokenizer) -> bool:
    """Text over several chunk boundaries, and documents with pictures."""
    reference = Llama4ForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    writer = held_out_writer(tokenizer, model.shape)
    length = 3 * model.shape.chunk + 9
    text = torch.tensor([[writer.rng.randrange(RANKS) for _ in range(length)]])
    ids, _, tiles = Stream(writer, length, MIX).batch(2)
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
    rng = random.Random(SEED)
    letters = "aeiou thsrn THE .,!?'0123456789\n\r\t/é\u0301ñ\u4e2d\u6587\U0001f600"
    different = 0
    for _ in range(2000):
        noise = "".join(rng.choice(letters) for _ in range(80))
        for text in (noise, random_story(rng).text(), random_scene(rng).caption()):
            own = tokenizer.encode(text, add_special_tokens=False).ids
            different += own != other.encode(text, disallowed_special=())
    print(f"tokenizer: {different} of 6000 texts differ")
    return different == 0


def check_experts(model: DemoModel, tokenizer: Tokenizer) -> bool:
    """The load of each expert on held-out documents."""
    loads = expert_loads(model, tokenizer, 40)
    for i, shares in enumerate(loads.tolist()):
        print(f"load of the experts of layer {i}: " + "  ".join(f"{share:.2f}" for share in shares))
    return loads.min().item() >= LEAST_LOAD


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="xs")
    parser.add_argument("--model", type=Path, required=True, help="what the export wrote")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = read_ranks(options.model / "tokenizer.model")
    model = DemoModel(SHAPES[options.shape], special_ids()["<|patch|>"]).eval()
    take_up(model, tokenizer, options.model)
    print(report(model, tokenizer, 200))
    passed = [
        check_logits(model, options.model, tokenizer),
        check_tokenizer(options.model, tokenizer),
        check_experts(model, tokenizer),
    ]
    print("passed" if all(passed) else "FAILED")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    raise SystemExit(main())
