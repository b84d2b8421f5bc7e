"""The passkey test (Mohtashami and Jaggi 2023): a number to be found in a long text of stories."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sized

from puna.demo.stories import FOODS, NAMES, random_story

INTRODUCTION = "There is a pass key hidden in the stories below. Find it and remember it.\n\n"
QUESTION = "\n\nWhat is the pass key?"
DIGITS = 5
CHAT_TOKENS = 11  # begin of text, two headers of three, two empty lines, two ends of turn


def random_key(rng: random.Random) -> str:
    """Five digits, the first of which is not 0."""
    return str(rng.randint(10 ** (DIGITS - 1), 10**DIGITS - 1))


def needle(key: str) -> str:
    """The sentences to be found."""
    return f" The pass key is {key}. Remember it. {key} is the pass key."


def answer(key: str) -> str:
    """What the assistant says."""
    return f"The pass key is {key}."


def filler(rng: random.Random) -> str:
    """A story for the haystack; now and then somebody counts, so that not every number is a key."""
    text = random_story(rng).text()
    if rng.random() < 0.3:
        text += f" {rng.choice(NAMES)} counted {rng.randint(2, 999)} {rng.choice(FOODS)}."
    return text


def message(
    rng: random.Random, key: str, tokens: int, depth: float, encode: Callable[[str], Sized]
) -> str:
    """What a user sends: stories, the needle among them, and the question.

    Args:
        rng: Chooses the stories.
        key: The number to be found.
        tokens: How long the whole conversation may become, the answer included.
        depth: Where the needle lies: 0 in front of the first story, 1 after the last.
        encode: Text to tokens.

    Returns:
        A message that fills these tokens to within the length of a sentence.
    """
    parts = [needle(key), QUESTION, answer(key), INTRODUCTION]
    left = tokens - CHAT_TOKENS - sum(len(encode(part)) for part in parts)
    sentences: list[str] = []
    while left > 0:
        story = filler(rng)
        length = len(encode(" " + story))
        if length <= left:
            sentences.append(story)
            left -= length
            continue
        for sentence in re.split(r"(?<=\.) ", story):
            left -= len(encode(" " + sentence))
            if left < 0:
                break
            sentences.append(sentence)
        break
    place = round(depth * len(sentences))
    before, after = " ".join(sentences[:place]), " ".join(sentences[place:])
    return f"{INTRODUCTION}{before}{needle(key)} {after}{QUESTION}"
