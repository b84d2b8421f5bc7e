"""Measures a demo model through puna, on held-out scenes and stories:

`python -m tools.demo_model.evaluate [--model DIR] [--count 500] [--json]`.
"""

from __future__ import annotations

import argparse
import json
import random

import puna
from puna.demo.scene import draw, random_scene
from tools.demo_model.stories import ANIMALS, random_story, read_story, story_request
from tools.demo_model.tokenizer import CAPTION_REQUEST

# Training draws from generators seeded near 0; these seeds are far from them.
_SCENES, _STORIES = 777_000_001, 888_000_001


def captions(llm: puna.Engine, count: int) -> float:
    """Share of held-out scenes that are described exactly."""
    rng = random.Random(_SCENES)
    right = 0
    for _ in range(count):
        scene = random_scene(rng)
        picture = draw(scene, llm.info.image_size)
        answer = llm.chat(CAPTION_REQUEST, images=[picture], temperature=0, max_tokens=48)
        right += answer.text == scene.caption()
    return right / count


def story_questions(llm: puna.Engine, count: int) -> float:
    """Share of questions about a given held-out story that are answered exactly."""
    rng = random.Random(_STORIES)
    right = 0
    for _ in range(count):
        story = random_story(rng)
        question, expected = rng.choice(story.questions())
        messages = [
            {"role": "user", "content": story_request(story.animal)},
            {"role": "assistant", "content": story.text()},
            {"role": "user", "content": question},
        ]
        answer = llm.chat(messages, temperature=0, max_tokens=32)
        right += answer.text == expected
    return right / count


def stories(llm: puna.Engine, count: int) -> float:
    """Share of told stories (sampled) that are coherent and about the animal that was asked for.

    Coherent: the facts read from the sentences give the same sentences back, so names, things and
    places persist from the first sentence to the last.
    """
    right = 0
    for i in range(count):
        animal = ANIMALS[i % len(ANIMALS)]
        told = read_story(llm.chat(story_request(animal), seed=i, max_tokens=200).text)
        right += told is not None and told.animal == animal
    return right / count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with puna.load(options.model, progress=False) as llm:
        results = {
            "captions": captions(llm, options.count),
            "story_questions": story_questions(llm, options.count),
            "stories": stories(llm, max(1, options.count // 10)),
        }
    if options.json:
        print(json.dumps(results))
        return
    for name, share in results.items():
        print(f"{name:<16} {share:.1%}")


if __name__ == "__main__":
    main()
