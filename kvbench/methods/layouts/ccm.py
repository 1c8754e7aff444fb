"""Memory that is made chunk by chunk: the Compressed Context Memory and its relatives.

The text comes in chunks (turns of a dialogue, or equal runs of tokens). When a chunk has been
read, a few entries are made of it and the chunk itself leaves the cache. The methods differ in who
sees the memory while it is made, and in whether memories are kept side by side or merged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kvbench.errors import UserError
from kvbench.methods.base import Method, Option, ratio_text
from kvbench.methods.layouts.ccm_budget import STREAMING, budget_layout, check_budget, refuse_budget
from kvbench.methods.layouts.chunked import Merge, Pool, Who, chunk_layout, equal_chunks
from kvbench.methods.layouts.layout import COMP, RUNNING, SUM, Layout, Structure
from kvbench.methods.layouts.method import LayoutMethod

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


@dataclass(frozen=True)
class Chunked(LayoutMethod):
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

    @property
    def places_after(self) -> int:
        return self.n_rows

    def chunk(self) -> int:
        """Tokens of a chunk of running text."""
        return chunk_length(self, self.n_comp)

    @property
    def streams(self) -> bool:
        """Whether the cache has a budget (see :mod:`kvbench.methods.layouts.ccm_budget`)."""
        return "budget" in self.known and self.number("budget") > 0

    @property
    def resolved(self) -> dict[str, str]:
        return {k: v for k, v in super().resolved.items() if self.streams or k not in STREAMING}

    def check(self, longest: int, in_chunks: bool) -> None:
        if in_chunks:
            refuse_budget(self)
            return
        if self.streams:
            check_budget(self, self.n_comp)
        elif self.chunk() > longest:
            raise UserError(
                f"{self.name}: a chunk of {self.chunk()} tokens does not fit in {longest} tokens of text.",
                "Ask for a lower ratio or a shorter chunk, or use longer blocks.",
            )

    @property
    def goes_on(self) -> bool:
        """Whether what the model writes is compressed too: text of a chunk must see the memory."""
        return self.who(1).text

    def who(self, chunks: int) -> Who:
        return Who(chunks, text=True, memory=True, latest=False, kind=COMP)

    def mixture(self) -> Merge | Pool | None:
        return None

    def layout(self, n: int, rng: np.random.Generator, text: Structure = RUNNING) -> Layout:
        if self.streams and not text.chunks:
            return budget_layout(self, n, self.n_comp, self.mixture())
        chunks = list(text.chunks) or equal_chunks(text.prefix or n, self.chunk(), self.n_comp)
        if text.prefix and self.goes_on:
            chunks += equal_chunks(n - sum(chunks), self.chunk(), self.n_comp)
        return chunk_layout(n, chunks, self.n_comp, self.who(len(chunks)), self.mixture())

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
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
    takes_budget = ()
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
            return chunk_layout(n, [text.prefix or n], self.n_comp, self.who(1), None)
        return super().layout(n, rng, text)

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
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
