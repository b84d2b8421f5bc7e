"""Makes the golden fixtures: what transformers computes for the tiny models.

    pip install torch==2.13.0 transformers==5.23.0 numpy     # and not torchvision
    python tests/golden/make_golden.py [VARIANT...]

For each variant of oracle/tiny.py it writes a folder with config.json, as transformers saves it,
and golden.npz: for each prompt its tokens and logits, and the greedy continuation of its first
tokens. Weights and pixels are not kept: they follow from names and seeds (oracle/random_bits.py).
It stops if the float64 reference of the tests disagrees with transformers, or if a choice (of an
expert, of a token) is so close that two correct implementations could differ.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parent))

from oracle import tiny, with_transformers  # noqa: E402
from oracle.make_checkpoint import write_checkpoint  # noqa: E402
from oracle.reference import Reference  # noqa: E402

# fp32 against float64, for logits of magnitude 4: 1.1e-5 was the largest seen.
TOLERANCE = 2e-5
# A choice is safe if its alternatives are this far away: ten times what fp32 can move them.
MARGIN = 2e-4
GREEDY_PROMPT, GREEDY_TOKENS = 12, 40  # over the chunk boundaries at 16, 32 and 48


def make(variant: tiny.Variant) -> None:
    """Writes the fixture of one variant."""
    folder = GOLDEN / variant.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint = Path(temporary)
        runnable = with_transformers.save_config(variant, checkpoint)
        published = with_transformers.published_config(variant, runnable)
        tensors = write_checkpoint(checkpoint, runnable, variant.seed)
        model = with_transformers.load(checkpoint)
    reference = Reference(published, tensors)

    arrays: dict[str, np.ndarray] = {}
    for prompt in variant.prompts:
        tokens, pixels = variant.tokens(prompt), variant.pixels(prompt)
        logits = with_transformers.logits(model, tokens, pixels)
        difference = np.abs(logits - reference.logits(tokens, pixels)).max()
        print(
            f"{variant.name:14} {prompt.name:12} largest logit {np.abs(logits).max():5.2f}, "
            f"reference differs by {difference:.1e}, router margin {reference.router_margin:.1e}"
        )
        if difference > TOLERANCE:
            sys.exit("the reference and transformers disagree")
        if reference.router_margin < MARGIN:
            sys.exit("an expert is chosen by too little: take another seed")
        arrays[f"{prompt.name}.tokens"] = tokens
        arrays[f"{prompt.name}.logits"] = logits

    start = variant.tokens(variant.prompts[0])[:GREEDY_PROMPT]
    following = with_transformers.greedy(model, start, GREEDY_TOKENS)
    arrays["greedy.prompt"] = start
    arrays["greedy.tokens"] = np.array(following, np.int32)
    whole = np.concatenate([start, arrays["greedy.tokens"]])
    steps = np.sort(reference.logits(whole)[GREEDY_PROMPT - 1 : -1], axis=-1)
    margin = min((steps[:, -1] - steps[:, -2]).min(), reference.router_margin)
    print(f"{variant.name:14} greedy       margin {margin:.1e}: {following[:8]}...")
    if margin < MARGIN:
        sys.exit("a greedy choice is too close: take another seed")

    (folder / "config.json").write_text(json.dumps(published, indent=2, sort_keys=True) + "\n")
    np.savez_compressed(folder / "golden.npz", **arrays)


if __name__ == "__main__":
    for name in sys.argv[1:] or tiny.VARIANTS:
        make(tiny.VARIANTS[name])
