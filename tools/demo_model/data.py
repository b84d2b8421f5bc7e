"""Training documents: token ids, which of them are learned, and the picture they hold, if any."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from puna.demo import passkey, records
from puna.demo.scene import CAPTION_REQUEST, draw, random_scene
from puna.demo.stories import random_story, story_request
from puna.demo.sums import random_sum
from puna.demo.toolbox import SCHEMAS, random_task
from tools.demo_model import pictures
from tools.demo_model.model import Shape
from tools.demo_model.prompts import tool_prompt
from tools.demo_model.tokenizer import special_ids

STORY_WEIGHT = 0.3  # of the loss: which name or colour comes next in a story cannot be learned
# Of the haystacks: the answer lies on both sides of a chunk boundary. Chance has that less often.
STRADDLES = 0.1
# Tools that training asks for: numbers of one to three digits are copied right last of all.
PRACTISED = (*SCHEMAS, "multiply", "multiply", "multiply", "get_weather")
# Pixels along a side of a tile in which a word of six letters can be read.
LEGIBLE = 112
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

    def __init__(
        self, tokenizer: Tokenizer, shape: Shape, rng: random.Random, held_out: bool = False
    ):
        self._tokenizer = tokenizer
        self.shape, self.rng = shape, rng
        self._held_out = held_out
        self._cache: dict[str, list[int]] = {}
        kinds: dict[str, Callable[[], Document]] = {
            "caption": self.caption,
            "scene_json": self.scene_json,
            "story": self.story,
            "record": self.record,
            "tool_call": self.tool_call,
            "sum": self.sum,
        }
        if shape.image_size >= LEGIBLE:
            kinds["word"] = self.word
            if pictures.emoji_names():
                kinds["emoji"] = self.emoji
        self.kinds: Mapping[str, Callable[[], Document]] = kinds

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens unread."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 50000:
                self._cache[text] = ids
        return ids

    def begin(self) -> Document:
        """What every document begins with."""
        document = Document()
        document.add([_SPECIAL["<|begin_of_text|>"]], 0.0)
        return document

    def user(
        self, document: Document, text: str, picture: NDArray[np.float32] | None = None
    ) -> None:
        """What the user says; none of it is learned."""
        self.header(document, "user")
        if picture is not None:
            document.add(
                [*self.encode("\n\n"), *image_tokens(self.shape.tile_tokens), *self.encode(text)],
                0.0,
            )
            document.pictures.append(picture)
        else:
            document.add(self.encode("\n\n" + text), 0.0)
        document.add([_SPECIAL["<|eot|>"]], 0.0)

    def assistant(self, document: Document, text: str, weight: float = 1.0) -> None:
        """What the assistant answers."""
        self.header(document, "assistant")
        # The engine encodes the prompt by itself, and so the empty line by itself.
        document.add(self.encode("\n\n"), 0.0)
        document.add(self.encode(text), weight)
        document.add([_SPECIAL["<|eot|>"]], 1.0)

    def header(self, document: Document, role: str) -> None:
        """Whose turn it is."""
        header = [_SPECIAL["<|header_start|>"], *self.encode(role), _SPECIAL["<|header_end|>"]]
        document.add(header, 0.0)

    def _exchange(
        self, request: str, answer: str, picture: NDArray[np.float32] | None = None
    ) -> Document:
        document = self.begin()
        self.user(document, request, picture)
        self.assistant(document, answer)
        return document

    def caption(self) -> Document:
        """A picture and its description."""
        scene = random_scene(self.rng)
        picture = draw(scene, self.shape.image_size)
        return self._exchange(CAPTION_REQUEST, scene.caption(), pixels(picture))

    def scene_json(self) -> Document:
        """A picture and its description as JSON."""
        scene = random_scene(self.rng)
        picture = draw(scene, self.shape.image_size)
        answer = records.write(records.scene_value(scene))
        return self._exchange(records.SCENE_REQUEST, answer, pixels(picture))

    def word(self) -> Document:
        """A picture of a word, and the word."""
        word = pictures.random_word(self.rng, self._held_out)
        picture = pictures.draw_word(self.rng, word, self.shape.image_size)
        return self._exchange(pictures.WORD_REQUEST, f"{word}.", pixels(picture))

    def emoji(self) -> Document:
        """An emoji and its name."""
        names = pictures.emoji_names()
        character = self.rng.choice(list(names))
        picture = pictures.draw_emoji(self.rng, character, self.shape.image_size)
        return self._exchange(pictures.EMOJI_REQUEST, f"{names[character]}.", pixels(picture))

    def story(self) -> Document:
        """A story, with questions about it and its facts as JSON."""
        story = random_story(self.rng)
        document = self.begin()
        self.user(document, story_request(story.animal))
        self.assistant(document, story.text(), STORY_WEIGHT)
        follow_ups = self.rng.sample(story.questions(), self.rng.randint(1, 3))
        if self.rng.random() < 0.5:
            follow_ups.append((records.STORY_REQUEST, records.write(records.story_value(story))))
        self.rng.shuffle(follow_ups)
        for question, answer in follow_ups:
            self.user(document, question)
            self.assistant(document, answer)
        return document

    def record(self) -> Document:
        """A sentence and its facts as JSON."""
        record = records.random_record(self.rng)
        return self._exchange(record.request(), records.write(record.value()))

    def tool_call(self) -> Document:
        """Offered tools, a request, and the call; no words stand between the two marks."""
        task = random_task(self.rng, tuple(SCHEMAS) if self._held_out else PRACTISED)
        document = self.begin()
        self.user(document, tool_prompt(task))
        self.header(document, "assistant")
        document.add(self.encode("\n\n"), 0.0)
        document.add([_SPECIAL["<|python_start|>"], _SPECIAL["<|python_end|>"]], 1.0)
        document.add(self.encode(records.write(task.call())), 1.0)
        document.add([_SPECIAL["<|eot|>"]], 1.0)
        return document

    def sum(self) -> Document:
        """Sums, one after the other in one chat."""
        document = self.begin()
        for _ in range(self.rng.randint(1, 4)):
            total = random_sum(self.rng, self._held_out)
            self.user(document, total.request())
            self.assistant(document, total.answer())
        return document


class Stream:
    """Documents joined end to end and cut into sequences."""

    def __init__(self, writer: Writer, length: int, mix: Mapping[str, float]):
        self._writer, self._length = writer, length
        self._kinds, self._shares = list(mix), list(mix.values())

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids [size, length + 1], weights of the same shape, tiles [N, 3, S, S]."""
        return joined([self._sequence() for _ in range(size)])

    def _sequence(self) -> Document:
        # A sequence begins with a whole document and the last one is cut; a cut never goes through
        # a picture's places, whose rows would be lost: such a document is left out.
        sequence = Document()
        while len(sequence.ids) < self._length + 1:
            (kind,) = self._writer.rng.choices(self._kinds, self._shares)
            document = self._writer.kinds[kind]()
            room = self._length + 1 - len(sequence.ids)
            if document.pictures and len(document.ids) > room:
                document = self._writer.story()
            sequence.ids += document.ids[:room]
            sequence.weights += document.weights[:room]
            sequence.pictures += document.pictures
        return sequence


