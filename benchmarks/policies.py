"""What a method costs while it writes: tokens after a cache of 4096, at 0.7, against the full cache in the same loop.

Run: python -m benchmarks.policies [METHOD ...]
"""

from __future__ import annotations

import sys
from fractions import Fraction

import torch

from benchmarks.pairs import compare_times
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.methods import METHODS, Method, make_method
from kvbench.methods.policies.policy import CachePolicy
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.profiling.clock import WallClock
from kvbench.profiling.passes import time_request
from kvbench.profiling.request import Request, SessionRequest

LENGTH, NEW, BATCH = 4096, 64, 1
REACHES = {"think": "0.3"}
"""Ratios of those that cannot remove 0.7."""
LAYOUTS = ("sinks", "sentinel", "strided", "unigist", "beacon")
"""Methods that are no policies, and are timed all the same; adapters are random."""
SHARED = ("pairs", "yoco")


class Writing:
    """Requests of a method on the embedded model, from a random cache."""

    def __init__(self, model: torch.nn.Module, method: Method) -> None:
        self.model, self.method, self.seed = model, method, 0
        card = AdapterCard(method.name, "gated", 64, 64.0, method.n_rows, "", "")
        self.adapter = Adapter.fresh(card, model).requires_grad_(False) if method.n_rows else None
        self.prompt = torch.randint(4096, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))

    def _request(self) -> Request:
        text = Text(LENGTH, LENGTH + NEW, (0,) * BATCH)
        session = open_session(self.model, self.method, text, adapter=self.adapter, at_once=True)
        return SessionRequest(session, self.model, self.prompt, NEW)

    def seconds(self) -> float:
        """Per token."""
        self.seed += 1
        with prepared(self.model, self.adapter, LENGTH + NEW):
            timed = time_request(lambda _: self._request(), WallClock(), torch.device("cpu"), self.seed)
        return timed.timeline.tpot_s


def main() -> None:
    """Print a line per method: the full cache's time over the method's, medians of paired ratios."""
    asked = sys.argv[1:]
    model = load_model(resolve_model("kvbench-tiny"), "cpu", "float32").model
    full = Writing(model, make_method("full", Fraction(0)))
    print(f"writing {NEW} tokens after {LENGTH} at 0.7, removed every 16; rival: the full cache, the same loop")
    for name, kind in METHODS.items():
        if name in asked or (not asked and (issubclass(kind, CachePolicy) or name in LAYOUTS)):
            mine = Writing(model, make_method(name, Fraction(REACHES.get(name, "0.7"))))
            compare_times(name, mine.seconds, full.seconds, 0.9, repeats=9)
    for pattern in SHARED if not asked else ():
        shared = load_model(resolve_model(f"kvbench-tiny:share={pattern}"), "cpu", "float32").model
        mine = Writing(shared, make_method("full", Fraction(0)))
        compare_times(f"full, --share {pattern}", mine.seconds, full.seconds, 0.9, repeats=9)


if __name__ == "__main__":
    main()
