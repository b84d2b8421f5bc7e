"""Measures a demo model through puna, on what training never showed, greedily:

`python -m tools.demo_model.evaluate [--model DIR] [--quick] [--json]`.

The last line is JSON: captions, stories (questions about them), json, tool_calls, sums, passkey_4k,
passkey_16k and passkey_64k, as shares of 1. --json prints that line only; --quick takes a sample.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence

import puna
from puna.demo import passkey, records
from puna.demo.scene import CAPTION_REQUEST, draw, random_scene
from puna.demo.stories import ANIMALS, random_story, read_story, story_request
from puna.demo.sums import random_sum
from puna.demo.toolbox import random_task

# Training draws from generators seeded near 0; these seeds are far from them.
SEEDS = {
    name: 700_000_001 + 10_000_000 * i
    for i, name in enumerate(("scenes", "stories", "records", "tasks", "sums", "keys"))
}

# Name, tokens of the conversation, how many: in a sample, and in all.
PASSKEYS = (("4k", 4096, 10, 100), ("16k", 16384, 5, 100), ("64k", 65536, 2, 50))
FAR_PASSKEYS = (("1m", 1 << 20, 1, 10), ("10m", 10_000_000, 1, 1))


def captions(llm: puna.Engine, count: int) -> float:
    """Share of held-out scenes that are described exactly."""
    rng = random.Random(SEEDS["scenes"])
    right = 0
    for _ in range(count):
        scene = random_scene(rng)
        picture = draw(scene, llm.info.image_size)
        right += _answer(llm, CAPTION_REQUEST, images=[picture]) == scene.caption()
    return right / count


def stories(llm: puna.Engine, count: int) -> float:
    """Share of questions about a given held-out story that are answered exactly."""
    rng = random.Random(SEEDS["stories"])
    right = 0
    for _ in range(count):
        story = random_story(rng)
        question, expected = rng.choice(story.questions())
        messages = [
            {"role": "user", "content": story_request(story.animal)},
            {"role": "assistant", "content": story.text()},
            {"role": "user", "content": question},
        ]
        right += _answer(llm, messages) == expected
    return right / count


def told(llm: puna.Engine, count: int) -> float:
    """Share of told stories (sampled) that are coherent and about the animal that was asked for.

    Coherent: the facts read from the sentences give the same sentences back, so names, things and
    places persist from the first sentence to the last.
    """
    right = 0
    for i in range(count):
        animal = ANIMALS[i % len(ANIMALS)]
        story = read_story(llm.chat(story_request(animal), seed=i, max_tokens=200).text)
        right += story is not None and story.animal == animal
    return right / count


def written_json(llm: puna.Engine, count: int) -> tuple[float, float]:
    """Shares of objects that are valid, and that say exactly what was said.

    Valid: it parses, and has the keys and the types of what was asked for.
    """
    rng = random.Random(SEEDS["records"])
    valid = exact = 0
    for i in range(count):
        pictures = []
        if i % 3 == 0:
            record = records.random_record(rng)
            messages, value = [{"role": "user", "content": record.request()}], record.value()
        elif i % 3 == 1:
            story = random_story(rng)
            value = records.story_value(story)
            messages = [
                {"role": "user", "content": story_request(story.animal)},
                {"role": "assistant", "content": story.text()},
                {"role": "user", "content": records.STORY_REQUEST},
            ]
        else:
            scene = random_scene(rng)
            pictures = [draw(scene, llm.info.image_size)]
            messages = [{"role": "user", "content": records.SCENE_REQUEST}]
            value = records.scene_value(scene)
        text = _answer(llm, messages, images=pictures or None)
        valid += _valid(text, value)
        exact += text == records.write(value)
    return valid / count, exact / count


def _valid(text: str, like: object) -> bool:
    try:
        return _shape(json.loads(text)) == _shape(like)
    except ValueError:
        return False


def _shape(value: object) -> object:
    """Keys and types, however long the lists are."""
    if isinstance(value, dict):
        return {key: _shape(part) for key, part in value.items()}
    if isinstance(value, list):
        shapes = [_shape(part) for part in value]
        return [shape for i, shape in enumerate(shapes) if shape not in shapes[:i]] and "list"
    return type(value).__name__


def tool_calls(llm: puna.Engine, count: int) -> float:
    """Share of requests that are answered with the right call, arguments included."""
    rng = random.Random(SEEDS["tasks"])
    right = 0
    for _ in range(count):
        task = random_task(rng)
        text = _answer(llm, task.request, tools=task.tools())
        try:
            right += json.loads(text) == task.call()
        except ValueError:
            continue
    return right / count


def sums(llm: puna.Engine, count: int) -> float:
    """Share of held-out sums of two numbers of two digits that are right."""
    rng = random.Random(SEEDS["sums"])
    right = 0
    for _ in range(count):
        total = random_sum(rng, held_out=True)
        right += _answer(llm, total.request()) == total.answer()
    return right / count


def passkeys(llm: puna.Engine, tokens: int, count: int) -> float:
    """Share of pass keys that are found in conversations of `tokens` tokens, at all depths."""
    rng = random.Random(SEEDS["keys"] + tokens)
    right = 0
    for i in range(count):
        key = passkey.random_key(rng)
        depth = (i + 0.5) / count
        message = passkey.message(rng, key, tokens, depth, llm.tokenizer.encode)
        right += _answer(llm, message) == passkey.answer(key)
    return right / count


def _answer(llm: puna.Engine, messages: str | Sequence[dict[str, str]], **more: object) -> str:
    return llm.chat(messages, temperature=0, max_tokens=120, **more).text  # type: ignore[union-attr]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--quick", action="store_true", help="a sample, in less than a minute")
    parser.add_argument(
        "--far", action="store_true", help="only pass keys in one and in ten million tokens"
    )
    parser.add_argument("--json", action="store_true", help="only the last line")
    options = parser.parse_args()
    count = 50 if options.quick else 500
    results: dict[str, float] = {}
    with puna.load(options.model, progress=False) as llm:

        def measure(name: str, number: int, function: Callable[..., float], *more: int) -> None:
            began = time.monotonic()
            results[name] = function(llm, *more, number)
            seconds = time.monotonic() - began
            if not options.json:
                print(f"{name:<12} {results[name]:7.1%} of {number:>4}  {seconds:6.1f} s")

        def measure_passkeys(distances: tuple[tuple[str, int, int, int], ...]) -> None:
            for name, tokens, sample, whole in distances:
                measure(f"passkey_{name}", sample if options.quick else whole, passkeys, tokens)

        if options.far:
            measure_passkeys(FAR_PASSKEYS)
        else:
            measure("captions", count, captions)
            measure("stories", count, stories)
            measure("told", count // 5, told)
            measure("json", count, lambda llm, n: written_json(llm, n)[0])
            measure("json_exact", count, lambda llm, n: written_json(llm, n)[1])
            measure("tool_calls", count, tool_calls)
            measure("sums", count, sums)
            measure_passkeys(PASSKEYS)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
