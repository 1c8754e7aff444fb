"""The learning curve of an adapter: what was measured on held-out text while it was trained."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

LOG = "log.jsonl"

Scores = dict[str, dict[str, float]]
"""By ratio: ``nll`` in nats per token, and ``recall``, the share of facts that were recalled."""


class Point(NamedTuple):
    """One measurement.

    Attributes:
        step: optimiser steps before it.
        loss: smoothed training loss, in nats per token; NaN if unknown.
        held_out: scores on held-out text.
    """

    step: int
    loss: float
    held_out: Scores

    @property
    def mean(self) -> float:
        """Nats per token on held-out text, the mean over ratios."""
        return sum(score["nll"] for score in self.held_out.values()) / max(1, len(self.held_out))


def read_curve(folder: Path) -> list[Point]:
    """The measurements in the folder of an adapter, in order; a line that was only half written is left out."""
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    points: dict[int, Point] = {}
    for line in lines:
        try:
            raw = json.loads(line)
            loss = math.nan if raw["loss"] is None else float(raw["loss"])
            points[raw["step"]] = Point(int(raw["step"]), loss, dict(raw["held_out"]))
        except (ValueError, KeyError, TypeError):
            continue
    return [points[step] for step in sorted(points)]


def write_curve(folder: Path, points: list[Point]) -> None:
    """Replace the measurements in the folder, atomically."""
    part = folder / (LOG + ".part")
    lines = [
        json.dumps({**point._asdict(), "loss": None if math.isnan(point.loss) else round(point.loss, 4)})
        for point in points
    ]
    part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.replace(part, folder / LOG)
