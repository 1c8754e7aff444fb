"""Several instructions in one prompt, of which compression may lose some (after arXiv 2510.00231)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvbench.data.samples.lists import INSTRUCTION
from kvbench.data.samples.sample import Filler, Question, Recipe, Sample, Span
from kvbench.data.samples.words import NOUNS

WORDING = {
    "contains": "Use the word \"{0}\".", "begins": "Begin with the word \"{0}\".", "ends": "End with the word \"{0}\".",
    "without": "Do not use the letter \"{0}\".", "lower": "Write in small letters only, without capitals.",
}
"""What the model is told, for each instruction whose following can be checked."""


@dataclass(frozen=True)
class Instructions(Recipe):
    """Instructions for an answer, then a text, then the question.

    Attributes:
        count: number of instructions in a prompt, at most five.
    """

    name = "instructions"
    step = 20

    count: int = 4

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        rules = random.sample(sorted(WORDING), self.count)
        nouns = random.sample(NOUNS, self.count)
        letter = random.choice([letter for letter in "bjpqvxz" if not any(letter in noun for noun in nouns)])
        orders = [
            (rule, {"without": letter, "lower": ""}.get(rule, noun)) for rule, noun in zip(rules, nouns, strict=True)
        ]
        text, spans = "You will be asked about the text below. Your answer must keep to these rules.\n", []
        for place, (rule, argument) in enumerate(orders, 1):
            line = f"{place}. {WORDING[rule].format(argument)}\n"
            spans.append(Span(INSTRUCTION, len(text), len(text) + len(line)))
            text += line
        text += "\nThe text:\n" + " ".join(filler.first(units))
        question = "\n\nSay in one sentence what the text is about, and keep to all the rules."
        references = tuple(f"{rule}:{argument}" for rule, argument in orders)
        return Sample(text, (Question(question, "\nAnswer:", references, "instructions", 48),), tuple(spans))
