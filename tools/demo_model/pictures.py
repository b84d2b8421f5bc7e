"""Pictures for a model with tiles large enough to read: words, and emoji with their names.

Both are drawn at random places and sizes. Words are made up of syllables, so that reading them is
reading letters; the font is Pillow's own. Emoji need a colour font (Noto Color Emoji, found through
fontconfig) and the package `emoji` for their names; without them there are none.
"""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import zlib
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from puna.demo.scene import BACKGROUNDS, COLOURS

WORD_REQUEST = "What is written here?"
EMOJI_REQUEST = "What is this emoji called?"
EMOJI = 300  # how many are shown and named

_CONSONANTS, _VOWELS = "bdfghklmnprstvwz", "aeiou"
_EMOJI_FONT = "Noto Color Emoji"
_EMOJI_PIXELS = 109  # the one size that font's pictures have


def held_out(word: str) -> bool:
    """Whether training never shows this word: every tenth, by its checksum."""
    return zlib.crc32(word.encode()) % 10 == 0


def random_word(rng: random.Random, of_held_out: bool = False) -> str:
    """Four to six letters in syllables, of the words that training shows or of the others."""
    while True:
        length = rng.randint(4, 6)
        letters = [rng.choice(_VOWELS if i % 2 else _CONSONANTS) for i in range(length)]
        word = "".join(letters)
        if held_out(word) == of_held_out:
            return word


def draw_word(rng: random.Random, word: str, size: int) -> Image.Image:
    """The word somewhere on a plain background, as an RGB picture of size x size pixels."""
    paper, ink = rng.choice(list(BACKGROUNDS.values())), rng.choice(list(COLOURS.values()))
    picture = Image.new("RGB", (size, size), paper)
    pen = ImageDraw.Draw(picture)
    wanted = rng.uniform(0.7, 0.9) * size  # of its width
    points = size / 4
    font = ImageFont.load_default(points)
    font = ImageFont.load_default(points * wanted / pen.textlength(word, font))
    left, top, right, bottom = pen.textbbox((0, 0), word, font)
    x = rng.uniform(0, size - (right - left)) - left
    y = rng.uniform(0, size - (bottom - top)) - top
    pen.text((x, y), word, ink, font)
    return picture


@functools.cache
def emoji_names() -> dict[str, str]:
    """Emoji of one character and what they are called; empty where they cannot be drawn."""
    if _emoji_font() is None:
        return {}
    try:
        import emoji
    except ImportError:
        return {}
    named = {
        character: data["en"].strip(":").replace("_", " ")
        for character, data in emoji.EMOJI_DATA.items()
        if len(character) == 1 and data["status"] == emoji.STATUS["fully_qualified"]
    }
    plain = [character for character, name in named.items() if name.replace(" ", "").isalpha()]
    chosen = random.Random(0).sample(sorted(plain), len(plain))
    # Fonts are older than names: what has no picture comes out blank.
    drawn = (character for character in chosen if _emoji_picture(character).getbbox())
    return {character: named[character] for character, _ in zip(drawn, range(EMOJI), strict=False)}


def draw_emoji(rng: random.Random, character: str, size: int) -> Image.Image:
    """The emoji somewhere on a plain background, as an RGB picture of size x size pixels."""
    picture = Image.new("RGB", (size, size), rng.choice(list(BACKGROUNDS.values())))
    emoji = _emoji_picture(character)
    width = round(rng.uniform(0.5, 0.9) * size)
    height = round(width * emoji.height / emoji.width)
    emoji = emoji.resize((width, height), Image.Resampling.BOX)
    place = (rng.randint(0, size - width), rng.randint(0, max(0, size - height)))
    picture.paste(emoji, place, emoji)
    return picture


@functools.cache
def _emoji_font() -> ImageFont.FreeTypeFont | None:
    if shutil.which("fc-match") is None:
        return None
    command = ["fc-match", "--format", "%{family}\n%{file}", _EMOJI_FONT]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    family, path = found.split("\n", 1)
    return ImageFont.truetype(Path(path), _EMOJI_PIXELS) if _EMOJI_FONT in family else None


@functools.cache
def _emoji_picture(character: str) -> Image.Image:
    """In colour on nothing, cut to what is drawn."""
    font = _emoji_font()
    assert font is not None
    picture = Image.new("RGBA", (2 * _EMOJI_PIXELS, 2 * _EMOJI_PIXELS))
    ImageDraw.Draw(picture).text((0, 0), character, font=font, embedded_color=True)
    return picture.crop(picture.getbbox())
