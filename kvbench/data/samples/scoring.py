"""How an answer is scored: each rule gives a number from 0 to 1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

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
    sentence = answer.lower().split(".")[0]
    named = {one for one in references if one.lower() in sentence}
    return float(named == {references[0]})


def first_digits(answer: str, references: Sequence[str]) -> float:
    """Whether the first run of digits is the reference, digit by digit (InfiniteBench's pass keys and numbers)."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == references[0])


def word(answer: str, references: Sequence[str]) -> float:
    """Whether the reference is one of the words, which blanks, quotes, braces, and marks of sentences end
    (InfiniteBench's key-value retrieval)."""
    return float(references[0] in re.split(r"[\s:\"'.,?!{}]+", answer))


def token_f1(answer: str, references: Sequence[str]) -> float:
    """F1 of the words shared with the nearest reference, without case, punctuation and articles (SQuAD, LongBench)."""
    return max(_shared(_plain_words(answer), _plain_words(reference)) for reference in references)


def _plain_words(text: str) -> list[str]:
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _shared(mine: list[str], theirs: list[str]) -> float:
    return 2 * (Counter(mine) & Counter(theirs)).total() / (len(mine) + len(theirs)) if mine or theirs else 0.0


def share_of_numbers(answer: str, references: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the reference's (LongBench's passages)."""
    right = re.findall(r"\d+", references[0])[:1]
    found = re.findall(r"\d+", answer)
    return sum([number] == right for number in found) / len(found) if found else 0.0


def choice(answer: str, references: Sequence[str]) -> float:
    """Whether the answer says that the correct answer is the reference, a letter (LongBench v2)."""
    plain = answer.replace("*", "")
    said = (f"The correct answer is ({references[0]})", f"The correct answer is {references[0]}")
    return float(any(sentence in plain for sentence in said))


def first_boxed(answer: str, references: Sequence[str]) -> float:
    """Whether what the first ``boxed{...}`` holds, up to the first brace, is the reference (kvpress' MATH-500)."""
    return float([part.split("}")[0] for part in answer.split("boxed{")[1:2]] == [references[0]])


def last_boxed(answer: str, references: Sequence[str]) -> float:
    """The same of the last ``boxed{...}``, or of the whole answer if it has none (kvpress' AIME)."""
    return float(answer.rpartition("boxed{")[2].partition("}")[0] == references[0])


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
        contains_all, contains_any, first_number, label, label_published, instructions, first_digits, word, token_f1,
        share_of_numbers, choice, first_boxed, last_boxed,
    )
}
