"""Writing text: our loop against ``model.generate``, and Sentinel against the full cache, in tokens per second.

Both write greedily, the same number of tokens from the same prefixes, the prefix included in the
time of neither: the rival's own prefill is timed apart and taken off. Run: python -m benchmarks.decoding
"""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import torch

from benchmarks.pairs import compare_times
from kvbench.inference.generation import generate, greedy, read_prompt
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.sampling import Sampling
from kvbench.methods import make_method
from kvbench.models.adapter import Adapter
from kvbench.models.loading import load_model
from kvbench.models.references import find_adapter, resolve_model


class Prompt:
    """Prefixes, and how long it takes to write after them."""

    def __init__(self, model: Any, rows: int, prefix: int, new: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model, self.new = model, new
        self.ids = torch.randint(2, 4096, (rows, prefix), generator=generator)

    def ours(self, method: str, ratio: str, adapter: Adapter | None) -> float:
        """Seconds from the first chosen token to the last."""
        rows, prefix = self.ids.shape
        with torch.inference_mode(), prepared(self.model, adapter, prefix + self.new):
            text = Text(prefix, prefix + self.new, (0,) * rows)
            session = open_session(self.model, make_method(method, Fraction(ratio)), text, adapter=adapter)
            logits = read_prompt(session, self.ids)
            start = time.perf_counter()
            for _ in generate(session, logits, greedy(rows, self.new), Sampling()):
                pass
            return time.perf_counter() - start

    def rival(self) -> float:
        """Seconds of ``generate`` less those of its own prefill (one token)."""
        seconds = []
        for new in (self.new, 1):
            start = time.perf_counter()
            with torch.inference_mode():
                self.model.generate(
                    self.ids, attention_mask=torch.ones_like(self.ids), max_new_tokens=new, min_new_tokens=new,
                    do_sample=False, pad_token_id=0,
                )
            seconds.append(time.perf_counter() - start)
        return seconds[0] - seconds[1]


def main() -> None:
    """Print a line per batch: ours over the rival, medians of paired ratios."""
    reference = resolve_model("kvbench-tiny")
    model = load_model(reference, "cpu", "float32").model
    adapter = Adapter.load(find_adapter("sentinel", reference, {}), model)
    print("writing 64 tokens after 256, full cache, rival: model.generate (greedy, DynamicCache, SDPA)")
    for rows in (1, 8, 32):
        prompt = Prompt(model, rows, 256, 64)
        compare_times(f"full, batch {rows}", lambda p=prompt: p.ours("full", "0", None), prompt.rival, 1.0)
    print("writing 64 tokens after 768, at 0.7, rival: full, the same loop")
    for name, rows, target in (("sentinel", 1, 0.0), ("sentinel", 32, 1.3), ("sinks", 32, 0.0), ("local", 32, 0.0)):
        prompt = Prompt(model, rows, 768, 64)
        own = adapter if name == "sentinel" else None
        compare_times(
            f"{name}, batch {rows}{'' if target else ' (no target)'}",
            lambda p=prompt, n=name, a=own: p.ours(n, "0.7", a), lambda p=prompt: p.ours("full", "0", None), target,
            repeats=5,
        )


if __name__ == "__main__":
    main()
