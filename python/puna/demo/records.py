"""JSON of the demo world: facts in words, and the same facts as an object."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from puna.demo.scene import Scene
from puna.demo.stories import ADJECTIVES, ANIMALS, FOODS, NAMES, Story

STORY_REQUEST = "Write the story as JSON."
SCENE_REQUEST = "Describe this picture as JSON."


@dataclass(frozen=True)
class Record:
    """What one sentence says of somebody."""

    name: str
    adjective: str
    animal: str
    age: int
    likes: tuple[str, ...]

    def request(self) -> str:
        """What a user asks."""
        likes = " and ".join(self.likes) or "nothing"
        return (
            f"Write this as JSON: {self.name} is a {self.adjective} {self.animal}, "
            f"{self.age} years old, and likes {likes}."
        )

    def value(self) -> dict[str, object]:
        """The object that the assistant writes."""
        return {
            "name": self.name,
            "adjective": self.adjective,
            "animal": self.animal,
            "age": self.age,
            "likes": list(self.likes),
        }


def random_record(rng: random.Random) -> Record:
    """A record drawn uniformly, of up to three foods."""
    return Record(
        name=rng.choice(NAMES),
        adjective=rng.choice(ADJECTIVES),
        animal=rng.choice(ANIMALS),
        age=rng.randint(1, 99),
        likes=tuple(rng.sample(FOODS, rng.randint(0, 3))),
    )


def story_value(story: Story) -> dict[str, object]:
    """A story's facts."""
    return {
        "name": story.name,
        "animal": story.animal,
        "place": story.place,
        "thing": {"colour": story.colour, "kind": story.thing, "lost": story.lost},
        "friend": {"name": story.friend, "animal": story.friend_animal},
        "food": story.food,
    }


def scene_value(scene: Scene) -> dict[str, object]:
    """What a picture shows."""
    return {
        "background": scene.background,
        "things": [{"colour": thing.colour, "shape": thing.shape} for thing in scene.things],
    }


def write(value: object) -> str:
    """JSON as the model writes it."""
    return json.dumps(value)
