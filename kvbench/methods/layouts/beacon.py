"""Activation Beacon (Zhang et al., ICLR 2025, arXiv 2401.03462)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.budget import kept
from kvbench.methods.layouts.full import Full
from kvbench.methods.layouts.layout import COMP, RUNNING, SUM, TEXT, Layout, MergePlan, TextStructure, Tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

TRAINED_ALPHAS, TRAINED_WINDOWS = (2, 4, 8, 16, 32), (32, 64, 128)
"""Tokens per beacon, and lengths of windows, that training draws from."""


@dataclass(frozen=True)
class Beacon(LayoutMethod):
    """Reads text window by window, with beacons between its tokens, and keeps of each window the beacons only.

    Text and beacons of a window see the memory of earlier windows and everything before them in their own. A beacon
    takes the position of the token after it; beacons are as many as the ratio keeps, so that kept(n, r) entries are
    held at the end of every window, ``sinks`` first tokens among them. There the window's beacons join the memory:
    their keys are rotated anew, to their place in it, and the next window goes on from the memory's size, so that
    positions stay as small as the cache. With ``positions=absolute`` all keys stay where they are.

    Departures: beacons have low-rank pairs of their own on the attention projections, where the published ones have
    copies of the projections; they are trained on 1.28 M tokens.
    """

    name = "beacon"
    summary = "trained beacons between the tokens of a window, which then stay alone"
    paper = "arXiv 2401.03462"
    adapter_kinds = ("gated", "plain", "full")
    position_rule = "cache"

    window: int = option(64, "tokens of text that are read before they are removed", least=8, most=2048)
    sinks: int = option(1, "first tokens that stay", least=0, most=8)
    positions: str = option(
        "cache", "whether a window starts at the memory's size, or keys stay where they are",
        choices=("cache", "absolute"), trained=True,
    )

    @property
    def n_rows(self) -> int:
        return 1

    @property
    def extra_positions(self) -> int:
        return 1

    @property
    def averages_pre_rope(self) -> bool:
        return self.counts_anew

    @property
    def counts_anew(self) -> bool:
        return self.positions == "cache"

    def check(self, longest: int, in_chunks: bool) -> None:
        if self.sinks >= self.window:
            raise UserError(f"--set sinks={self.sinks} leaves nothing of a window of {self.window} tokens.")

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        if not self.ratio:
            return Full().layout(n, rng, text)
        windows = list(text.chunks) or _windows(text.prefix or n, self.window)
        windows += _windows(n - sum(windows), self.window) if text.prefix else []
        return beacon_layout(n, windows, self.ratio, self.sinks, self.positions == "cache")

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        method = cls.from_options(1 - Fraction(1, int(rng.choice(TRAINED_ALPHAS))), options)
        windows = _windows(n, int(rng.choice(TRAINED_WINDOWS)))
        return beacon_layout(n, windows, method.ratio, method.sinks, method.positions == "cache")


def _windows(n: int, window: int) -> list[int]:
    """Lengths of the windows of ``n`` tokens; the last may be shorter."""
    return [window] * (n // window) + ([n % window] if n % window else [])


def beacon_layout(n: int, windows: Sequence[int], ratio: Fraction, sinks: int, renumbers: bool) -> Layout:
    """``n`` tokens in windows (and text behind the last, if any), beacons between them and copies at windows' ends.

    Args:
        renumbers: whether beacons are copied to their place in the memory.
    """
    held = torch.tensor([0, *(max(0, kept(m, ratio) - sinks) for m in range(1, n + 1))])  # beacons after so many tokens
    ends = torch.cumsum(torch.tensor([0, *windows]), 0)
    window_of = torch.searchsorted(ends[1:], torch.arange(n), right=True)
    text = torch.arange(n)
    marked = text[(held[1:] > held[:-1]) & (text < ends[-1])]
    copied = marked if renumbers else marked[:0]
    kind = torch.tensor([TEXT, COMP, SUM]).repeat_interleave(torch.tensor([n, len(marked), len(copied)]))
    raw = torch.cat([text, marked, ends[1:][window_of[copied]] - 1])
    segment = torch.cat([window_of, window_of[marked], window_of[copied]])
    place = torch.cat([torch.full((n + len(marked),), -1), sinks + torch.arange(len(copied))])  # in the memory
    order = torch.argsort(3 * raw + torch.where(kind == SUM, 2, (kind == COMP).long()), stable=True)
    kind, raw, segment, place = kind[order], raw[order], segment[order], place[order]
    tokens = Tokens(torch.arange(len(kind)), kind, raw, segment, torch.where(kind == TEXT, -1, 0))
    begins = ends[segment.clamp(max=len(windows))]
    origin = torch.where(begins > 0, sinks + held[begins], 0) - begins if renumbers else torch.zeros_like(begins)
    position = torch.where(kind == SUM, place, origin + raw + (kind == COMP))
    memory = SUM if renumbers else COMP

    def window_and_memory(queries: Tokens, keys: Tokens) -> Tensor:
        own = keys.segment == queries.segment
        first = (keys.kind == TEXT) & (keys.raw < sinks)
        reads = first | (own & (keys.kind != SUM)) | (~own & (keys.kind == memory))
        return torch.where(queries.kind == SUM, own & (keys.kind == COMP), reads)

    plan = None
    if renumbers:
        slots, sources = tokens.slot[kind == SUM], tokens.slot[kind == COMP]
        plan = MergePlan(slots, sources[:, None], torch.ones(len(slots), 1), unrotated=True)
    end = int(ends[-1])
    after = n - end + (sinks + int(held[end]) if renumbers and end else end)
    return Layout(
        tokens, position, window_and_memory, n, next_segment=len(windows), merge_plan=plan, next_position=after
    )