@dataclass(frozen=True)
class Haystack:
    """Passkeys in stories, as if the stories were longer than they are; see `haystacks`.

    Attributes:
        ids: [B, T + 1].
        weights: Of the loss, of the same shape.
        repeats: [B, T]: how often the key of each token stands in the full attention.
        positions: [B, T]: of the queries of the full attention.
    """

    ids: Tensor
    weights: Tensor
    repeats: Tensor
    positions: Tensor


def haystacks(writer: Writer, size: int, shortest: int, longest: int) -> Haystack:
    """Passkeys at distances that are log-uniform up to `longest` tokens.

    The last layer is the only one that sees beyond a chunk, so its keys depend on their chunk
    alone: a text of a million tokens that says the same few hundred over and over has the same
    softmax as those few hundred, each counted thousands of times. Training pays for those only.
    """
    chunk = writer.shape.chunk
    most = 2 * chunk
    documents, repeats, positions = [], [], []
    for _ in range(size):
        rng = writer.rng
        length = int(math.exp(rng.uniform(math.log(shortest), math.log(longest))))
        real = length if length <= most else rng.randint(most - chunk + 1, most)
        if rng.random() < STRADDLES:
            real = chunk * rng.randint(1, most // chunk) + rng.randint(1, 12)
        document, plain = _haystack(writer, real)
        further = max(0, (length - real) // chunk) * chunk
        count = sum(plain)
        times = 1 + further / count if count >= 48 else 1.0
        further = further if times > 1 else 0
        documents.append(document)
        repeats.append([times if flag else 1.0 for flag in plain])
        positions.append([i + further for i in range(len(plain))])
    width = max(len(document.ids) for document in documents)
    for i, document in enumerate(documents):
        missing = width - len(document.ids)
        document.add([_SPECIAL["<|finetune_right_pad|>"]] * missing, 0.0)
        repeats[i] += [1.0] * missing
        positions[i] += [0] * missing
    ids, weights, _ = joined(documents)
    return Haystack(ids, weights, torch.tensor(repeats)[:, :-1], torch.tensor(positions)[:, :-1])


def _haystack(writer: Writer, length: int) -> tuple[Document, list[bool]]:
    """About `length` tokens with a key, and which of them are plain stories.

    The stories after the needle in its chunk are not plain: they have seen it.
    """
    rng = writer.rng
    key = passkey.random_key(rng)
    introduction = writer.encode("\n\n" + passkey.INTRODUCTION)
    needle = writer.encode(passkey.needle(key))
    question = writer.encode(passkey.QUESTION)
    answer = writer.encode(passkey.answer(key))
    fixed = sum(len(part) for part in (introduction, needle, question, answer))
    room = max(0, length - passkey.CHAT_TOKENS - fixed)
    straw = writer.encode(passkey.filler(rng))
    while len(straw) < room + 80:
        straw = straw + writer.encode(" " + passkey.filler(rng))
    straw = straw[len(straw) - room :] if rng.random() < 0.5 else straw[:room]
    stop = writer.encode("a.")[-1]
    ends = [0, *(i + 1 for i, token in enumerate(straw) if token == stop)]
    place = rng.choice(ends)
    document = writer.begin()
    writer.header(document, "user")
    document.add(introduction, 0.0)
    first = len(document.ids)
    document.add([*straw[:place], *needle, *straw[place:]], 0.0)
    end = len(document.ids)
    document.add([*question, _SPECIAL["<|eot|>"]], 0.0)
    writer.header(document, "assistant")
    document.add(writer.encode("\n\n"), 0.0)
    document.add(answer, 1.0)
    document.add([_SPECIAL["<|eot|>"]], 1.0)
    begin, seen = first + place, first + place + len(needle)
    until = -(-seen // writer.shape.chunk) * writer.shape.chunk
    plain = [first <= i < end and not begin <= i < until for i in range(len(document.ids))]
    return document, plain


def joined(documents: list[Document]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Documents of one length side by side: ids, weights, tiles."""
    pictures = [picture for document in documents for picture in document.pictures]
    tiles = torch.from_numpy(np.stack(pictures)) if pictures else None
    ids = torch.tensor([document.ids for document in documents])
    return ids, torch.tensor([document.weights for document in documents]), tiles


def image_tokens(places: int) -> list[int]:
    """A one-tile picture, as Llama 4 lays it out."""
    patches = [_SPECIAL["<|patch|>"]] * places
    return [_SPECIAL["<|image_start|>"], _SPECIAL["<|image|>"], *patches, _SPECIAL["<|image_end|>"]]


def pixels(picture: object) -> NDArray[np.float32]:
    """A picture of the tile's size as [3, S, S] in [-1, 1]."""
    values = np.asarray(picture, dtype=np.float32) / 255
    return ((values - 0.5) / 0.5).transpose(2, 0, 1)
