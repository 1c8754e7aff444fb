"""Tasks over lists: variables that are tracked, and words that are counted (RULER, arXiv 2404.06654).

Construction, wording and scoring are RULER's; the words of the list are our own. Unlike there, lists are shuffled
differently in every sample.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
from itertools import pairwise
from random import Random

from kvbench.data.samples.needles import NOISE
from kvbench.data.samples.sample import EVIDENCE, Filler, Question, Recipe, Sample, Span, joined
from kvbench.data.samples.words import list_words

INSTRUCTION = "instruction"
SHORT = 4096
"""Below so many tokens lists have fewer copies of their words."""

TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
FIND = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
FOUND = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
    "value {value}, they are: "
)
COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
ASK_COMMON = "\nQuestion: What are the 10 most common words in the above list?"
SAY_COMMON = " Answer: The top 10 words that appear most often in the list are:"
CODED = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
ASK_CODED = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
SAY_CODED = " Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class VariableTracking(Recipe):
    """A chain of assignments among noise: all variables that hold the first value are asked for.

    Attributes:
        chains: the first is asked for, the others distract; ``hops`` assignments after the first.
    """

    name = "variable-tracking"

    chains: int = 1
    hops: int = 4

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        example, names, value = self._text(5, 3, random)
        solved = example[0] + FIND.format(value=value) + FOUND.format(value=value, number=len(names)) + " ".join(names)
        (context, spans), names, value = self._text(max(units, 5 * self.chains), 5, random)
        before = f"{solved}\n\n"
        return Sample(
            before + context,
            (Question(
                FIND.format(value=value), FOUND.format(value=value, number=len(names)), tuple(names), "contains_all", 30
            ),),
            (Span(INSTRUCTION, 0, len(before)),
             *(Span(name, start + len(before), stop + len(before)) for name, start, stop in spans)),
        )

    def _text(self, lines: int, letters: int, random: Random) -> tuple[tuple[str, tuple[Span, ...]], list[str], str]:
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = "".join(random.choices(string.ascii_uppercase, k=letters))
            names += [name] if name not in names else []
        hay, asked = [(NOISE, "")] * lines, ""
        for chain in range(self.chains):
            mine = names[chain * (self.hops + 1) : (chain + 1) * (self.hops + 1)]
            value = str(random.randint(10000, 99998))
            asked = asked or value
            steps = [f"VAR {mine[0]} = {value}"]
            steps += [f"VAR {after} = VAR {before} " for before, after in pairwise(mine)]
            places = sorted(random.sample(range(lines), len(steps)))
            name = EVIDENCE if chain == 0 else "distractor"
            for shift, (place, step) in enumerate(zip(places, steps, strict=True)):
                hay.insert(place + shift, (step, name))
        return joined(hay, "\n", TRACK), names[: self.hops + 1], asked


@dataclass(frozen=True)
class CommonWords(Recipe):
    """A numbered list in which ten words are more common than the others."""

    name = "common-words"
    step = 10

    is_short: bool = False

    def prepare(self, length: int) -> CommonWords:
        return replace(self, is_short=length < SHORT)

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        (example, common), (context, answer) = (
            (_list(20, 3, 1, random), _list(max(units, 11), 6, 1, random)) if self.is_short
            else (_list(40, 10, 3, random), _list(max(units, 11), 30, 3, random))
        )
        solved = COMMON + example + ASK_COMMON + SAY_COMMON + " " + " ".join(
            f"{place}. {word}" for place, word in enumerate(common, 1)
        )
        before = f"{solved}\n{COMMON}"
        return Sample(
            before + context, (Question(ASK_COMMON, SAY_COMMON, tuple(answer), "contains_all", 120),),
            (Span(INSTRUCTION, 0, len(before)),),
        )


def _list(words: int, often: int, rarely: int, random: Random) -> tuple[str, list[str]]:
    """A numbered list of so many different words, and the ten that are common."""
    chosen = list_words(words, random)
    entries = chosen[:10] * often + chosen[10:] * rarely
    random.shuffle(entries)
    return " ".join(f"{place}. {word}" for place, word in enumerate(entries, 1)), chosen[:10]


@dataclass(frozen=True)
class FrequentWords(Recipe):
    """Coded words with the frequencies of a zeta distribution; the first is dots, the next three are asked for.

    Attributes:
        vocabulary: number of different words; ``alpha`` of the distribution.
    """

    name = "frequent-words"
    step = 40

    alpha: float = 2.0
    vocabulary: int = 20

    def prepare(self, length: int) -> FrequentWords:
        return replace(self, vocabulary=max(8, (length - 50) // 50))

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        known: dict[str, None] = {}
        while len(known) < self.vocabulary:
            known["".join(random.choices(string.ascii_lowercase, k=6))] = None
        from scipy.special import zeta  # listing tasks needs no scipy

        words, total = ["...", *list(known)[1:]], float(zeta(self.alpha))
        text = [
            word for rank, word in enumerate(words, 1)
            for _ in range(int(units * rank**-self.alpha / total))
        ]
        random.shuffle(text)
        return Sample(
            CODED + " ".join(text), (Question(ASK_CODED, SAY_CODED, tuple(words[1:4]), "contains_all", 50),),
            (Span(INSTRUCTION, 0, len(CODED)),),
        )
