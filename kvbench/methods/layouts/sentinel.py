"""The Sentinel compressor (Ren, Jia and Zhu, EMNLP 2023, arXiv 2310.08152)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.base import TRAINED_PERCENT
from kvbench.methods.layouts.layout import CLOSE, OPEN, OUTSIDE, RUNNING, TEXT, Layout, TextStructure, Tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.layouts.sentinel_published import word_spans
from kvbench.methods.layouts.spans import SpanRule
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

    ``closing=k`` makes k entries of a span, each of a closing sentinel with an embedding of its own; ``sees=previous``
    lets them see the summary of the span before, too, and ``sees=summaries`` those of all spans before; ``sinks=s``
    keeps spans away from the first s tokens, which attention rests on in many models.

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
    closing: int = option(
        1, "closing sentinels of a span, each an entry of its summary", least=1, most=8, trained=True, later=True
    )
    sees: str = option(
        "span", "what closing sentinels see: their span, and the previous summary, or all",
        choices=("span", "previous", "summaries"), trained=True, later=True,
    )
    sinks: int = option(0, "first tokens that stay raw", later=True)

    @property
    def n_rows(self) -> int:
        return 1 + self.closing

    @property
    def rule(self) -> SpanRule:
        """Which spans may be drawn."""
        return SpanRule(self.span, self.closing, self.recent, self.sinks)

    @property
    def depends_on_words(self) -> bool:
        return self.sampler == "published"

    def check(self, longest: int, in_chunks: bool) -> None:
        if self.recent and self.predict_from_cr:
            raise UserError(
                "--set recent= and predict_from_cr=true exclude each other: a span that is closed later "
                "has no closing sentinel when its next token is predicted."
            )
        if self.depends_on_words and (self.recent or self.sinks or self.closing > 1):
            raise UserError(
                "--set sampler=published excludes recent=, sinks= and closing=: the published spans lie anywhere in a "
                "line, and some have two tokens."
            )
        if self.closing >= self.span:
            raise UserError(f"--set closing={self.closing}: spans of up to {self.span} tokens would save nothing.")
        if (self.recent or self.sinks) and self.recent > self.rule.widest(longest, self.ratio):
            first = f"first {self.sinks} and the " if self.sinks else ""
            stays = "one entry" if self.closing == 1 else f"{self.closing} entries"
            raise UserError(
                f"sentinel cannot remove {float(self.ratio):g} of {longest} tokens outside the {first}last "
                f"{self.recent}: each span of up to {self.span} tokens keeps {stays}.",
                f"Ask for a ratio of at most {self.rule.most_removed(longest) / longest:.3g}, or "
                f"a smaller --set recent={' or sinks=' if self.sinks else ''}.",
            )

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        reached = 100 * cls.from_options(Fraction(0), options).rule.most_removed(n) // n
        low, high = TRAINED_PERCENT
        percent = int(rng.integers(low, min(high, reached), endpoint=True))
        return cls.from_options(Fraction(percent, 100), options).layout(n, rng)

    def layout(self, n: int, rng: np.random.Generator, text: TextStructure = RUNNING) -> Layout:
        rule = self.rule
        if self.sampler == "published":
            if text.words is None:
                raise UserError(
                    "--set sampler=published draws spans of words, which this task does not know.",
                    "Use it with protocol block or stream on a task of documents.",
                )
            gaps, lengths = word_spans(n, self.ratio, self.span, rng, text.words)
        else:
            # In a short piece, such as the end of a document, what stays raw shrinks to what the ratio leaves.
            room = max(0, replace(rule, sinks=0).widest(text.prefix or n, self.ratio))
            sinks = min(self.sinks, room)
            rule = replace(rule, sinks=sinks, recent=min(self.recent, room - sinks))
            gaps, lengths = rule.sample(text.prefix or n, self.ratio, rng)
            if text.prefix:
                gaps, lengths = _written_too(gaps, lengths, n, self.ratio, rng, rule)
        return span_layout(gaps, lengths, rule.recent, self.predict_from_cr, self.closing, self.sees)


def _written_too(
    gaps: list[int], lengths: list[int], n: int, ratio: Fraction, rng: np.random.Generator, rule: SpanRule
) -> tuple[list[int], list[int]]:
    """Extend the spans of a prefix to generated text, up to ``n`` tokens in all, as close to the ratio as possible."""
    prefix = sum(gaps) + sum(lengths)
    rest = n - prefix + rule.recent  # the window at the end of the prefix is compressed during generation
    removed = (ratio.numerator * n) // ratio.denominator - (ratio.numerator * prefix) // ratio.denominator
    later = replace(rule, sinks=0)
    more, spans = later.draw(rest, min(removed, later.most_removed(rest)), rng)
    return [*gaps[:-1], gaps[-1] - rule.recent + more[0], *more[1:]], [*lengths, *spans]


def span_layout(
    gaps: Sequence[int], lengths: Sequence[int], recent: int = 0, predict_from_close: bool = False, closing: int = 1,
    sees: str = "span",
) -> Layout:
    """The typed sequence gap, OPEN, span, CLOSE, gap, ... of K spans and K + 1 gaps.

    With ``recent`` the sentinels of a span come together, that many text tokens after it.
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
    closes, which = spans.repeat_interleave(closing), torch.arange(closing).repeat(len(lengths))
    raw = torch.cat([text, (starts - 1).clamp(min=0), stops[closes] - 1])
    kind = torch.cat([torch.full((n,), TEXT), torch.full_like(spans, OPEN), torch.full_like(closes, CLOSE)])
    row = torch.cat([torch.full((n,), -1), torch.zeros_like(spans), 1 + which])
    # What is fed after text token i and before i + 1 sorts between 16 i and 16 i + 16.
    opened = 16 * (stops + recent - 1) + 1 if recent else 16 * starts - 1
    place = torch.cat([16 * text, opened, 16 * (stops[closes] + recent - 1) + 2 + which])
    order = torch.argsort(place)
    tokens = Tokens(
        torch.arange(len(order)), kind[order], raw[order], torch.cat([segment, spans, closes])[order], row[order],
    )
    closed = tokens.slot[(tokens.kind == CLOSE) & (tokens.row == closing)]
    predictors = None
    if predict_from_close:
        predictors = tokens.slot[tokens.kind == TEXT].clone()
        predictors[stops - 1] = closed
    return Layout(tokens, tokens.raw, SpanVisibility(closed, sees), n, predictors=predictors)


@dataclass(frozen=True, eq=False)
class SpanVisibility:
    """Visibility of :class:`Sentinel`; see its docstring.

    Attributes:
        closed: int64 ``[K]``, the slot of each span's last closing sentinel: text before it sees the span, text after
            it sees the closing sentinels.
        sees: what closing sentinels see besides their span: ``span``, nothing; ``previous``, the summary of the span
            before; ``summaries``, those of all spans before.
    """

    closed: Tensor
    sees: str = "span"

    def __call__(self, queries: Tokens, keys: Tokens) -> Tensor:
        outside = keys.segment == OUTSIDE
        closed = torch.cat([self.closed, self.closed.new_zeros(1)])[keys.segment]
        open_text = (keys.kind == TEXT) & (outside | (queries.slot < closed))
        is_summary = keys.kind == CLOSE
        seen = (keys.segment == queries.segment) & ~outside
        if self.sees == "previous":
            seen = seen | (is_summary & (keys.segment == queries.segment - 1))
        elif self.sees == "summaries":
            seen = seen | (is_summary & (keys.segment < queries.segment))
        return ((queries.kind == TEXT) & (is_summary | open_text)) | ((queries.kind == CLOSE) & seen)
