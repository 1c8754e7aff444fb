"""LagKV (arXiv 2504.04704): entries that stand out against the window after theirs; LRSA (arXiv 2506.11498), a model
that was trained under its choice."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.base import TRAINED_PERCENT
from kvbench.methods.budget import kept, ratio_text
from kvbench.methods.layouts.layout import Layout
from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy, LayerView

TRAINED_LAGS = (16, 32, 64)
"""Lengths of windows that training draws from."""


@dataclass(frozen=True)
class LagKV(CachePolicy):
    """Splits the entries after the ``sinks`` into windows of ``lag``; each window is scored against the next one.

    Keys and values are min-max scaled per channel, by the minimum and maximum of the next window; an entry's score is
    the standard deviation over its channels, softmaxed over its window, keys and values added. Scores are replaced by
    ranks within the window, so that each window keeps equally many entries. The sinks, the last whole window and the
    entries after it are removed last. Departures: one choice over all windows at every removal, where the published
    code processes each window once; channels that are constant in the next window count as zero.

    With ``passes=once`` each window is processed once, when the next one is whole, as published: of a text of N tokens
    each keeps as many as leave kept(N, r) entries at its end, while the newest windows are whole. Fewer than sinks, a
    window and the tokens after it cannot be kept. Of what is written after it, each window keeps as many as fill the
    cache to kept(n, r), or to the budget in tokens. ``step`` has no meaning then.
    """

    name = "lagkv"
    summary = "the entries that stand out against the next window of keys and values"
    paper = "arXiv 2504.04704"
    executions = ("streamed", "onepass")

    sinks: int = option(4, "first entries that stay")
    lag: int = option(32, "entries of a window", least=2)
    passes: str = option(
        "every", "whether all windows are chosen from at every removal, or each once", choices=("every", "once"),
        later=True,
    )

    @property
    def is_once(self) -> bool:
        return self.passes == "once"

    @property
    def minimum(self) -> int:
        return self.sinks + self.lag if self.is_once else super().minimum

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks)
        if self.is_once and not self.budget_tokens and self._wanted(longest) < self._whole(longest):
            raise UserError(
                f"{self.name} at ratio {ratio_text(self.ratio)} keeps {self._wanted(longest)} of {longest} entries; "
                f"under passes=once {self.sinks} sinks, the last window of {self.lag} and the "
                f"{self._windows(longest)[1]} tokens after it stay.",
                "Give a smaller --ratio, or a smaller --set lag=.",
            )

    def run_length(self, read: int) -> int:
        if not self.is_once:
            return super().run_length(read)
        return self.sinks + self.lag - read if read < self.sinks else self.lag - (read - self.sinks) % self.lag

    def is_due(self, read: int, since: int) -> bool:
        if not self.is_once:
            return super().is_due(read, since)
        windows, after = self._windows(read)
        return windows >= 2 and not after

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        if not self.is_once:
            return super().budget(read, total, layer, layers)
        chosen_from, at_the_end = self._windows(read)[0] - 1, max(0, self._windows(total)[0] - 1)
        if chosen_from < 1:
            return read
        each = Fraction(max(0, self._wanted(total) - self._whole(total)), max(1, at_the_end))
        chosen = int(min(chosen_from, at_the_end) * min(each, Fraction(self.lag)))
        for window in range(at_the_end + 1, chosen_from + 1):  # of text after the first ``total`` tokens
            end = self.sinks + (window + 1) * self.lag
            chosen += min(self.lag, max(0, self._wanted(end) - self._whole(end) - chosen))
        return self._whole(read) + chosen

    def _windows(self, read: int) -> tuple[int, int]:
        """How many windows are whole after ``read`` tokens, and the tokens after them."""
        return divmod(max(0, read - self.sinks), self.lag)

    def _whole(self, read: int) -> int:
        """Entries that have not been chosen from: sinks, the last whole window, and the tokens after it."""
        return min(read, self.sinks + self.lag + self._windows(read)[1])

    def _wanted(self, total: int) -> int:
        return min(total, self.budget_tokens) if self.budget_tokens else kept(total, self.ratio)

    def scores(self, view: LayerView) -> Tensor:
        sinks, lag, n = self.sinks, self.lag, view.entries
        windows = max(0, n - sinks) // lag
        recent = torch.arange(n, device=view.keys.device).float()
        scores = (2 + recent).expand(view.keys.shape[:3]).clone()  # above all ranks; later entries score higher
        scores[..., :sinks] = float("inf")
        start, stop = sinks, sinks + windows * lag
        if self.is_once:
            start, stop = self._unchosen(view)
            scores[..., :start] = float("inf")
        if stop - start < 2 * lag:
            return scores
        parts = [
            tensor[:, :, start:stop].float().reshape(*tensor.shape[:2], -1, lag, tensor.shape[-1])
            for tensor in (view.keys, view.values)
        ]
        worth = sum((_deviation(part) for part in parts), torch.zeros((), device=recent.device))
        ranks = worth.argsort(-1).argsort(-1).float() / lag
        scores[:, :, start : stop - lag] = ranks.flatten(2)
        return scores

    def _unchosen(self, view: LayerView) -> tuple[int, int]:
        """Where the windows begin and end that have not been chosen from; they are whole."""
        windows, after = self._windows(int(view.positions[0, 0, -1]) + 1)
        first = max(0, self._windows(view.removed_at)[0] - 1)
        stop = view.entries - after
        return stop - (windows - first) * self.lag, stop


@dataclass(frozen=True)
class LagKVTuned(LagKV):
    """``lagkv`` with ``passes=once`` under a LoRA trained so, after LRSA (arXiv 2506.11498).

    Text is read window by window, prefixes too (``prefill=blocks``). Training reads a text in one pass, in which every
    layer makes its mask from its own keys and values, with windows of 16, 32 and 64; gradients flow through what is
    kept, and not through the choice. Departures: a LoRA, or all weights with ``adapter=full``, on 1.28 M tokens; LRSA
    goes on training a model for long texts, with a set-up that is not public.
    """

    name = "lagkv-tuned"
    summary = "the same with each window chosen from once, with a LoRA trained so"
    paper = "arXiv 2506.11498"
    adapter_kinds = ("plain", "full")

    lag: int = option(16, "entries of a window", least=2)
    passes: str = option(
        "once", "whether all windows are chosen from at every removal, or each once", choices=("every", "once"),
        trained=True,
    )
    prefill: str = option(
        "blocks", "whether a context is compressed when it has been read, or after every step",
        choices=("once", "blocks"),
    )

    @classmethod
    def training_sample(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout | CachePolicy:
        lag = int(rng.choice([lag for lag in TRAINED_LAGS if lag < n // 2] or [2]))
        policy = cls.from_options(Fraction(0), {**options, "lag": str(lag)})
        low, high = TRAINED_PERCENT
        most = 100 * (n - policy._whole(n)) // n
        percent = int(rng.integers(low, max(low, min(high, most)), endpoint=True))
        return cls.from_options(Fraction(percent, 100), {**options, "lag": str(lag)})


def _deviation(windows: Tensor) -> Tensor:
    """Scores ``[batch, heads, windows - 1, lag]`` of windows ``[batch, heads, windows, lag, width]``."""
    least, most = windows[:, :, 1:].amin(-2, keepdim=True), windows[:, :, 1:].amax(-2, keepdim=True)
    span = most - least
    scaled = torch.where(span > 0, (windows[:, :, :-1] - least) / span, torch.zeros_like(windows[:, :, :-1]))
    return scaled.std(-1).softmax(-1)
