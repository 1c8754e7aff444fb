"""Rules that score answers, on answers scored by hand."""

from __future__ import annotations

import pytest

from kvbench.data.samples.scoring import SCORING


def test_rules_are_the_published_ones() -> None:
    for rule, answer, references, score in (
        ("first_digits", " 0123.", ["0123"], 1), ("first_digits", "1, 123", ["123"], 0),
        ("word", 'The "00a-1".', ["00a-1"], 1), ("word", "x00a-1", ["00a-1"], 0),
        ("qa_f1", "The old mill", ["a mill", "otter"], 2 / 3), ("qa_f1", "", ["x"], 0),
        ("number_share", "Paragraph 3 or 4", ["Paragraph 3"], 0.5), ("number_share", "none", ["3"], 0),
        ("choice_sentence", "**The correct answer is (B)**", ["B"], 1), ("choice_sentence", "(B)", ["B"], 0),
        ("first_boxed", r"\boxed{7} \boxed{8}", ["7"], 1), ("first_boxed", "7", ["7"], 0),
        ("last_boxed", r"\boxed{7} \boxed{8}", ["8"], 1),
    ):
        assert SCORING[rule](answer, references) == pytest.approx(score), (rule, answer)
