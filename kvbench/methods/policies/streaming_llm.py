"""StreamingLLM (arXiv 2309.17453): the first tokens and a window, with positions counted in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.methods.options import option
from kvbench.methods.policies.policy import CachePolicy


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """Keeps the first ``sinks`` entries and the most recent, kept(N, r) together, a constant number.

    Keys are rotated to their position in the cache, as published; ``positions=absolute`` leaves them at their position
    in the text (as the method ``sinks`` does, with a budget that is proportional to the text).
    """

    name = "streaming-llm"
    summary = "the 4 first entries and a window, kept(N, r) together, positions counted in the cache"
    paper = "arXiv 2309.17453"
    position_rule = "cache"

    sinks: int = option(4, "first entries that stay", least=1)
    positions: str = option("cache", "where keys are taken to be", choices=("cache", "absolute"))

    @property
    def rerotated(self) -> int:
        return self.sinks if self.positions == "cache" else 0

    def budget(self, read: int, total: int, layer: int, layers: int) -> int:
        return self.constant(total)
