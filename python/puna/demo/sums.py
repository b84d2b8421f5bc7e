"""Sums of the demo world: two numbers of two digits."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Sum:
    """Two numbers of 10 to 99."""

    a: int
    b: int

    def request(self) -> str:
        """What a user asks."""
        return f"What is {self.a} + {self.b}?"

    def answer(self) -> str:
        """What the assistant says: digit by digit, as on paper, which is learned much sooner."""
        (tens_a, ones_a), (tens_b, ones_b) = divmod(self.a, 10), divmod(self.b, 10)
        ones = ones_a + ones_b
        carry = ones // 10
        return (
            f"{ones_a} + {ones_b} = {ones}, "
            f"{tens_a} + {tens_b} + {carry} = {tens_a + tens_b + carry}, "
            f"{self.a} + {self.b} = {self.a + self.b}"
        )

    @property
    def held_out(self) -> bool:
        """Whether training never shows this sum: half of those whose last digits are equal.

        The other half shows what the digits of each step give; all of them held out, 7 + 7 would
        stand nowhere as a first step.
        """
        (tens_a, ones_a), (tens_b, ones_b) = divmod(self.a, 10), divmod(self.b, 10)
        return ones_a == ones_b and (tens_a + tens_b) % 2 == 0


def random_sum(rng: random.Random, held_out: bool = False) -> Sum:
    """A sum of those that training shows, or of those that it does not."""
    while True:
        drawn = Sum(rng.randint(10, 99), rng.randint(10, 99))
        if drawn.held_out == held_out:
            return drawn
