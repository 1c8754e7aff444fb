"""The full cache in our layers against transformers' DynamicCache: reading 4096 tokens, and writing after them.

Run: python -m benchmarks.caches
"""

from __future__ import annotations

import torch

from benchmarks.pairs import compare_times
from kvbench.inference.opening import Text, open_session
from kvbench.methods.layouts.full import Full
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.profiling.clock import WallClock
from kvbench.profiling.passes import Timed, time_request
from kvbench.profiling.request import SessionRequest, StockRequest

LENGTH, NEW = 4096, 64


class Pair:
    """Requests in both caches, on prompts that are new each time."""

    def __init__(self, model: torch.nn.Module, batch: int) -> None:
        self.model, self.batch, self.seed = model, batch, 0

    def _prompt(self) -> torch.Tensor:
        self.seed += 1
        return torch.randint(4096, (self.batch, LENGTH), generator=torch.Generator().manual_seed(self.seed))

    def ours(self) -> Timed:
        return time_request(
            lambda watch: SessionRequest(
                open_session(
                    self.model, Full(), Text(LENGTH, LENGTH + NEW, (0,) * self.batch), at_once=True,
                    overhead=watch.overhead,
                ), self.model, self._prompt(), NEW,
            ), WallClock(), torch.device("cpu"), None,
        )

    def stock(self) -> Timed:
        return time_request(
            lambda watch: StockRequest(self.model, self._prompt(), NEW), WallClock(), torch.device("cpu"), None
        )


def main() -> None:
    """Print a line per batch: ours over the rival, medians of paired ratios."""
    model = load_model(resolve_model("kvbench-tiny"), "cpu", "float32").model
    print(f"full cache at {LENGTH} tokens, {NEW} written; rival: DynamicCache in the same loop and kernel")
    for batch, repeats in ((1, 15), (8, 5)):
        pair = Pair(model, batch)
        compare_times(
            f"writing, batch {batch}", lambda p=pair: p.ours().timeline.tpot_s,  # type: ignore[misc]
            lambda p=pair: p.stock().timeline.tpot_s, 1.0, repeats=repeats,  # type: ignore[misc]
        )
        compare_times(
            f"reading, batch {batch}", lambda p=pair: p.ours().timeline.prefill_s,  # type: ignore[misc]
            lambda p=pair: p.stock().timeline.prefill_s, 0.95, repeats=repeats,  # type: ignore[misc]
        )


if __name__ == "__main__":
    main()
