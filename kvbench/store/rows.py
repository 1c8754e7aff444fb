"""Rows and the document of ``results.json``: what analysis computes and reporting shows."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from kvbench.store.records import SCHEMA, Failure


@dataclass(frozen=True)
class Row:
    """One number with its uncertainty and its settings: a row of ``results.json``.

    ``value``, ``ci_low``, ``ci_high`` and the deltas are in the metric's own unit; fields that do not
    apply are None. ``p_value`` is Holm-adjusted within (task, metric).
    """

    task: str
    protocol: str
    model: str
    method: str
    ratio_asked: float | None
    ratio_realised: float | None
    ratio_mean: float | None
    entries_peak: int | None
    removal: str
    params: dict[str, Any]
    groups: int
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    unit: str
    delta: float | None
    delta_ci_low: float | None
    delta_ci_high: float | None
    p_value: float | None
    baseline: str | None
    seed: int
    signature: str

    @property
    def name(self) -> str:
        """The method as requested: ``snapkv``, or ``snapkv:window=16``."""
        variant = self.params.get("variant")
        return f"{self.method}:{variant}" if variant else self.method


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``, which ``--json`` prints."""

    run: str
    ok: bool
    failures: tuple[Failure, ...] = ()
    rows: tuple[Row, ...] = ()
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        ordered = {"schema": content.pop("schema"), **content}
        return json.dumps(ordered, indent=1, allow_nan=False, ensure_ascii=False)
