"""Hidden states and the tokens that followed them, after TRIME (Zhong et al., EMNLP 2022, arXiv 2205.12674)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from torch import Tensor

from kvbench.cache.shape import CacheShape
from kvbench.errors import UserError
from kvbench.methods.budget import kept, ratio_text
from kvbench.methods.layouts.layout import RUNNING, Layout, TextStructure, Tokens, plain_tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

ID_BYTES = 4
"""Bytes of a token id in the memory."""


@dataclass(frozen=True)
class OutputMemory(LayoutMethod):
    """Keeps a window of entries and, for every token read, its last hidden state and the token that followed it.

    The model's prediction p is mixed with one from memory: ``(1 - mix) p + mix softmax(sharpness cos(h_i, h_j))``, the
    weight of each pair j going to the token that followed it. A pair costs a hidden state and an id, a small part of an
    entry, and competes with entries for bytes: the window has ``floor(kept(N, r) - N p / E)`` entries for N pairs of p
    bytes and entries of E bytes, so that window and memory together take the bytes of kept(N, r) entries. The window
    is constant over the text (or the prefix); while text is written, pairs are added.

    This helps with what is repeated and not with what is understood: nothing of the text is attended to outside the
    window. Departures from TRIME, which removes nothing and trains with the memory in its loss: untrained; cosines
    instead of scaled dot products; the two predictions are mixed instead of normalised together. Both
    numbers were chosen on six passages of books.
    """

    name = "output-memory"
    summary = "a window, and every hidden state with the token that followed it: predictions are mixed"
    paper = "after arXiv 2205.12674"
    executions = ("streamed",)

    mix: int = option(10, "per cent of the prediction that comes from memory", least=0, most=99)
    sharpness: int = option(20, "factor of cosines before their softmax", least=1, most=1000)

    window: int | None = field(default=None, kw_only=True)

    def with_budget_for(self, n: int, shape: CacheShape) -> Self:
        """The method with the window that is left for a text of ``n`` tokens when its pairs are paid for."""
        method = super().with_budget_for(n, shape)
        pair = shape.hidden * shape.itemsize + ID_BYTES
        window = (kept(n, method.ratio) * shape.entry_bytes - n * pair) // shape.entry_bytes
        if window < 1:
            raise UserError(
                f"{self.name} at ratio {ratio_text(method.ratio)}: {n} pairs of {pair} bytes leave none "
                f"of the {kept(n, method.ratio)} entries of {shape.entry_bytes} bytes for the window.",
                "Ask for a lower ratio.",
            )
        return replace(method, window=window)

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        size = kept(text.prefix or n, self.ratio) if self.window is None else self.window

        def recent(queries: Tokens, keys: Tokens) -> Tensor:
            return keys.raw >= queries.raw - size

        tokens = plain_tokens(n)
        return Layout(tokens, tokens.raw, recent, n)
