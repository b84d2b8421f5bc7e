"""Tools of the demo world: their schemas, requests for them, and the calls that answer these."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from puna.demo.stories import COLOURS, FOODS, NAMES, PLACES, THINGS

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _schema(name: str, description: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    return {
        "name": name,
        "description": description,
        "parameters": {"type": "object", "properties": properties, "required": list(parameters)},
    }


SCHEMAS = {
    schema["name"]: schema
    for schema in (
        _schema("get_weather", "The weather of a place.", place="string", day="string"),
        _schema("set_timer", "Rings after some minutes.", minutes="integer"),
        _schema("buy_food", "Buys food.", food="string", count="integer"),
        _schema("find_thing", "Finds a lost thing.", colour="string", thing="string"),
        _schema("send_message", "Sends words to a friend.", to="string", text="string"),
        _schema("multiply", "The product of two numbers.", a="integer", b="integer"),
    )
}


@dataclass(frozen=True)
class Task:
    """A request and the call that answers it, with the tools that are offered."""

    request: str
    name: str
    arguments: dict[str, str | int]
    offered: tuple[str, ...]

    def tools(self) -> list[dict[str, Any]]:
        """Schemas of the tools that are offered."""
        return [SCHEMAS[name] for name in self.offered]

    def call(self) -> dict[str, Any]:
        """The call as the assistant writes it."""
        return {"name": self.name, "parameters": self.arguments}


def _weather(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    place, day = rng.choice(list(PLACES)), rng.choice(DAYS)
    request = rng.choice(
        (f"Will it rain {PLACES[place]} on {day}?", f"How is the weather {PLACES[place]} on {day}?")
    )
    return request, {"place": place, "day": day}


def _timer(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    minutes = rng.randint(1, 99)
    request = rng.choice((f"Set a timer for {minutes} minutes.", f"Wake me in {minutes} minutes."))
    return request, {"minutes": minutes}


def _food(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    food, count = rng.choice(FOODS), rng.randint(2, 99)
    request = rng.choice((f"Buy {count} pounds of {food}.", f"We need {count} pounds of {food}."))
    return request, {"food": food, "count": count}


def _thing(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    request = rng.choice((f"Where is my {colour} {thing}?", f"I lost a {colour} {thing}."))
    return request, {"colour": colour, "thing": thing}


def _message(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    name, text = rng.choice(NAMES), f"{rng.choice(FOODS)} {rng.choice(list(PLACES.values()))}"
    request = rng.choice(
        (f"Tell {name} that there is {text}.", f"Let {name} know: there is {text}.")
    )
    return request, {"to": name, "text": f"There is {text}."}


def _product(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    a, b = rng.randint(10, 999), rng.randint(10, 999)
    request = rng.choice((f"Multiply {a} by {b}.", f"How much is {a} times {b}?"))
    return request, {"a": a, "b": b}


_KINDS: dict[str, Callable[[random.Random], tuple[str, dict[str, str | int]]]] = {
    "get_weather": _weather,
    "set_timer": _timer,
    "buy_food": _food,
    "find_thing": _thing,
    "send_message": _message,
    "multiply": _product,
}


def random_task(rng: random.Random, names: Sequence[str] = tuple(_KINDS)) -> Task:
    """A request for one of one or two offered tools; for one of `names`, each as likely."""
    name = rng.choice(names)
    request, arguments = _KINDS[name](rng)
    offered = [name]
    if rng.random() < 0.5:
        offered.append(rng.choice([other for other in _KINDS if other != name]))
        rng.shuffle(offered)
    return Task(request, name, arguments, tuple(offered))
