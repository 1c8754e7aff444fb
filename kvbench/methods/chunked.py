"""Memory that is made chunk by chunk: the Compressed Context Memory and its relatives.

The text comes in chunks (turns of a dialogue, or equal runs of tokens). When a chunk has been
read, a few entries are made of it and the chunk itself leaves the cache. The methods differ in who
sees the memory while it is made, and in whether memories are kept side by side or merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.base import Method, Option, ratio_text
from kvbench.methods.layout import COMP, RAW, RUNNING, SUM, Layout, Mixture, Structure, Tokens
from kvbench.methods.streaming import STREAMING, budget_layout, check_budget

SHORTEST, LONGEST = 8, 128
"""Bounds on the tokens of a chunk of running text."""

_N_COMP = Option("2", least=1, most=32, trained=True)
_TRUTH = ("true", "false")


def chunk_length(method: Method, n_comp: int) -> int:
    """Tokens of a chunk that keeps ``n_comp`` entries at the method's ratio: round(n / (1 - r)).

    Raises:
        UserError: outside 8 to 128.
    """
    chunk = math.floor(Fraction(n_comp) / (1 - method.ratio) + Fraction(1, 2))
    if not SHORTEST <= chunk <= LONGEST:
        low, high = (float(1 - Fraction(n_comp, c)) for c in (SHORTEST, LONGEST))
        reach = f"between {max(low, 0):.3g} and {high:.3g}" if low < high else f"below {high:.3g}"
        raise UserError(
            f"{method.name} at ratio {ratio_text(method.ratio)} with n_comp={n_comp} needs chunks of {chunk} "
            f"tokens, and they have {SHORTEST} to {LONGEST}.",
            f"Ask for a ratio {reach}, or another --set n_comp=.",
        )
    return chunk


def equal_chunks(n: int, chunk: int, n_comp: int) -> list[int]:
    """Chunks of ``n`` tokens of running text; a shorter last one if closing it saves entries."""
    lengths = [chunk] * (n // chunk)
    if n % chunk > n_comp:
        lengths.append(n % chunk)
    return lengths


@dataclass(frozen=True)
class Who:
    """Who sees the memory, for ``chunks`` chunks; the text after them always does.

    Attributes:
        text: the text of the chunks.
        memory: the tokens that the memory is made with.
        latest: only the latest chunk's entries are memory: they stand for all before them.
        kind: kind of the entries that are memory.
    """

    chunks: int
    text: bool
    memory: bool
    latest: bool
    kind: int

    def __call__(self, queries: Tokens, keys: Tokens) -> Tensor:
        own = keys.unit == queries.unit
        before = keys.unit == queries.unit - 1
        memory = (keys.kind == self.kind) & (before if self.latest else ~own)
        after = queries.unit == self.chunks
        is_text, is_sum = queries.kind == RAW, queries.kind == SUM
        sees = after | (is_text & self.text) | ((queries.kind == COMP) & self.memory) | (is_sum & before)
        own_kinds = (keys.kind == RAW) | ((keys.kind == COMP) & ~is_text)
        return (own & own_kinds) | (memory & sees)


def chunk_layout(n: int, chunks: Sequence[int], n_comp: int, who: Who, mixture: Merge | Pool | None) -> Layout:
    """The sequence chunk, its memory tokens, chunk, ... and the rest of the text, raw.

    Memory tokens are numbered on from the last token of their chunk, and the text as if they did
    not exist.
    """
    after = n - sum(chunks)
    special = [] if isinstance(mixture, Pool) else [COMP]
    special += [] if mixture is None else [SUM]
    runs: list[tuple[int, int, int]] = []  # (kind, unit, how many)
    for chunk, length in enumerate(chunks):
        runs.append((RAW, chunk, length))
        runs += [(made, chunk, n_comp) for made in special]
    runs.append((RAW, len(chunks), after))
    counts = torch.tensor([count for _, _, count in runs])
    kind, unit = (
        torch.repeat_interleave(torch.tensor([run[i] for run in runs]), counts) for i in (0, 1)
    )
    raw = torch.clamp(torch.cumsum(kind == RAW, 0) - 1, min=0)
    slot = torch.arange(len(kind))
    begins = torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
    row = torch.where(kind == RAW, -1, slot - begins)
    position = raw + row + 1
    tokens = Tokens(slot, kind, raw, unit, row)
    return Layout(
        tokens, position, who, n, next_unit=len(chunks),
        mixture=None if mixture is None else mixture.of(tokens, list(chunks), n_comp),
    )


@dataclass(frozen=True)
class Merge:
    """``SUM_t = (1 - a_t) SUM_(t-1) + a_t COMP_t``: a mean (a_t = 1/t) or an average that forgets (1/2)."""

    ema: bool
    unrotated: bool

    def of(self, tokens: Tokens, chunks: list[int], n_comp: int) -> Mixture:
        slots = tokens.slot[tokens.kind == SUM].view(-1, n_comp)
        fresh = tokens.slot[tokens.kind == COMP].view(-1, n_comp)
        before = torch.cat([fresh[:1], slots[:-1]])
        step = torch.arange(1, len(slots) + 1, dtype=torch.float32)
        share = torch.full_like(step, 0.5) if self.ema else 1 / step
        share[:1] = 1.0
        weights = torch.stack([1 - share, share], -1)[:, None].expand(-1, n_comp, -1)
        sources = torch.stack([before, fresh], -1)
        return Mixture(slots.flatten(), sources.flatten(0, 1), weights.flatten(0, 1), self.unrotated)


@dataclass(frozen=True)
class Pool:
    """Each memory entry is the mean of one of ``n_comp`` equal runs of its chunk's tokens."""

    unrotated: bool

    def of(self, tokens: Tokens, chunks: list[int], n_comp: int) -> Mixture:
        slots = tokens.slot[tokens.kind == SUM]
        first_of = torch.nonzero(tokens.kind == RAW).flatten()
        sources, weights, begin = [], [], 0
        widest = max((-(-length // n_comp) for length in chunks), default=1)
        for length in chunks:
            edges = [begin + length * k // n_comp for k in range(n_comp + 1)]
            for first, last in pairwise(edges):
                start = min(first, begin + length - 1)  # a chunk may have fewer tokens than entries
                run = first_of[start : max(last, start + 1)]
                sources.append(torch.nn.functional.pad(run, (0, widest - len(run)), value=int(run[0])))
                weights.append(torch.nn.functional.pad(torch.full((len(run),), 1 / len(run)), (0, widest - len(run))))
            begin += length
        if not sources:
            return Mixture(slots, slots[:, None], torch.ones(0, 1), self.unrotated)
        return Mixture(slots, torch.stack(sources), torch.stack(weights), self.unrotated)


@dataclass(frozen=True)
class Chunked(Method):
    """What the methods of this file share: the ratio sets the chunk, options set the rest."""

    position_rule = "shared"

    @classmethod
    def uses_ratio(cls, options: Mapping[str, str], in_chunks: bool) -> bool:
        return cls.takes_ratio and not in_chunks and options.get("budget", "0") == "0"

    @property
    def n_comp(self) -> int:
        return self.number("n_comp")

    @property
    def n_rows(self) -> int:
        return self.n_comp if self.needs_adapter else 0

    def chunk(self) -> int:
        """Tokens of a chunk of running text."""
        return chunk_length(self, self.n_comp)

    @property
    def streams(self) -> bool:
        """Whether the cache has a budget (see :mod:`kvbench.methods.streaming`)."""
        return "budget" in self.known and self.number("budget") > 0

    @property
    def resolved(self) -> dict[str, str]:
        return {k: v for k, v in super().resolved.items() if self.streams or k not in STREAMING}

    def check(self, longest: int, in_chunks: bool) -> None:
        if in_chunks:
            return
        if self.streams:
            check_budget(self, self.n_comp)
        elif self.chunk() > longest:
            raise UserError(
                f"{self.name}: a chunk of {self.chunk()} tokens does not fit in {longest} tokens of text.",
                "Ask for a lower ratio or a shorter chunk, or use longer blocks.",
            )

    def who(self, chunks: int) -> Who:
        return Who(chunks, text=True, memory=True, latest=False, kind=COMP)

    def mixture(self) -> Merge | Pool | None:
        return None

    def layout(self, n: int, rng: np.random.Generator, text: Structure = RUNNING) -> Layout:
        if self.streams and not text.chunks:
            return budget_layout(self, n, self.n_comp, self.mixture())
        chunks = list(text.chunks) or equal_chunks(n, self.chunk(), self.n_comp)
        return chunk_layout(n, chunks, self.n_comp, self.who(len(chunks)), self.mixture())

    @classmethod
    def drawn(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """Chunks of one length, drawn evenly on a logarithmic scale; now and then the rest stays raw."""
        method = cls(Fraction(0), options)
        length = round(float(np.exp(rng.uniform(np.log(SHORTEST), np.log(min(LONGEST, n // 2))))))
        compressed = n if rng.random() < 0.75 else int(rng.integers(length, n))
        if options.get("recurrent") == "false":  # the memory is only seen by the text after the chunks
            compressed = int(rng.integers(n // 4, 3 * n // 4))
        chunks = equal_chunks(compressed, length, method.n_comp)
        return chunk_layout(n, chunks, method.n_comp, method.who(len(chunks)), method.mixture())


@dataclass(frozen=True)
class CcmConcat(Chunked):
    """Compressed Context Memory, kept side by side: ``n_comp`` entries for every chunk.

    COMP tokens after a chunk see it, the memory of earlier chunks, and each other; their keys and
    values are the chunk's memory. With ``recurrent=false`` the text of a chunk and its COMP tokens
    see that chunk only, and just what follows the chunks reads the memory.

    Departures from the released code: the loss is on all text (each chunk given the memory of
    those before it) instead of on answers only; chunks of running text are set by the ratio.
    ``budget=160`` gives the published streaming form, with absolute positions.
    """

    name = "ccm-concat"
    summary = "a few trained memory entries per chunk, side by side"
    paper = "arXiv 2312.03414"
    needs_adapter = True
    trainable = ("gated", "plain", "full")
    known = {"n_comp": _N_COMP, "recurrent": Option("true", _TRUTH, trained=True), **STREAMING}

    def who(self, chunks: int) -> Who:
        recurrent = self.option("recurrent") == "true"
        return Who(chunks, text=recurrent, memory=recurrent, latest=False, kind=COMP)


@dataclass(frozen=True)
class CcmMerge(Chunked):
    """Compressed Context Memory, merged: ``n_comp`` entries in all, whatever was read.

    After each chunk the memory becomes the mean of all chunks' COMP entries (``merge=mean``) or
    half old and half new (``merge=ema``). Keys are averaged as they are in the cache, each rotated
    to its own place, as published, or before the rotation (``merge_at=unrotated``). SUM tokens
    are the addresses that merged entries are written to; nothing reads what the model computes
    there. Values are merged from values, also in the streaming form.
    """

    name = "ccm-merge"
    summary = "a few trained memory entries in all, merged after every chunk"
    paper = "arXiv 2312.03414"
    takes_ratio = False
    needs_adapter = True
    trainable = ("gated", "plain", "full")
    known = {
        "n_comp": _N_COMP, "recurrent": Option("true", _TRUTH, trained=True),
        "merge": Option("mean", ("mean", "ema"), trained=True),
        "merge_at": Option("rotated", ("rotated", "unrotated"), trained=True),
        "segment": Option("64", least=SHORTEST, most=LONGEST), **STREAMING,
    }

    def chunk(self) -> int:
        return self.number("segment")

    def who(self, chunks: int) -> Who:
        recurrent = self.option("recurrent") == "true"
        return Who(chunks, text=recurrent, memory=recurrent, latest=True, kind=SUM)

    def mixture(self) -> Merge:
        return Merge(self.option("merge") == "ema", self.option("merge_at") == "unrotated")


@dataclass(frozen=True)
class Gist(Chunked):
    """Gist tokens (arXiv 2304.08467), trained on one context at a time.

    ``mode=online`` compresses every chunk by itself and keeps all gists side by side, which is
    not what they were trained for. ``mode=fixed`` reads the whole context and compresses it once
    at its end. Departures: the base model is frozen and the gist tokens have an adapter; their
    number of rows is ``n_comp``, not one row repeated.
    """

    name = "gist"
    summary = "gist tokens, trained on one context at a time, used chunk by chunk"
    paper = "arXiv 2304.08467"
    needs_adapter = True
    trainable = ("gated", "plain", "full")
    known = {"n_comp": _N_COMP, "mode": Option("online", ("online", "fixed"))}

    def who(self, chunks: int) -> Who:
        return Who(chunks, text=True, memory=False, latest=False, kind=COMP)

    @classmethod
    def uses_ratio(cls, options: Mapping[str, str], in_chunks: bool) -> bool:
        return not in_chunks and options.get("mode") != "fixed"

    def check(self, longest: int, in_chunks: bool) -> None:
        super().check(longest, in_chunks or self.option("mode") == "fixed")

    def layout(self, n: int, rng: np.random.Generator, text: Structure = RUNNING) -> Layout:
        if self.option("mode") == "fixed":
            return chunk_layout(n, [n], self.n_comp, self.who(1), None)
        return super().layout(n, rng, text)

    @classmethod
    def drawn(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        method = cls(Fraction(0), options)
        length = round(float(np.exp(rng.uniform(np.log(SHORTEST), np.log(3 * n // 4)))))
        return chunk_layout(n, [length], method.n_comp, method.who(1), None)


@dataclass(frozen=True)
class MeanPool(Chunked):
    """Each memory entry is the mean of the keys and values of a run of its chunk's tokens; no parameters.

    Keys are averaged as they are in the cache, or before the rotation (``merge_at=unrotated``).
    """

    name = "meanpool"
    summary = "the mean of the entries of each run of a chunk: no parameters"
    known = {"n_comp": Option("2", least=1, most=32), "merge_at": Option("rotated", ("rotated", "unrotated"))}

    def who(self, chunks: int) -> Who:
        return Who(chunks, text=True, memory=True, latest=False, kind=SUM)

    def mixture(self) -> Pool:
        return Pool(self.option("merge_at") == "unrotated")


@dataclass(frozen=True)
class Pic(Chunked):
    """Memory tokens that each see their own chunk only, after PIC (arXiv 2602.13980).

    The abstract leaves open whether they also see earlier memory: ``sees=memory``.
    """

    name = "pic"
    summary = "memory entries whose tokens see their own chunk only"
    paper = "after arXiv 2602.13980"
    needs_adapter = True
    trainable = ("gated", "plain", "full")
    known = {"n_comp": _N_COMP, "sees": Option("chunk", ("chunk", "memory"), trained=True)}

    def who(self, chunks: int) -> Who:
        return Who(chunks, text=True, memory=self.option("sees") == "memory", latest=False, kind=COMP)
