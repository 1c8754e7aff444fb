"""UniGist (arXiv 2509.15763): a gist after every few tokens, a window of text, and learnt sinks."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.budget import kept, ratio_text
from kvbench.methods.layouts.full import Full
from kvbench.methods.layouts.layout import COMP, OPEN, RUNNING, TEXT, Layout, TextStructure, Tokens, plain_tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

SINKS = 4
"""Learnt sinks of the shipped adapters."""
TRAINED_EVERY, TRAINED_WINDOWS = (2, 4, 8, 16, 32), (32, 64, 128)
"""Distances of gists and lengths of windows that training draws from."""


@dataclass(frozen=True)
class UniGist(LayoutMethod):
    """Keeps learnt sinks, a gist for every few tokens, and a window of text: kept(N, r) entries after a block of N.

    A gist is a trained token after every g tokens of text. Text and gists see the sinks, all earlier gists and the
    window, so that no chunk has an end at which what is visible changes at once. A gist takes the position of the next
    token; text is numbered as if there were no gists. Gists are as close as possible (g is the smallest number for
    which ``window`` tokens of text are left) and the window takes what remains of the entries; both follow from the
    length of the block, or of the prefix. In short pieces, which have no room for them, there are no gists.

    Departures: the window is counted in tokens, where UniGist's ends with whole units of g tokens; UniGist trains all
    weights on 16 B tokens (``unigist-tuned``, with far fewer), here the base model is left as it is and gists and sinks
    have an adapter; published are 128 sinks and a window of 128 tokens, for 32 K. No code was found.
    """

    name = "unigist"
    summary = "learnt sinks, a trained gist after every few tokens, and a window of text"
    paper = "arXiv 2509.15763"
    adapter_kinds: ClassVar[tuple[str, ...]] = ("gated", "plain", "full")
    position_rule = "shared"

    sinks: int = option(SINKS, "learnt first entries", least=0, most=32, trained=True)
    window: int = option(32, "the least tokens of text that stay", least=1)

    @property
    def n_rows(self) -> int:
        return 1 + self.sinks

    @property
    def extra_positions(self) -> int:
        return 1 + self.sinks

    @property
    def minimum(self) -> int:
        return self.sinks + self.window

    def check(self, longest: int, in_chunks: bool) -> None:
        held = kept(longest, self.ratio)
        if self.ratio and held < self.minimum:
            raise UserError(
                f"{self.name} at ratio {ratio_text(self.ratio)} keeps {held} of {longest} tokens, and needs "
                f"{self.sinks} sinks and a window of {self.window}.",
                "Ask for a lower ratio, or a smaller --set window=.",
            )

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if not self.ratio:
            return Full().layout(n, rng, text)
        length = text.prefix or n
        held = kept(length, self.ratio) - self.sinks
        room = max(0, held - self.window)  # for gists
        every = length // (room + 1) + 1
        return gist_layout(n, self.sinks, every, max(1, held - length // every))

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        sinks = cls.from_options(Fraction(0), options).sinks
        return gist_layout(n, sinks, int(rng.choice(TRAINED_EVERY)), int(rng.choice(TRAINED_WINDOWS)))


@dataclass(frozen=True)
class UniGistTuned(UniGist):
    """``unigist`` with all weights trained, as published, but on far fewer tokens."""

    name = "unigist-tuned"
    summary = "the same, with all weights trained"
    adapter_kinds = ("full", "plain")


def gist_layout(n: int, sinks: int, every: int, window: int) -> Layout:
    """Sinks, then ``n`` tokens of text with a gist after each ``every`` of them, and a window of text.

    After n tokens ``sinks + n // every + min(n, window)`` entries are held.
    """
    gists = n // every
    text = plain_tokens(n)
    raw = torch.cat([torch.full((sinks,), -1), text.raw, torch.arange(1, gists + 1) * every - 1])
    kind = torch.tensor([OPEN, TEXT, COMP]).repeat_interleave(torch.tensor([sinks, n, gists]))
    row = torch.cat([torch.arange(1, sinks + 1), text.row, torch.zeros(gists, dtype=torch.long)])
    order = torch.argsort(2 * raw + (kind == COMP), stable=True)  # a gist follows the token that it is numbered by
    kind, raw, row = kind[order], raw[order], row[order]
    tokens = Tokens(torch.arange(len(kind)), kind, raw, torch.full_like(kind, text.segment[0].item()), row)
    position = torch.where(kind == OPEN, row - 1, sinks + raw + (kind == COMP))

    def gists_and_recent(queries: Tokens, keys: Tokens) -> Tensor:
        read = queries.raw + (queries.kind == COMP)  # a gist counts the token before it to its window
        return (keys.kind != TEXT) | (keys.raw >= read - window)

    return Layout(tokens, position, gists_and_recent, n, next_position=sinks + n)
