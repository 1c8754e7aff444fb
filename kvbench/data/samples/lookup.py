"""Looking something up: a pass key in noise, and values of keys in a JSON object, after InfiniteBench (2402.13718)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from kvbench.data.samples.needles import NOISE, random_value
from kvbench.data.samples.sample import EVIDENCE, Filler, Question, Recipe, Sample, Span, joined


@dataclass(frozen=True)
class PassKey(Recipe):
    """A number of five digits, said twice in one line among noise."""

    name = "passkey"

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        key = str(random.randint(10000, 99999))
        parts = [(NOISE, "")] * units
        parts.insert(
            random.randint(0, units), (f"The pass key is {key}. Remember it. {key} is the pass key.", EVIDENCE)
        )
        before = (
            "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz "
            "you about the important information there.\n\n"
        )
        context, spans = joined(parts, "\n", before)
        return Sample(
            context, (Question("\n\nWhat is the pass key?", " The pass key is", (key,), "first_number", 16),), spans
        )


@dataclass(frozen=True)
class KeyValues(Recipe):
    """A JSON object of random keys and values; some values are asked for, one after the other.

    Attributes:
        asked: number of questions about one context.
    """

    name = "key-values"

    asked: int = 4

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        pairs = {random_value("uuids", random): random_value("uuids", random) for _ in range(max(units, self.asked))}
        keys = random.sample(list(pairs), self.asked)
        before = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        context = before + json.dumps(pairs)
        spans = []
        for key in keys:
            start = context.index(key) - 1
            spans.append(Span(EVIDENCE, start, context.index(pairs[key]) + len(pairs[key]) + 1))
        questions = tuple(
            Question(
                f"\n\nKey: \"{key}\"", " The value associated with the specified key is:", (pairs[key],),
                "contains_all", 50,
            ) for key in keys
        )
        return Sample(context, questions, tuple(spans))
