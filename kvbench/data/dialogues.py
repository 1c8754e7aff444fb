"""Dialogues, documents of turns and an answer: from a data file, or from a synthetic set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.data.files import read_records
from kvbench.data.rows import checked_text, id_of
from kvbench.errors import UserError

SETS = 48
"""Number of documents in a synthetic set."""

_PEOPLE = (
    "Anna", "John", "Mary", "Peter", "Alice", "Henry", "Ruth", "Paul", "Clara", "James", "Lucy", "Robert",
    "Emma", "David", "Jane", "Thomas",
)
_THINGS = (
    "hat", "coat", "door", "boat", "gate", "chair", "book", "curtain", "saddle", "lamp", "ribbon", "wagon", "dress",
    "fence", "basket", "blanket",
)
_COLOURS = ("red", "blue", "green", "black", "white", "yellow")
_KINDS = {
    "bird": ("sparrow", "robin", "eagle", "crow", "swan", "dove", "owl", "hawk"),
    "tree": ("oak", "pine", "elm", "birch", "willow", "ash", "cedar", "maple"),
    "tool": ("hammer", "saw", "axe", "spade", "chisel", "plough", "rake", "knife"),
    "fruit": ("apple", "pear", "plum", "cherry", "peach", "grape", "lemon", "fig"),
}


def read_turns(path: Path) -> list[dict[str, Any]]:
    """Read rows ``{"turns": [...], "answer": "..."}`` of a data file (see :mod:`kvbench.data.files`).

    Raises:
        UserError: the file is missing or malformed, or a row has no turns or no answer.
    """
    rows: list[dict[str, Any]] = []
    for record in read_records(path, ("turns", "answer")):
        turns, answer = record.values.get("turns"), record.values.get("answer")
        said: list[Any] = [*turns, answer] if isinstance(turns, list) and turns else [None]
        if not all(isinstance(turn, str) and turn.strip() for turn in said):
            raise UserError(
                f'{record.where}: the row has no "turns" (texts) and "answer" (text).',
                'Every row must look like {"turns": ["...", "..."], "answer": "..."}.',
            )
        rows.append({
            "id": id_of(record, len(rows)), "turns": [checked_text(turn, f"{record.where}: a turn") for turn in said],
        })
    return rows


def profiles() -> list[dict[str, Any]]:
    """A person who always chooses one colour: twelve choices are shown, and the next is asked for (after LaMP)."""
    rows: list[dict[str, Any]] = []
    for i in range(SETS):
        rng = np.random.default_rng([1, i])
        person, colour = str(rng.choice(_PEOPLE)), str(rng.choice(_COLOURS))
        things = [str(t) for t in rng.permutation(_THINGS)[:13]]
        others = [str(rng.choice([c for c in _COLOURS if c != colour])) for _ in things]
        turns = [
            f"There was a {other} {thing} and a {colour} {thing}. The {thing} of {person} is {colour}."
            for thing, other in zip(things, others, strict=True)
        ]
        query = f"There were many colours of {things[-1]}. The {things[-1]} of {person} is"
        rows.append({"id": f"profile-{i:03d}", "turns": [*turns[:-1], query, colour]})
    return rows


def demonstrations() -> list[dict[str, Any]]:
    """Twelve things of two categories with arbitrary labels are shown; the label of one more is asked for."""
    rows: list[dict[str, Any]] = []
    for i in range(SETS):
        rng = np.random.default_rng([2, i])
        kinds = [str(k) for k in rng.permutation(list(_KINDS))[:2]]
        labels = [str(c) for c in rng.permutation(_COLOURS)[:2]]
        pools = [[str(w) for w in rng.permutation(_KINDS[kind])] for kind in kinds]
        order = [int(s) for s in rng.permutation([0, 1] * 6)]
        shown = [f"The {pools[side].pop()} is {labels[side]}." for side in order]
        side = int(rng.integers(2))
        rows.append({"id": f"task-{i:03d}", "turns": [*shown, f"The {pools[side].pop()} is", labels[side]]})
    return rows


SYNTHETIC: dict[str, Callable[[], list[dict[str, Any]]]] = {"profiles": profiles, "demonstrations": demonstrations}
