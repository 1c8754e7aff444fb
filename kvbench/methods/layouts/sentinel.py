"""The Sentinel compressor (Ren, Jia and Zhu, EMNLP 2023, arXiv 2310.08152)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.layouts.layout import CLOSE, OPEN, OUTSIDE, RUNNING, TEXT, Layout, TextStructure, Tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.layouts.sentinel_published import word_spans
from kvbench.methods.options import option

MAX_SPAN = 25


@dataclass(frozen=True)
class Sentinel(LayoutMethod):
    """Compresses each span of text between an opening and a closing sentinel into one entry.

    The closing sentinel sees its own span and the opening sentinel only, so that its keys and values become the summary
    of the span; later tokens may see the closing sentinel but never the span. Sentinels share the position of the token
    before them.

    With ``recent=w`` a span is closed after w more tokens have been read, so that the last w tokens are always
    uncompressed: both sentinels are then fed late, with their usual positions. Neither sees anything but the span, so
    their entries are the same; only the text in between still saw the span. ``sampler=published`` samples spans of
    words as the released code does; ``predict_from_cr=true`` predicts the token after a span from the closing sentinel.

    Departures from the released code: sentinel ids are inserted after tokenisation (no stray spaces), spans are sampled
    so that the realised ratio equals the requested one to within 1/n (the released sampler saturates near one half),
    spans that a block boundary would cut are left out, and the same text tokens are scored for every method. As
    published, the token after a span is predicted by the last token of the span.
    """

    name = "sentinel"
    summary = "one trained summary entry per closed span of 2 to 25 tokens"
    paper = "arXiv 2310.08152"
    adapter_kinds = ("gated", "plain", "full")
    seeded = True
    position_rule = "shared"

    sampler: str = option("exact", "how spans are drawn", choices=("exact", "published"))
    span: int = option(MAX_SPAN, "the most tokens of a span", least=2, most=512)
    recent: int = option(0, "last tokens that stay raw")
    predict_from_cr: bool = option(False, "the closing sentinel predicts the token after its span", trained=True)

    @property
    def n_rows(self) -> int:
        return 2

    @property
    def depends_on_words(self) -> bool:
        return self.sampler == "published"

    def check(self, longest: int, in_chunks: bool) -> None:
        if self.recent and self.predict_from_cr:
            raise UserError(
                "--set recent= and predict_from_cr=true exclude each other: a span that is closed later "
                "has no closing sentinel when its next token is predicted."
            )
        recent = self.recent
        if recent and self.depends_on_words:
            raise UserError(
                "--set recent= and sampler=published exclude each other: the published spans lie anywhere in a line."
            )
        if recent and recent > _widest(longest, self.ratio, self.span):
            raise UserError(
                f"sentinel cannot remove {float(self.ratio):g} of {longest} tokens outside the last {recent}: each "
                f"span of up to {self.span} tokens keeps one entry.",
                f"Ask for a ratio of at most {_most_removed(longest, self.span, recent) / longest:.3g}, or "
                "a smaller --set recent=.",
            )

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        recent, top = self.recent, self.span
        if self.sampler == "published":
            if text.words is None:
                raise UserError(
                    "--set sampler=published draws spans of words, which this task does not know.",
                    "Use it with protocol block or stream on a task of documents.",
                )
            gaps, lengths = word_spans(n, self.ratio, top, rng, text.words)
        else:
            # In a short piece, such as the end of a document, the window shrinks to what the ratio leaves.
            recent = max(0, min(recent, _widest(text.prefix or n, self.ratio, top)))
            gaps, lengths = sample_spans(text.prefix or n, self.ratio, rng, top, recent)
            if text.prefix:
                gaps, lengths = _written_too(gaps, lengths, n, self.ratio, rng, top, recent)
        return span_layout(gaps, lengths, recent, self.predict_from_cr)


def sample_spans(
    n: int, ratio: Fraction, rng: np.random.Generator, top: int = MAX_SPAN, recent: int = 0
) -> tuple[list[int], list[int]]:
    """Sample spans that remove exactly floor(ratio * n) of ``n`` entries, all before the last ``recent``.

    Returns:
        The K + 1 gaps of uncompressed tokens around the spans, and the K span lengths (2 to ``top`` tokens each);
        together they cover the n tokens.

    Raises:
        UserError: no set of such spans removes that many entries.
    """
    removed = (ratio.numerator * n) // ratio.denominator
    if math.ceil(removed / (top - 1)) > min(n - recent - removed, removed):
        raise UserError(
            f"sentinel cannot remove {float(ratio):g} of {n} tokens: each span of up to {top} tokens keeps one "
            "entry.",
            f"Ask for a ratio of at most {_most_removed(n, top, recent) / n:.3g}.",
        )
    return _draw_spans(n, removed, rng, top, recent)


def _written_too(
    gaps: list[int], lengths: list[int], n: int, ratio: Fraction, rng: np.random.Generator, top: int, recent: int
) -> tuple[list[int], list[int]]:
    """Extend the spans of a prefix to generated text, up to ``n`` tokens in all, as close to the ratio as possible."""
    prefix = sum(gaps) + sum(lengths)
    rest = n - prefix + recent  # the window at the end of the prefix is compressed during generation
    removed = (ratio.numerator * n) // ratio.denominator - (ratio.numerator * prefix) // ratio.denominator
    more, spans = _draw_spans(rest, min(removed, _most_removed(rest, top, recent)), rng, top, recent)
    return [*gaps[:-1], gaps[-1] - recent + more[0], *more[1:]], [*lengths, *spans]


def _draw_spans(
    n: int, removed: int, rng: np.random.Generator, top: int, recent: int
) -> tuple[list[int], list[int]]:
    """As ``sample_spans``, for a number of entries that is known to be feasible."""
    if removed == 0:
        return [n], []
    fewest, most = math.ceil(removed / (top - 1)), min(n - recent - removed, removed)
    count = min(max(round(removed / Fraction(top, 2)), fewest, 1), most)
    shares = _bounded_composition(removed, count, top - 1, rng)
    free = n - recent - removed - count
    bars = np.sort(rng.choice(free + count, count, replace=False))
    edges = np.concatenate(([-1], bars, [free + count]))
    gaps = list(np.diff(edges) - 1)
    gaps[-1] += recent
    return gaps, list(shares + 1)


def _widest(n: int, ratio: Fraction, top: int) -> int:
    """The longest recent window that leaves room for the spans that the ratio needs."""
    removed = (ratio.numerator * n) // ratio.denominator
    return n - removed - -(-removed // (top - 1))


def _most_removed(n: int, top: int, recent: int) -> int:
    """The most entries that spans of up to ``top`` tokens, all before the last ``recent`` tokens, can remove."""
    room = max(0, n - recent)
    return room - math.ceil(room / top)


def _bounded_composition(total: int, parts: int, top: int, rng: np.random.Generator) -> np.ndarray:
    """``parts`` integers in [1, top] with the given sum: uniform samples, then random steps of one."""
    draw = rng.integers(1, top, size=parts, endpoint=True)
    while (missing := total - int(draw.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(draw < top if step > 0 else draw > 1)
        chosen = rng.permutation(movable)[: abs(missing)]
        draw[chosen] += step
    return draw


def span_layout(
    gaps: Sequence[int], lengths: Sequence[int], recent: int = 0, predict_from_close: bool = False
) -> Layout:
    """The typed sequence gap, OPEN, span, CLOSE, gap, ... of K spans and K + 1 gaps.

    With ``recent`` the two sentinels of a span come together, that many text tokens after it.
    """
    spans = torch.arange(len(lengths))
    starts = torch.cumsum(torch.tensor([*gaps]), 0)[: len(lengths)] + torch.cumsum(
        torch.tensor([0, *lengths]), 0
    )[: len(lengths)]
    stops = starts + torch.tensor([*lengths], dtype=torch.long)
    n = sum(gaps) + sum(lengths)
    text = torch.arange(n)
    segment = torch.full((n,), OUTSIDE)
    for s, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist(), strict=True)):
        segment[start:stop] = s
    raw = torch.cat([text, (starts - 1).clamp(min=0), stops - 1])
    kind = torch.cat([torch.full((n,), TEXT), torch.full_like(spans, OPEN), torch.full_like(spans, CLOSE)])
    # What is fed after text token i and before i + 1 sorts between 4 i and 4 i + 4.
    opened = 4 * (stops + recent - 1) + 1 if recent else 4 * starts - 1
    place = torch.cat([4 * text, opened, 4 * (stops + recent - 1) + 2])
    order = torch.argsort(place)
    tokens = Tokens(
        torch.arange(len(order)), kind[order], raw[order], torch.cat([segment, spans, spans])[order],
        torch.where(kind == TEXT, -1, kind - OPEN)[order],
    )
    closed = tokens.slot[tokens.kind == CLOSE]
    predictors = None
    if predict_from_close:
        predictors = tokens.slot[tokens.kind == TEXT].clone()
        predictors[stops - 1] = closed
    return Layout(tokens, tokens.raw, SpanVisibility(closed), n, predictors=predictors)


@dataclass(frozen=True, eq=False)
class SpanVisibility:
    """Visibility of :class:`Sentinel`; see its docstring.

    Attributes:
        closed: int64 ``[K]``, the slot of each span's closing sentinel: text before it sees the span, text after it
            sees the sentinel.
    """

    closed: Tensor

    def __call__(self, queries: Tokens, keys: Tokens) -> Tensor:
        outside = keys.segment == OUTSIDE
        closed = torch.cat([self.closed, self.closed.new_zeros(1)])[keys.segment]
        open_text = (keys.kind == TEXT) & (outside | (queries.slot < closed))
        text_sees = (keys.kind == CLOSE) | open_text
        own_span = (keys.segment == queries.segment) & ~outside
        return ((queries.kind == TEXT) & text_sees) | ((queries.kind == CLOSE) & own_span)
