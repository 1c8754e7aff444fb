"""Example of a method's attention mask: its layout over a short text, small enough to be stored with a run."""

from __future__ import annotations

from typing import TypedDict

from kvbench.methods.layouts.layout import Layout

LENGTH = 48
"""Text tokens of the example."""

_LETTERS = "rocms"
"""Raw, open, close, memory, sum: a letter for each kind in layout.py, in order."""


class Mask(TypedDict):
    """A mask as text: a letter for the kind of every slot, and for every query a string of 0 and 1 over the slots."""

    kinds: str
    rows: list[str]


def mask_of(layout: Layout) -> Mask:
    """The mask of a layout as text."""
    return {
        "kinds": "".join(_LETTERS[kind] for kind in layout.tokens.kind.tolist()),
        "rows": ["".join("1" if seen else "0" for seen in row) for row in layout.mask.tolist()],
    }
