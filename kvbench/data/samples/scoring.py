"""How an answer is scored: each rule gives a number from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from kvbench.data.samples.qa_scoring import QA_SCORING

Scoring = Callable[[str, Sequence[str]], float]


def contains_all(answer: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains, case ignored (RULER)."""
    text = answer.lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def contains_any(answer: str, references: Sequence[str]) -> float:
    """Whether the answer contains a reference, case ignored (RULER's question answering)."""
    text = answer.lower()
    return float(any(reference.lower() in text for reference in references))


def first_number(answer: str, references: Sequence[str]) -> float:
    """Whether the first whole number in the answer is the reference."""
    found = re.search(r"-?\d+", answer.replace(",", ""))
    return float(found is not None and int(found[0]) == int(references[0]))


def label(answer: str, references: Sequence[str]) -> float:
    """Whether the first sentence names the first reference, as a whole word, and no other label.

    Args:
        references: the right label, and all the others; those in the question do not count, and are left out.
    """
    sentence = re.split(r"[.\n]", answer.lower(), maxsplit=1)[0]
    named = {one for one in references if re.search(rf"\b{re.escape(one.lower())}\b", sentence)}
    return float(named == {references[0]})


def label_published(answer: str, references: Sequence[str]) -> float:
    """The same by the published rule of BABILong, which looks for parts of words: ``one`` is in ``none``."""
    sentence = re.split(r"\.|<context>|<example>", answer.lower(), maxsplit=1)[0]
    named = {one for one in references if one.lower() in sentence}
    return float(named == {references[0]})


def instructions(answer: str, references: Sequence[str]) -> float:
    """Share of instructions that the answer follows; each is ``rule:argument``."""
    return sum(followed(answer, reference) for reference in references) / len(references)


def followed(answer: str, instruction: str) -> bool:
    """Whether an answer follows one instruction."""
    rule, _, argument = instruction.partition(":")
    text = answer.strip()
    words = re.findall(r"[\w'-]+", text.lower())
    match rule:
        case "contains":
            return argument.lower() in words
        case "begins":
            return bool(words) and words[0] == argument.lower()
        case "ends":
            return bool(words) and words[-1] == argument.lower()
        case "lower":
            return bool(words) and text == text.lower()
        case "without":
            return bool(words) and argument.lower() not in text.lower()
    raise ValueError(rule)


SCORING: dict[str, Scoring] = {
    rule.__name__: rule for rule in (
        contains_all, contains_any, first_number, label, label_published, instructions, *QA_SCORING
    )
}
