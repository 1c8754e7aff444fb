"""Arithmetic with solved examples before it: what compression takes from many shots."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvbench.data.facts import NAMES
from kvbench.data.samples.sample import Filler, Question, Recipe, Sample, Span

THINGS = ("apples", "pens", "stones", "coins", "shells", "books", "cards", "eggs", "cups", "nails")
SHOT = "shot"


@dataclass(frozen=True)
class Arithmetic(Recipe):
    """Solved problems of addition and subtraction, and one to solve; two steps each."""

    name = "arithmetic"

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        text, spans = "Solve the last problem as the others were solved.\n", []
        for _ in range(units):
            problem, answer = _problem(random)
            shot = f"\nQuestion: {problem}\nAnswer: {answer}\n"
            spans.append(Span(SHOT, len(text), len(text) + len(shot)))
            text += shot
        problem, answer = _problem(random)
        return Sample(
            text, (Question(f"\nQuestion: {problem}", "\nAnswer:", (str(answer),), "first_number", 16),), tuple(spans)
        )


def _problem(random: Random) -> tuple[str, int]:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    first, more, less = random.randint(10, 60), random.randint(2, 30), random.randint(2, 9)
    text = f"{name} has {first} {thing}, gets {more} more and gives {less} away. How many {thing} are left?"
    return text, first + more - less
