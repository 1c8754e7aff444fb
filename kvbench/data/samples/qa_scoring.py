"""Scoring rules of published data sets of questions: LongBench, SCBench, InfiniteBench."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from kvbench.errors import UserError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def qa_f1(answer: str, references: Sequence[str]) -> float:
    """F1 over the bag of words, without case, punctuation and articles; the best of the references (SQuAD)."""
    return max(_f1(_words(answer), _words(reference)) for reference in references)


def _words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    same = sum((Counter(said) & Counter(right)).values())
    return 2 * same / (len(said) + len(right)) if same else 0.0


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L of the package ``rouge``, the best of the references (LongBench); 0 for an answer without words.

    Raises:
        UserError: the package is not installed.
    """
    try:
        from rouge import Rouge
    except ImportError:
        raise UserError(
            "LongBench's ROUGE-L is that of the package rouge, which is not here.",
            'Install it: pip install "kvbench[longbench]"',
        ) from None
    rouge = Rouge(metrics=["rouge-l"], stats=["f"])
    found = [0.0]
    for reference in references:
        try:
            found.append(float(rouge.get_scores(answer, reference)[0]["rouge-l"]["f"]))
        except (ValueError, RecursionError):  # no words, or a text that it cannot process: 0, as published
            continue
    return max(found)


def rouge_lsum(answer: str, references: Sequence[str]) -> float:
    """ROUGE-Lsum of the package ``rouge-score``, the best of the references (SCBench, InfiniteBench)."""
    return max(float(_rouge_score().score(reference, answer)["rougeLsum"].fmeasure) for reference in references)


@cache
def _rouge_score() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"])


def classification(answer: str, references: Sequence[str]) -> float:
    """1 / n if the first reference is among the n classes that the answer names; the others are all other classes.

    Classes whose name is part of the right one's do not count (LongBench).
    """
    right = references[0]
    named = [one for one in dict.fromkeys(references) if one in answer and (one == right or one not in right)]
    return 1 / len(named) if right in named else 0.0


def number_share(answer: str, references: Sequence[str]) -> float:
    """Share of the numbers in the answer that are the first number of a reference, the best of them (LongBench)."""
    said = re.findall(r"\d+", answer)
    right = [found[0] for reference in references if (found := re.search(r"\d+", reference))]
    return max((said.count(one) / len(said) for one in right), default=0.0) if said else 0.0


def code_similarity(answer: str, references: Sequence[str]) -> float:
    """Similarity, in whole per cent, of the first line without comment or code fence (LongBench, as by ``fuzzywuzzy``
    without its compiled part)."""
    lines = answer.lstrip("\n").split("\n")
    line = next((one for one in lines if not any(mark in one for mark in ("`", "#", "//"))), "")
    if not line:
        return 0.0
    return max(round(100 * SequenceMatcher(None, line, reference).ratio()) / 100 for reference in references)


def choice_sentence(answer: str, references: Sequence[str]) -> float:
    """Whether the answer says ``The correct answer is (X)`` with the right letter (LongBench v2)."""
    plain, said = answer.replace("*", ""), "The correct answer is "
    found = re.search(rf"{said}\(([A-D])\)", plain) or re.search(f"{said}([A-D])", plain)
    return float(found is not None and found[1] in references)


def choice_letter(answer: str, references: Sequence[str]) -> float:
    """Whether the letter chosen is right: that at the beginning, else what follows ``answer is``, else the first from A
    to D that stands alone (InfiniteBench). The text of the right option counts as well.

    The published rule takes any text that begins with such a letter for a choice, so that ``Anna`` is A.
    """
    text = answer.strip()
    chosen = re.match(r"[A-D]\b", text)
    if chosen is not None:
        return float(chosen[0] in references)
    if text in references:
        return 1.0
    words = re.sub(r"[\n\"'.,?!{}]", " ", text)
    said = re.search(r"(?:answer is:|answer:|answer is|option is)\s*(.*)", words)
    if said is not None:
        return float(any(said[1].startswith(one) for one in references))
    alone = next((word for word in words.split() if word in ("A", "B", "C", "D")), None)
    return float(alone in references)


def first_value(answer: str, references: Sequence[str]) -> float:
    """Whether the first number in the answer, which may have a fraction, is the reference."""
    found = re.search(r"\d+\.\d+|\d+", answer)
    return float(found is not None and float(found[0]) == float(references[0]))


def last_number(answer: str, references: Sequence[str]) -> float:
    """Whether the last word of the answer is the reference, a whole number (InfiniteBench, results of code)."""
    words = re.sub(r"[\n.`'\":]", " ", answer).split()
    is_number = bool(words) and re.fullmatch(r"[+-]?\d+", words[-1]) is not None
    return float(is_number and int(words[-1]) == int(references[0]))


def contains_exactly(answer: str, references: Sequence[str]) -> float:
    """Whether the answer contains a reference, in the same case (SCBench, values)."""
    return float(any(reference in answer for reference in references))


def first_digits(answer: str, references: Sequence[str]) -> float:
    """Whether the first run of digits is the reference, digit by digit (InfiniteBench's pass keys and numbers)."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found[0] == references[0])


def word(answer: str, references: Sequence[str]) -> float:
    """Whether the reference is one of the words, which blanks, quotes, braces, and marks of sentences end
    (InfiniteBench's key-value retrieval)."""
    return float(references[0] in re.split(r"[\s:\"'.,?!{}]+", answer))


def first_boxed(answer: str, references: Sequence[str]) -> float:
    """Whether what the first ``boxed{...}`` holds, up to the first brace, is the reference (kvpress' MATH-500)."""
    return float([part.split("}")[0] for part in answer.split("boxed{")[1:2]] == [references[0]])


def last_boxed(answer: str, references: Sequence[str]) -> float:
    """The same of the last ``boxed{...}``, or of the whole answer if it has none (kvpress' AIME)."""
    return float(answer.rpartition("boxed{")[2].partition("}")[0] == references[0])


QA_SCORING = (
    qa_f1, rouge_l, rouge_lsum, classification, number_share, code_similarity, choice_sentence, choice_letter,
    first_value, last_number, contains_exactly, first_digits, word, first_boxed, last_boxed,
)

NUMBERS = {"first_number": int, "last_number": int, "first_value": float}
"""Rules whose first reference must be a number, and its kind."""
