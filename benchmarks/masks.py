"""Building a Sentinel mask by tensor operations against entry-by-entry Python loops.

Run: python -m benchmarks.masks
"""

from __future__ import annotations

from fractions import Fraction

import torch

from benchmarks.pairs import compare
from kvbench.methods import make_layout, make_method
from kvbench.methods.layouts.layout import CLOSE, OPEN, TEXT, Layout

LENGTH, ROWS = 256, 8


def loops(layout: Layout) -> torch.Tensor:
    """The attention rule entry by entry, as scripts write it."""
    kind, segment = layout.tokens.kind.tolist(), layout.tokens.segment.tolist()
    size = len(kind)
    mask = [[False] * size for _ in range(size)]
    for q in range(size):
        for k in range(q + 1):
            same = segment[q] == segment[k] and segment[q] >= 0
            if q == k:
                mask[q][k] = True
            elif kind[q] == CLOSE:
                mask[q][k] = same
            elif kind[q] != OPEN:
                mask[q][k] = kind[k] == CLOSE or (kind[k] == TEXT and (segment[k] < 0 or same))
    return torch.tensor(mask)


def ours(layout: Layout) -> torch.Tensor:
    every = torch.arange(len(layout))
    return layout.visible(every, every)


def main() -> None:
    """Print how many times faster a mask is built, for one layout and for a batch of eight rows."""
    layout = make_layout(make_method("sentinel", Fraction("0.7")), LENGTH, 0, 0)
    assert torch.equal(ours(layout), loops(layout))
    print(f"Sentinel mask at 0.7, block of {LENGTH}, rival: Python loops over entries")
    compare("one layout", lambda: ours(layout), lambda: loops(layout), 10.0)
    compare(
        f"a batch of {ROWS} rows (one mask for the rows of a layout)",
        lambda: ours(layout).expand(ROWS, -1, -1), lambda: torch.stack([loops(layout) for _ in range(ROWS)]), 50.0,
    )


if __name__ == "__main__":
    main()
