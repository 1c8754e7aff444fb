"""Compression methods: one idea, one file; the table of names below is all there is to register."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np

from kvbench.errors import unknown
from kvbench.methods.base import Method, Option, kept, parse_ratio, ratio_text
from kvbench.methods.full import Adapted, Full, NoContext
from kvbench.methods.layout import RUNNING, Layout, Structure
from kvbench.methods.memory import CcmConcat, CcmMerge, Gist, MeanPool, Pic
from kvbench.methods.scattered import Scattered, ScatteredTuned
from kvbench.methods.sentinel import Sentinel
from kvbench.methods.windows import Local, LocalTuned, Sinks, SinksTuned, Window

LAYOUT_IDS = 16

METHODS: dict[str, type[Method]] = {
    kind.name: kind for kind in (
        Full, NoContext, Window, Sinks, Local, Scattered, Sentinel, CcmConcat, CcmMerge, Gist, MeanPool, Pic,
        LocalTuned, ScatteredTuned, SinksTuned, Adapted,
    )
}


def make_method(name: str, ratio: Fraction, options: dict[str, str] | None = None) -> Method:
    """The method of that name; options that it does not know are ignored here (the plan checks)."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind = METHODS[name]
    mine = {k: v for k, v in (options or {}).items() if k in kind.known}
    return kind(ratio if kind.takes_ratio else Fraction(0), mine)


def layout_id(document: str, block: int) -> int:
    """Which of the 16 layouts a block gets: the same for all methods, whatever the batch."""
    digest = hashlib.sha256(f"{document}\0{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % LAYOUT_IDS


def make_layout(method: Method, n: int, seed: int, which: int, text: Structure = RUNNING) -> Layout:
    """The layout of a block: a function of (seed, n, ratio, id) and of the text's own structure."""
    ratio = method.ratio
    rng = np.random.default_rng([seed, n, ratio.numerator, ratio.denominator, which])
    return method.layout(n, rng, text)


__all__ = [
    "LAYOUT_IDS", "METHODS", "RUNNING", "Layout", "Method", "Option", "Structure", "kept", "layout_id",
    "make_layout", "make_method", "parse_ratio", "ratio_text",
]
