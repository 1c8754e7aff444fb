"""What a sample of a long-context task is, how recipes make one, and how its length is met."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, NamedTuple

from kvbench.errors import UserError

EVIDENCE = "evidence"
"""Name of the spans that the right answer is in."""


class Span(NamedTuple):
    """A part of a context that is more than filler: characters start .. stop - 1.

    Attributes:
        name: ``evidence``, or another kind of text such as ``instruction`` or ``distractor``.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes:
        text: what follows the context; ``prefix`` what begins the answer.
        references: what the answer is compared with.
        scoring: how, by a name in :mod:`kvbench.data.samples.scoring`.
        new_tokens: tokens that the model may generate.
        first_line: whether only the first line of the answer is scored.
    """

    text: str
    prefix: str
    references: tuple[str, ...]
    scoring: str
    new_tokens: int
    first_line: bool = False


@dataclass(frozen=True)
class Sample:
    """A context and the questions about it.

    Attributes:
        bin: what results are also reported by, such as the depth of a needle; empty for nothing.
    """

    context: str
    questions: tuple[Question, ...]
    spans: tuple[Span, ...] = ()
    bin: str = ""


@dataclass(frozen=True)
class Recipe(ABC):
    """Makes samples of one task from random numbers, and from a text that serves as filler.

    Attributes:
        name: in the task file.
        step: least number of units of filler.
    """

    name: ClassVar[str]
    step: ClassVar[int] = 5

    @abstractmethod
    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        """Make a sample with so many units of filler; equal random numbers give an equal sample.

        Args:
            index: of the sample within the task.
        """

    def most(self, filler: Filler) -> int | None:
        """The most units of filler that there are; None if it can be repeated."""
        return None

    def prepare(self, length: int) -> Recipe:
        """The recipe for samples of so many tokens."""
        return self


class Filler:
    """A running text that needles are hidden in, repeated where it is too short.

    Attributes:
        samples: the texts with the questions that are known about them.
    """

    def __init__(self, texts: Sequence[str], samples: Sequence[Sample] = ()) -> None:
        self.samples = tuple(samples)
        self.words = [word for text in texts for word in text.split()]
        if not self.words:
            raise UserError("The filler holds no text.", "Give --data with running text.")

    def sentences(self, words: int) -> list[str]:
        """The first words, in sentences; the last may be cut."""
        return sentences(self.first(words))

    def first(self, words: int) -> list[str]:
        times, rest = divmod(words, len(self.words))
        return self.words * times + self.words[:rest]


def sentences(words: Sequence[str]) -> list[str]:
    """Words joined into sentences, which end with a full stop, a question mark or an exclamation mark."""
    found: list[list[str]] = [[]]
    for word in words:
        found[-1].append(word)
        if word.rstrip("\"')\u201d\u2019").endswith((".", "!", "?")):
            found.append([])
    return [" ".join(sentence) for sentence in found if sentence]


def joined(parts: Sequence[tuple[str, str]], between: str, before: str = "") -> tuple[str, tuple[Span, ...]]:
    """Join parts into a text, and return it with the spans of those that have a name.

    Args:
        parts: texts, each with its name; that of filler is empty.
        before: text in front of all.
    """
    text, spans = [before], []
    place = len(before)
    for number, (part, name) in enumerate(parts):
        if number:
            text.append(between)
            place += len(between)
        if name:
            spans.append(Span(name, place, place + len(part)))
        text.append(part)
        place += len(part)
    return "".join(text), tuple(spans)


def make_sample(
    recipe: Recipe, filler: Filler, length: int, seed: int, index: int, count: Callable[[Sample], int]
) -> Sample:
    """Make the sample with the most units of filler whose prompt and answer fit in ``length`` tokens.

    Args:
        count: tokens of a sample's longest prompt and its answer.

    Raises:
        UserError: not even the least fits.
    """
    def made(units: int) -> Sample:
        return recipe.sample(units, Random(f"{recipe.name} {seed} {index}"), filler, index)

    least, most = recipe.step, recipe.most(filler)
    if count(made(least)) > length:
        raise UserError(f"{recipe.name}: {length} tokens are too few for a sample.", "Use a larger --set length=.")
    if most is not None and count(made(most)) <= length:
        return made(most)
    low, high = least, least * 2 if most is None else most
    while most is None and count(made(high)) <= length:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(made(middle)) <= length else (low, middle)
    return made(low)
