"""Scenes of the demo world: one or two coloured shapes, drawn, and described in one sentence."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 40),
    "green": (40, 165, 65),
    "blue": (45, 85, 215),
    "yellow": (240, 215, 50),
    "orange": (240, 135, 30),
    "purple": (140, 55, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (20, 20, 20),
    "grey": (128, 128, 128),
}
CAPTION_REQUEST = "What is in this picture?"
SHAPES = ("circle", "square", "triangle", "cross")

_SCALE = 4  # drawn larger and reduced, for smooth edges


@dataclass(frozen=True)
class Thing:
    """A shape with its centre and half-width as fractions of the picture."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    def words(self) -> str:
        """For example "a red circle", "an orange cross"."""
        return f"{'an' if self.colour[0] in 'aeiou' else 'a'} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One or two things on a plain background; of two, the first is left of or above the other."""

    background: str
    things: tuple[Thing, ...]
    relation: str | None = None

    def caption(self) -> str:
        """The sentence that describes the scene."""
        text = self.things[0].words()
        if self.relation:
            text += f" {self.relation} {self.things[1].words()}"
        return f"{text[0].upper()}{text[1:]} on a {self.background} background."


def random_scene(rng: random.Random) -> Scene:
    """A scene drawn uniformly from the small world."""
    background = rng.choice(list(BACKGROUNDS))

    def thing(x: float, y: float, radius: float) -> Thing:
        return Thing(rng.choice(list(COLOURS)), rng.choice(SHAPES), x, y, radius)

    if rng.random() < 0.4:
        return Scene(
            background,
            (thing(rng.uniform(0.32, 0.68), rng.uniform(0.32, 0.68), rng.uniform(0.16, 0.28)),),
        )
    near, far = rng.uniform(0.22, 0.29), rng.uniform(0.71, 0.78)
    across = (rng.uniform(0.36, 0.64), rng.uniform(0.36, 0.64))
    radii = (rng.uniform(0.14, 0.19), rng.uniform(0.14, 0.19))
    if rng.random() < 0.5:
        things = (thing(near, across[0], radii[0]), thing(far, across[1], radii[1]))
        return Scene(background, things, "to the left of")
    things = (thing(across[0], near, radii[0]), thing(across[1], far, radii[1]))
    return Scene(background, things, "above")


def draw(scene: Scene, size: int) -> Image.Image:
    """The scene as an RGB picture of size x size pixels."""
    large = size * _SCALE
    picture = Image.new("RGB", (large, large), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y, r = thing.x * large, thing.y * large, thing.radius * large
        colour = COLOURS[thing.colour]
        if thing.shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        elif thing.shape == "square":
            pen.rectangle((x - 0.88 * r, y - 0.88 * r, x + 0.88 * r, y + 0.88 * r), fill=colour)
        elif thing.shape == "triangle":
            pen.polygon(((x, y - r), (x + r, y + 0.8 * r), (x - r, y + 0.8 * r)), fill=colour)
        else:
            pen.rectangle((x - 0.32 * r, y - r, x + 0.32 * r, y + r), fill=colour)
            pen.rectangle((x - r, y - 0.32 * r, x + r, y + 0.32 * r), fill=colour)
    return picture.resize((size, size), Image.Resampling.BOX)
