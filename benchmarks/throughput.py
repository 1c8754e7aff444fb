"""One-pass scoring against a plain transformers forward with its own loss, in text tokens per second.

Run: python -m benchmarks.throughput
"""

from __future__ import annotations

from fractions import Fraction

import torch
from transformers import AutoModelForCausalLM

from benchmarks.pairs import compare
from kvbench.methods import make_method
from kvbench.models.adapter import Adapter
from kvbench.models.loading import load_model
from kvbench.models.references import find_adapter, resolve_model
from kvbench.protocols.pieces import Piece
from kvbench.protocols.scoring import score_pieces

LENGTH, ROWS = 512, 4


def main() -> None:
    """Print a line per method: ours over the rival, medians of paired ratios."""
    reference = resolve_model("kvbench-tiny")
    model = load_model(reference, "cpu", "float32").model
    adapter = Adapter.load(find_adapter("sentinel", reference, {}), model)
    ids = torch.randint(0, 4096, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    pieces = [Piece("d", tuple(row.tolist()), LENGTH, 1, LENGTH, 0) for row in ids]

    stock = AutoModelForCausalLM.from_pretrained(reference.location, dtype=torch.float32).eval()

    def rival() -> None:
        with torch.inference_mode():
            stock(input_ids=ids, labels=ids)

    print(f"one-pass scoring, loss included, {ROWS} x {LENGTH} tokens, rival: transformers forward with labels")
    for name, target in (("local", 0.90), ("sinks", 0.90), ("scattered", 0.90), ("sentinel", 0.75)):
        method = make_method(name, Fraction("0.7"))
        own = adapter if name == "sentinel" else None

        def ours(method=method, own=own) -> None:  # type: ignore[no-untyped-def]
            score_pieces(model, method, pieces, adapter=own, execution="onepass")

        compare(f"{name} at 0.7", ours, rival, target)


if __name__ == "__main__":
    main()
