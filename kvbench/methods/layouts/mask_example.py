"""What a method's mask looks like: its layout over a short text, small enough to be kept with a run."""

from __future__ import annotations

from typing import TypedDict

from kvbench.errors import UserError
from kvbench.methods import make_layout
from kvbench.methods.base import Method
from kvbench.methods.layouts.layout import RUNNING, Structure

LENGTH = 48
"""Text tokens of the example."""

_LETTERS = "rocms"
"""Raw, open, close, memory, sum: the kinds of layout.py in their order."""


class Mask(TypedDict):
    """A mask as text: a letter for the kind of every slot, and for every query the slots that it sees."""

    kinds: str
    rows: list[str]


def example_mask(method: Method, seed: int) -> Mask | None:
    """The mask of a method over a short text; None if it cannot be used on one, or has a budget for longer ones."""
    if method.policy is not None or method.budget_given:
        return None
    text = RUNNING
    if method.by_text:  # lines of twelve words, a token each
        text = Structure(words=tuple((i // 12, i % 12, 12) for i in range(LENGTH)))
    try:
        method.check(LENGTH, in_chunks=False)
        layout = make_layout(method, LENGTH, seed, 0, text)
    except UserError:
        return None
    return {
        "kinds": "".join(_LETTERS[kind] for kind in layout.tokens.kind.tolist()),
        "rows": ["".join("1" if seen else "0" for seen in row) for row in layout.mask.tolist()],
    }
