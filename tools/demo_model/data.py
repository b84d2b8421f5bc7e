"""Training documents: token ids, which of them are learned, and the picture they hold, if any."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from puna.demo.scene import draw, random_scene
from tools.demo_model.stories import random_story, story_request
from tools.demo_model.tokenizer import CAPTION_REQUEST, special_ids

IMAGE_SIZE = 56
TOKENS_PER_TILE = 16
# Of documents. Captions are short and soon learned; answers take longer.
CAPTION_SHARE = 0.45
_SPECIAL = special_ids()


@dataclass
class Document:
    """Ids, a weight of the loss for each, and normalised pictures [3, S, S]."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    pictures: list[NDArray[np.float32]] = field(default_factory=list)

    def add(self, ids: list[int], weight: float) -> None:
        """Appends tokens that share one weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)


class Writer:
    """Writes chats in Llama 4's format."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random):
        self._tokenizer = tokenizer
        self._rng = rng
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens unread."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 20000:
                self._cache[text] = ids
        return ids

    def turn(
        self, document: Document, role: str, text: str, picture: NDArray[np.float32] | None = None
    ) -> None:
        """One message; only the assistant's words are learned in full."""
        answer = role == "assistant"
        header = [_SPECIAL["<|header_start|>"], *self.encode(role), _SPECIAL["<|header_end|>"]]
        document.add(header, 0.0)
        if picture is None:
            document.add(self.encode("\n\n" + text), 1.0 if answer else 0.1)
        else:
            document.add(self.encode("\n\n"), 0.0)
            document.add(image_tokens(), 0.0)
            document.pictures.append(picture)
            document.add(self.encode(text), 0.1)
        document.add([_SPECIAL["<|eot|>"]], 1.0 if answer else 0.0)

    def caption(self) -> Document:
        """A picture and its description."""
        scene = random_scene(self._rng)
        document = Document()
        document.add([_SPECIAL["<|begin_of_text|>"]], 0.0)
        self.turn(document, "user", CAPTION_REQUEST, pixels(draw(scene, IMAGE_SIZE)))
        self.turn(document, "assistant", scene.caption())
        return document

    def story(self) -> Document:
        """A story, told in a chat with questions, or plain."""
        story = random_story(self._rng)
        document = Document()
        document.add([_SPECIAL["<|begin_of_text|>"]], 0.0)
        if self._rng.random() < 0.15:
            document.add(self.encode(story.text()), 1.0)
            document.add([_SPECIAL["<|end_of_text|>"]], 1.0)
            return document
        self.turn(document, "user", story_request(story.animal))
        self.turn(document, "assistant", story.text())
        for question, answer in self._rng.sample(story.questions(), self._rng.randint(2, 5)):
            self.turn(document, "user", question)
            self.turn(document, "assistant", answer)
        return document


class Stream:
    """Documents joined end to end and cut into sequences."""

    def __init__(self, writer: Writer, rng: random.Random, length: int):
        self._writer, self._rng, self._length = writer, rng, length
        self._rest = Document()

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [size, length + 1], weights of the same shape, tiles [N, 3, S, S]."""
        ids, weights, pictures = [], [], []
        for _ in range(size):
            sequence = self._sequence()
            ids.append(sequence.ids)
            weights.append(sequence.weights)
            pictures += sequence.pictures
        tiles = torch.from_numpy(np.stack(pictures)) if pictures else None
        return torch.tensor(ids), torch.tensor(weights), tiles

    def _sequence(self) -> Document:
        # A sequence begins with a whole document and the last one is cut; a cut never goes through
        # a picture's places, whose rows would be lost: such a document is left out.
        sequence = Document()
        while len(sequence.ids) < self._length + 1:
            caption = self._rng.random() < CAPTION_SHARE
            document = self._writer.caption() if caption else self._writer.story()
            room = self._length + 1 - len(sequence.ids)
            if document.pictures and len(document.ids) > room:
                document = self._writer.story()
            sequence.ids += document.ids[:room]
            sequence.weights += document.weights[:room]
            sequence.pictures += document.pictures
        return sequence


def image_tokens() -> list[int]:
    """Places of a one-tile picture, as Llama 4 lays them out."""
    patches = [_SPECIAL["<|patch|>"]] * TOKENS_PER_TILE
    return [_SPECIAL["<|image_start|>"], _SPECIAL["<|image|>"], *patches, _SPECIAL["<|image_end|>"]]


def pixels(picture: object) -> NDArray[np.float32]:
    """A picture of the tile's size as [3, S, S] in [-1, 1]."""
    values = np.asarray(picture, dtype=np.float32) / 255
    return ((values - 0.5) / 0.5).transpose(2, 0, 1)
