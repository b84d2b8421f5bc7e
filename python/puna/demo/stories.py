"""Small-world stories with questions about them: consistent characters, things and places."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

ANIMALS = ("fox", "bear", "cat", "dog", "rabbit", "owl", "mouse", "duck")
NAMES = ("Mia", "Tom", "Lily", "Ben", "Anna", "Max", "Rosa", "Sam", "Nora", "Leo")
ADJECTIVES = ("little", "brave", "hungry", "clever", "sleepy", "happy", "curious", "shy")
PLACES = {
    "the river": "by the river",
    "the forest": "in the forest",
    "the hill": "on the hill",
    "the village": "in the village",
    "the garden": "in the garden",
    "the lake": "by the lake",
}
THINGS = ("ball", "key", "hat", "book", "lamp", "boat", "bell", "basket")
COLOURS = ("red", "blue", "green", "yellow", "white", "golden")
FOODS = ("apples", "honey", "bread", "berries", "soup", "cheese")
WEATHER = (
    "The sun was warm and the sky was blue.",
    "It was raining, but nobody minded.",
    "A soft wind moved the leaves.",
    "The morning was cold and bright.",
)
FEELINGS = ("very happy", "tired but glad", "proud", "full of joy")


@dataclass(frozen=True)
class Story:
    """A story's facts; the sentences and the answers follow from them."""

    animal: str
    name: str
    adjective: str
    place: str
    thing: str
    colour: str
    friend: str
    friend_animal: str
    food: str
    lost: bool
    weather: str
    feeling: str

    def text(self) -> str:
        """Six or seven sentences."""
        who = f"{self.name} the {self.animal}"
        thing = f"{self.colour} {self.thing}"
        first = [
            f"Once upon a time there was a {self.adjective} {self.animal} named {self.name}.",
            f"One day {self.name} went to {self.place}.",
            self.weather,
        ]
        if self.lost:
            middle = [
                f"{self.name} wanted to play, but the {thing} was lost.",
                f"Then {self.friend} the {self.friend_animal} came and helped to look for it.",
                f"They found the {thing} {PLACES[self.place]}.",
            ]
        else:
            middle = [
                f"There {self.name} found a {thing}.",
                f"It belonged to {self.friend} the {self.friend_animal}.",
                f"{self.name} gave the {thing} back, and {self.friend} smiled.",
            ]
        last = [
            f"Together they ate {self.food}.",
            f"{who} went home and was {self.feeling}.",
        ]
        return " ".join(first + middle + last)

    def questions(self) -> list[tuple[str, str]]:
        """Questions about the story with their answers."""
        verb = "lose" if self.lost else "find"
        return [
            (
                "What was the name of the " + self.animal + "?",
                f"The {self.animal} was named {self.name}.",
            ),
            (f"Where did {self.name} go?", f"{self.name} went to {self.place}."),
            (
                f"What did {self.name} {verb}?",
                f"{self.name} {'lost' if self.lost else 'found'} a {self.colour} {self.thing}.",
            ),
            ("What did they eat?", f"Together they ate {self.food}."),
            (
                f"Who was the friend of {self.name}?",
                f"The friend was {self.friend} the {self.friend_animal}.",
            ),
        ]


def random_story(rng: random.Random, animal: str | None = None) -> Story:
    """A story of the small world, about `animal` if one is given."""
    name, friend = rng.sample(NAMES, 2)
    animal = animal or rng.choice(ANIMALS)
    return Story(
        animal=animal,
        name=name,
        adjective=rng.choice(ADJECTIVES),
        place=rng.choice(list(PLACES)),
        thing=rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        friend=friend,
        friend_animal=rng.choice([other for other in ANIMALS if other != animal]),
        food=rng.choice(FOODS),
        lost=rng.random() < 0.5,
        weather=rng.choice(WEATHER),
        feeling=rng.choice(FEELINGS),
    )


def read_story(text: str) -> Story | None:
    """The facts of a story, if it is one of the small world's, sentence by sentence."""
    opening = re.match(
        r"Once upon a time there was a (\w+) (\w+) named (\w+)\. One day \3 went to (the \w+)\.",
        text,
    )
    thing = re.search(r"(?: found a|but the) (\w+) (\w+)(?: was lost)?\.", text)
    friend = re.search(r"(?:belonged to|Then) (\w+) the (\w+)", text)
    meal = re.search(r"Together they ate (\w+)\.", text)
    weather = next((sentence for sentence in WEATHER if sentence in text), None)
    feeling = next((words for words in FEELINGS if text.endswith(f" was {words}.")), None)
    if not (opening and thing and friend and meal and weather and feeling):
        return None
    story = Story(
        animal=opening[2],
        name=opening[3],
        adjective=opening[1],
        place=opening[4],
        thing=thing[2],
        colour=thing[1],
        friend=friend[1],
        friend_animal=friend[2],
        food=meal[1],
        lost=" was lost." in text,
        weather=weather,
        feeling=feeling,
    )
    two = story.friend != story.name and story.friend_animal != story.animal
    return story if two and story.place in PLACES and story.text() == text else None


def story_request(animal: str) -> str:
    """What a user says to be told a story."""
    return f"Tell me a story about {'an' if animal[0] in 'aeiou' else 'a'} {animal}."
