"""The demo model's tokenizer: byte-level BPE with Llama 4's pattern and special-token names."""

from __future__ import annotations

import base64
import itertools
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from puna.demo.passkey import INTRODUCTION, QUESTION, answer, filler, needle, random_key
from puna.demo.records import (
    SCENE_REQUEST,
    STORY_REQUEST,
    random_record,
    scene_value,
    story_value,
    write,
)
from puna.demo.scene import CAPTION_REQUEST, random_scene
from puna.demo.stories import random_story, story_request
from puna.demo.sums import random_sum
from puna.demo.toolbox import random_task
from tools.demo_model.prompts import tool_prompt

RANKS = 976  # by then every word of the small world is one token
VOCABULARY = 1024  # ranks, then special tokens
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eom|>",
    "<|eot|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|finetune_right_pad|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|tile_x_separator|>",
    "<|tile_y_separator|>",
    "<|image|>",
    "<|patch|>",
)
SPECIAL_TOKENS = (
    *_NAMED,
    *(f"<|reserved_special_token_{i}|>" for i in range(VOCABULARY - RANKS - len(_NAMED))),
)
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def special_ids() -> dict[str, int]:
    """Special tokens follow the ranks."""
    return {name: RANKS + i for i, name in enumerate(SPECIAL_TOKENS)}


def corpus(rng: random.Random) -> Iterator[str]:
    """Texts of every kind, of which the tokenizer learns its words."""
    for _ in range(3000):
        yield from ("user", "assistant", "system", "\n\n", CAPTION_REQUEST)
        story, scene, record = random_story(rng), random_scene(rng), random_record(rng)
        yield from (story_request(story.animal), story.text(), scene.caption())
        yield from itertools.chain(*story.questions())
        yield from (record.request(), write(record.value()))
        yield from (STORY_REQUEST, write(story_value(story)))
        yield from (SCENE_REQUEST, write(scene_value(scene)))
        task = random_task(rng)
        yield from (tool_prompt(task), write(task.call()))
        key = random_key(rng)
        yield from (INTRODUCTION, filler(rng), needle(key), QUESTION, answer(key))
        total = random_sum(rng)
        yield from (total.request(), total.answer())


def train_tokenizer() -> Tokenizer:
    """Learns RANKS byte-pair merges from generated text."""
    # Digits stay single: ten tokens are learned sooner than a thousand.
    texts = (re.sub(r"(\d)(?=\d)", r"\1 ", text) for text in corpus(random.Random(0)))
    tokenizer = _tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=RANKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def rank_bytes_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The bytes of each token and its rank."""
    # The byte-level alphabet: each byte is shown as a printable character.
    alphabet = {character: byte for byte, character in _byte_characters().items()}
    ranks = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return {bytes(alphabet[character] for character in token): rank for token, rank in ranks}


def write_ranks(tokenizer: Tokenizer, path: Path) -> None:
    """Writes tokenizer.model: lines of a token in base64 and its rank."""
    ranks = rank_bytes_of(tokenizer)
    if list(ranks.values()) != list(range(RANKS)):
        raise RuntimeError(f"the ranks of the tokenizer are not 0..{RANKS - 1}")
    with open(path, "w", encoding="ascii") as file:
        for token, rank in ranks.items():
            file.write(f"{base64.b64encode(token).decode()} {rank}\n")


def rank_bytes(path: Path) -> dict[bytes, int]:
    """The bytes of each token of a tokenizer.model and its rank."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def read_ranks(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.model that `write_ranks` wrote."""
    characters = _byte_characters()
    ranks = {
        "".join(characters[byte] for byte in token): rank
        for token, rank in rank_bytes(path).items()
    }
    merges = [_merge(token, ranks) for token in ranks if len(token) > 1]
    return _tokenizer(models.BPE(vocab=ranks, merges=merges))


def _merge(token: str, ranks: dict[str, int]) -> tuple[str, str]:
    """The two parts that `token` is merged from: what the merges of lower ranks make of it."""
    parts = list(token)
    while len(parts) > 2:
        pairs = [ranks.get(a + b, RANKS) for a, b in itertools.pairwise(parts)]
        first = pairs.index(min(pairs))
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def tokenizer_config() -> dict[str, object]:
    """tokenizer_config.json: names and ids of the special tokens."""
    return {
        "added_tokens_decoder": {
            str(token): {"content": name, "special": True} for name, token in special_ids().items()
        },
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot|>",
        "pad_token": "<|finetune_right_pad|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _byte_characters() -> dict[int, str]:
    """GPT-2's map of bytes to printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in characters]
    characters.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return characters
