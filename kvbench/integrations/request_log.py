"""What was compressed for the requests of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvbench.inference.row_group import CacheUsage
from kvbench.parsing import bytes_of


class Held(NamedTuple):
    """The compressed context of one request: its tokens, the entries and bytes held, and bytes without compression."""

    tokens: float
    entries: float
    bytes: float
    full: float


@dataclass
class RequestLog:
    """What was compressed for each request.

    Attributes:
        whole: requests that were left whole, since their context is short.
        held: the others, in any order.
        is_told: whether the summary has been asked for; what is added afterwards belongs to another evaluation.
    """

    whole: int = 0
    held: list[Held] = field(default_factory=list)
    is_told: bool = False

    def add(self, usage: CacheUsage, copies: int = 1) -> None:
        """Count the rows of a cache, once its context has been read; ``copies`` requests share each of them."""
        self._begin()
        values = (usage.tokens, usage.entries, usage.logical, usage.full)
        self.held += [Held(*(value / usage.rows for value in values))] * (usage.rows * copies)

    def leave_whole(self, requests: int) -> None:
        self._begin()
        self.whole += requests

    def forget(self) -> None:
        """Count from the beginning again: an evaluation has failed, and what it counted belongs to no result."""
        self.is_told = True
        self._begin()

    def summary(self) -> dict[str, Any]:
        """Counts, and means over the compressed requests: entries are per layer and head, bytes per request."""
        self.is_told = True
        held, requests = self.held, self.whole + len(self.held)
        share = len(held) / requests if requests else 0.0
        counts = {"requests": requests, "compressed": len(held), "share_compressed": share}
        if not held:
            return counts
        realised = [1 - one.entries / one.tokens for one in held]
        tokens = sum(one.tokens for one in held)
        return counts | {
            "ratio_realised": {"mean": sum(realised) / len(held), "min": min(realised), "max": max(realised)},
            "context_tokens": tokens / len(held),
            "entries": sum(one.entries for one in held) / len(held),
            "bytes": sum(one.bytes for one in held) / len(held),
            "bytes_full": sum(one.full for one in held) / len(held),
            "bytes_per_token": sum(one.bytes for one in held) / tokens,
        }

    def sentence(self) -> str:
        """The summary in words."""
        found = self.summary()
        text = f"{found['compressed']} of {found['requests']} requests were compressed"
        if not found["compressed"]:
            return text + "."
        realised = "{mean:.3f} ({min:.3f} to {max:.3f})".format(**found["ratio_realised"])
        return (
            f"{text}; realised ratio {realised}; {found['entries']:.1f} entries of {found['context_tokens']:.1f}, "
            f"{bytes_of(round(found['bytes']))} of {bytes_of(round(found['bytes_full']))} in the mean."
        )

    def _begin(self) -> None:
        if self.is_told:
            self.whole, self.held, self.is_told = 0, [], False
