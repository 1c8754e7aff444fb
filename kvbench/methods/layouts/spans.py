"""Random spans of text that remove an exact number of entries when each is replaced by its summary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from kvbench.errors import UserError


@dataclass(frozen=True)
class SpanRule:
    """Which spans may be drawn.

    Attributes:
        longest: the most tokens of a span.
        summary: entries that stay of each; a span has more tokens than that.
        recent: last tokens that no span contains; ``sinks``: first tokens that none does.
    """

    longest: int
    summary: int = 1
    recent: int = 0
    sinks: int = 0

    @property
    def removes(self) -> int:
        """The most entries that a span removes."""
        return self.longest - self.summary

    def widest(self, n: int, ratio: Fraction) -> int:
        """The longest recent window, of ``n`` tokens, that leaves room for the spans that the ratio needs."""
        removed = (ratio.numerator * n) // ratio.denominator
        return n - self.sinks - removed - self.summary * -(-removed // self.removes)

    def most_removed(self, n: int) -> int:
        """The most entries that such spans can remove of ``n``."""
        room = max(0, n - self.recent - self.sinks)
        spans, rest = divmod(room, self.longest)
        return spans * self.removes + max(0, rest - self.summary)

    def most_spans(self, n: int, removed: int) -> int:
        """The most spans that remove so many entries of ``n`` together."""
        return min((n - self.recent - self.sinks - removed) // self.summary, removed)

    def sample(self, n: int, ratio: Fraction, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Sample spans that remove exactly floor(ratio * n) of ``n`` entries.

        Returns:
            The K + 1 gaps of uncompressed tokens around the spans, and the K span lengths; together they cover the n
            tokens.

        Raises:
            UserError: no set of such spans removes that many entries.
        """
        removed = (ratio.numerator * n) // ratio.denominator
        if math.ceil(removed / self.removes) > self.most_spans(n, removed):
            stays = "one entry" if self.summary == 1 else f"{self.summary} entries"
            raise UserError(
                f"sentinel cannot remove {float(ratio):g} of {n} tokens: each span of up to {self.longest} tokens "
                f"keeps {stays}.",
                f"Ask for a ratio of at most {self.most_removed(n) / n:.3g}.",
            )
        return self.draw(n, removed, rng)

    def draw(self, n: int, removed: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """As :meth:`sample`, for a number of entries that is known to be feasible."""
        if removed == 0:
            return [n], []
        fewest, most = math.ceil(removed / self.removes), self.most_spans(n, removed)
        count = min(max(round(removed / Fraction(1 + self.removes, 2)), fewest, 1), most)
        shares = _bounded_composition(removed, count, self.removes, rng)
        free = n - self.recent - self.sinks - removed - self.summary * count
        bars = np.sort(rng.choice(free + count, count, replace=False))
        edges = np.concatenate(([-1], bars, [free + count]))
        gaps = list(np.diff(edges) - 1)
        gaps[0] += self.sinks
        gaps[-1] += self.recent
        return gaps, list(shares + self.summary)


def _bounded_composition(total: int, parts: int, top: int, rng: np.random.Generator) -> np.ndarray:
    """``parts`` integers in [1, top] with the given sum: uniform samples, then random steps of one."""
    draw = rng.integers(1, top, size=parts, endpoint=True)
    while (missing := total - int(draw.sum())) != 0:
        step = 1 if missing > 0 else -1
        movable = np.flatnonzero(draw < top if step > 0 else draw > 1)
        chosen = rng.permutation(movable)[: abs(missing)]
        draw[chosen] += step
    return draw
