"""The base class of methods whose layout is known before the text is read."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np

from kvbench.errors import UserError
from kvbench.methods.base import TRAINED_PERCENT, Method
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure
from kvbench.methods.layouts.mask_example import LENGTH, Mask, mask_of

LAYOUT_IDS = 16


@dataclass(frozen=True)
class LayoutMethod(Method):
    """A method that is described by a layout: which token may see which entry, and until when."""

    executions: ClassVar[tuple[str, ...]] = ("streamed", "onepass")

    @abstractmethod
    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        """The layout of a block of ``n`` text tokens.

        Args:
            rng: used by seeded methods only.
            text: what is known of the text besides its length.

        Raises:
            UserError: the method cannot reach the ratio on ``n`` tokens.
        """

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """A layout to train on, at a random ratio, so that one adapter serves all ratios."""
        percent = int(rng.integers(*TRAINED_PERCENT, endpoint=True))
        return cls.from_options(Fraction(percent, 100), options).layout(n, rng)

    def check_text(self, n: int, prefix: int, seed: int) -> None:
        make_layout(self, n, seed, 0, TextStructure(prefix=prefix))

    def mask_example(self, seed: int) -> Mask | None:
        """The mask over a short text; None if the method cannot be used on one, or has a budget for longer ones."""
        text = RUNNING
        if self.depends_on_words:  # lines of twelve words, a token each
            text = TextStructure(words=tuple((i // 12, i % 12, 12) for i in range(LENGTH)))
        try:
            self.check(LENGTH, in_chunks=False)
            return None if self.budget_given else mask_of(make_layout(self, LENGTH, seed, 0, text))
        except UserError:
            return None


def layout_id(document: str, block: int) -> int:
    """Which of the 16 random layouts a block gets: the same for all methods and batches."""
    digest = hashlib.sha256(f"{document}\0{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % LAYOUT_IDS


def make_layout(method: LayoutMethod, n: int, seed: int, which: int, text: TextStructure = RUNNING) -> Layout:
    """The layout of a block: a function of (seed, n, ratio, layout id) and of the text's structure."""
    ratio = method.ratio
    rng = np.random.default_rng([seed, n, ratio.numerator, ratio.denominator, which])
    return method.layout(n, rng, text)
