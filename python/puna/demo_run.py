"""`puna demo`: what the bundled model can do, offline, in a few seconds."""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

import numpy as np

import puna
from puna.demo import passkey
from puna.demo.scene import CAPTION_REQUEST, Scene, draw, random_scene
from puna.demo.stories import ANIMALS, story_request
from puna.demo.toolbox import random_task

HAYSTACK_TOKENS = 102_400  # 400 attention chunks; some seconds of two cores


def run_demo(seed: int | None = None, image_out: str | None = None) -> int:
    """Tells a story, describes a picture, calls a tool, finds a pass key, and checks itself.

    Args:
        seed: Chooses the story, the picture, the request and the key; None takes new ones.
        image_out: Where to keep the picture, if anywhere.

    Returns:
        0, or 1 if the self-check failed.
    """
    seed = random.randrange(10**6) if seed is None else seed
    started = time.monotonic()
    with puna.load("demo", device="cpu", progress=False) as llm:
        parameters = llm.info.parameters / 1e6
        print(
            f"This is puna {puna.__version__} with its demo model: a real Llama 4 in miniature "
            f"({parameters:.1f}M parameters,\nmixture of experts, chunked attention, vision), "
            "trained on a small invented world. It knows nothing else.\n"
        )
        told = _tell(llm, seed)
        _describe(llm, seed, image_out)
        _call_a_tool(llm, seed)
        found = _find(llm, seed)
        same = _self_check(llm)
        print(
            f"\nSpeed: {found.timings.prefill_tps:,.0f} prompt tokens/s, "
            f"{told.decode_tps:,.0f} generated tokens/s on {llm.plan.device}; "
            f"peak memory {found.timings.peak_bytes / 2**20:.0f} MiB; "
            f"{time.monotonic() - started:.1f} s in all (seed {seed})"
        )
    return 0 if same else 1


def _tell(llm: puna.Engine, seed: int) -> puna.Timings:
    prompt = story_request(random.Random(seed).choice(ANIMALS))
    print(f"> {prompt}")
    for chunk in llm.stream(prompt, seed=seed, temperature=0.5, max_tokens=250):
        print(chunk.text, end="", flush=True)
    print("\n")
    assert chunk.timings
    return chunk.timings


def _describe(llm: puna.Engine, seed: int, image_out: str | None) -> None:
    scene: Scene = random_scene(random.Random(seed))
    picture = draw(scene, llm.info.image_size)
    print(f"> {CAPTION_REQUEST}")
    print(_blocks(np.asarray(picture)))
    if image_out:
        picture.save(image_out)
        print(f"(kept as {image_out})", file=sys.stderr)
    answer = _answer(llm, CAPTION_REQUEST, images=[picture])
    print(f"{answer}\n(drawn: {scene.caption()})\n")


def _call_a_tool(llm: puna.Engine, seed: int) -> None:
    task = random_task(random.Random(seed))
    print(f"> {task.request}  (tools: {', '.join(task.offered)})")
    text = _answer(llm, task.request, tools=task.tools()).text
    try:
        verdict = "the right call" if json.loads(text) == task.call() else "valid, but not right"
    except ValueError:
        verdict = "not valid JSON"
    print(f"{text}\n({verdict})\n")


def _find(llm: puna.Engine, seed: int) -> puna.Completion:
    rng = random.Random(seed)
    key, depth = passkey.random_key(rng), rng.random()
    message = passkey.message(rng, key, HAYSTACK_TOKENS, depth, llm.tokenizer.encode)
    print(f"> {passkey.INTRODUCTION.strip()}\n  [stories, and {depth:.0%} of the way in, the key]")
    print(f" {passkey.QUESTION.strip()}")
    answer = _answer(llm, message)
    print(
        f"{answer}\n(it was {key}, in {answer.usage.prompt:,} tokens; "
        "in training it never read more than 512 at a time)\n"
    )
    return answer


def _answer(llm: puna.Engine, text: str, **more: Any) -> puna.Completion:
    answer = llm.chat(text, temperature=0, max_tokens=120, **more)
    assert isinstance(answer, puna.Completion)
    return answer


def _self_check(llm: puna.Engine) -> bool:
    """Prefill against one-by-one decode, past three chunk boundaries, bit for bit."""
    spec = puna._core.inspect(llm.info.path)
    length = 3 * spec["chunk"] + 2
    tokens = np.random.default_rng(0).integers(0, 256, length)
    whole = llm.logits(tokens)
    # Decode steps around each boundary; between them pieces of odd lengths.
    steps: list[int] = []
    while sum(steps) < length:
        left = length - sum(steps)
        to_boundary = spec["chunk"] - sum(steps) % spec["chunk"]
        near = to_boundary <= 2 or to_boundary >= spec["chunk"] - 1
        steps.append(1 if near else min(left, 37, to_boundary - 2))
    same = np.array_equal(whole, llm.logits(tokens, cuts=steps))
    verdict = "OK, bit for bit" if same else "FAILED"
    print(f"Self-check: decode == prefill over {length} tokens, past 3 chunk boundaries: {verdict}")
    return same


def _blocks(pixels: np.ndarray, columns: int = 28) -> str:
    """The picture as coloured half-blocks, two pixel rows per line; plain text has no picture."""
    if not sys.stdout.isatty():
        return "[a picture]"
    size = pixels.shape[0]
    places = (np.arange(columns) + 0.5) * size // columns
    small = pixels[places.astype(int)][:, places.astype(int)]
    lines = []
    for top, bottom in zip(small[0::2], small[1::2], strict=False):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]}m\x1b[48;2;{b[0]};{b[1]};{b[2]}m\u2580"
            for a, b in zip(top, bottom, strict=True)
        )
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
