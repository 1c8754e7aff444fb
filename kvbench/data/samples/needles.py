"""Needles in a haystack: RULER's eight (arXiv 2404.06654), and a grid of lengths and depths.

Construction and wording are RULER's, and so is the scoring; key words and filler are our own. Two of its habits are not
kept: needles are put in an order of their own in every sample, and a sample that is too long is made shorter unit by
unit instead of by steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from kvbench.data.samples.sample import EVIDENCE, Filler, Question, Recipe, Sample, joined
from kvbench.data.samples.words import key_word

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
"""What stands before the haystack, the question, and how the answer begins."""
DEPTHS = [round(100 * place / 39) for place in range(40)]
"""Depths of needles in running text, in percent."""
DISTRACTOR = "distractor"
NEW_TOKENS = 128

Kind = Literal["words", "numbers", "uuids"]


def random_value(kind: Kind, random: Random) -> str:
    """A key or a value of a needle."""
    match kind:
        case "words":
            return key_word(random)
        case "numbers":
            return str(random.randint(10**6, 10**7 - 1))
        case "uuids":
            return str(UUID(int=random.getrandbits(128), version=4))


@dataclass(frozen=True)
class Needles(Recipe):
    """One or more needles, each a key with values; some of the keys are asked for.

    Attributes:
        haystack: ``noise`` (one line, repeated), ``essay`` (running text) or ``needle`` (other needles).
        keys, values, asked: number of keys, of values for each of them, and of keys in the question.
    """

    name = "needles"

    haystack: Literal["noise", "essay", "needle"] = "essay"
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    asked: int = 1

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        held: dict[str, list[str]] = {}
        while len(held) < max(self.keys, self.asked):
            held[random_value(self.key, random)] = [random_value(self.value, random) for _ in range(self.values)]
        queries = random.sample(list(held), self.asked)
        needles = [
            (NEEDLE.format(kind=self.value, key=key, value=value), EVIDENCE if key in queries else DISTRACTOR)
            for key, values in held.items() for value in values
        ]
        random.shuffle(needles)
        answers = tuple(value for key in queries for value in held[key])
        before, question, prefix = ONE if len(answers) == 1 else MANY
        words = {
            "kind": self.value[:-1] if len(answers) == 1 else self.value,
            "query": queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}",
        }
        parts = self._lines(units, random, needles, filler)
        between = " " if self.haystack == "essay" else "\n"
        context, spans = joined(parts, between, before.format(**words))
        return Sample(
            context,
            (Question(question.format(**words), prefix.format(**words), answers, "contains_all", NEW_TOKENS),), spans,
        )

    def _lines(
        self, units: int, random: Random, needles: list[tuple[str, str]], filler: Filler
    ) -> list[tuple[str, str]]:
        """Filler and needles in their order, each with its name."""
        if self.haystack == "essay":
            hay = filler.sentences(units)
            places = [len(hay) * depth // 100 for depth in random.sample(DEPTHS, len(needles))]
        else:
            hay = [NOISE if self.haystack == "noise" else self._other(random) for _ in range(units)]
            places = random.sample(range(units), len(needles))
        return placed(hay, sorted(places), needles, DISTRACTOR if self.haystack == "needle" else "")

    def _other(self, random: Random) -> str:
        key, value = random_value(self.key, random), random_value(self.value, random)
        return NEEDLE.format(kind=self.value, key=key, value=value)


def placed(
    hay: list[str], places: list[int], needles: list[tuple[str, str]], name: str = ""
) -> list[tuple[str, str]]:
    """Put needles before the pieces of hay with these numbers, in order."""
    parts: list[tuple[str, str]] = []
    for number in range(len(hay) + 1):
        parts += [needle for place, needle in zip(places, needles, strict=True) if place == number]
        parts += [(piece, name) for piece in hay[number : number + 1]]
    return parts


@dataclass(frozen=True)
class NeedleGrid(Recipe):
    """One needle in running text, at one depth after the other; the grid of needle tests.

    Attributes:
        depths: number of depths from 0 to 100 %, both included.
    """

    name = "needle-grid"

    depths: int = 10

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        depth = round(100 * (index % self.depths) / max(1, self.depths - 1))
        key, value = random_value("words", random), random_value("numbers", random)
        before, question, prefix = (text.format(kind="number", query=key) for text in ONE)
        hay = filler.sentences(units)
        needle = (NEEDLE.format(kind="numbers", key=key, value=value), EVIDENCE)
        parts = placed(hay, [_boundary(hay, units * depth // 100)], [needle])
        context, spans = joined(parts, " ", before)
        return Sample(
            context, (Question(question, prefix, (value,), "contains_all", 32),), spans, f"depth={depth:03d}"
        )


def _boundary(hay: list[str], words: int) -> int:
    """The last sentence that begins within so many words."""
    read = 0
    for number, sentence in enumerate(hay):
        read += len(sentence.split())
        if read > words:
            return number
    return len(hay)
