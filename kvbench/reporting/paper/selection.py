"""What a paper shows of a run: the main metric of each task, which rows are compared, and the order of the methods."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from kvbench.metrics import SHOWN
from kvbench.reporting.tables.compact import main_metric
from kvbench.reporting.tables.format import by_setting, is_control
from kvbench.store.rows import Row

Comparison = tuple[str, str, str, int, str | None]
"""Protocol, metric, model, seed and question: tasks that share them stand in one figure or table."""


def comparisons(rows: Sequence[Row], metrics: Sequence[str] = ()) -> dict[Comparison, list[Row]]:
    """Rows of whole documents, by comparison: of the main metric of each task, and of others that were asked for."""
    found: dict[Comparison, list[Row]] = {}
    whole = [row for row in rows if row.params.get("bin") is None and row.value is not None]
    for mine in by_setting([row for row in whole if row.protocol != "profile"]).values():
        for metric in dict.fromkeys((main_metric(mine), *metrics)):
            for row in (row for row in mine if row.metric == metric):
                key = (row.protocol, metric, row.model, row.seed, row.params.get("question"))
                found.setdefault(key, []).append(row)
    return found


def ranked(rows: Sequence[Row]) -> list[str]:
    """Names of the methods but for controls, best first: by their mean rank by the main metric of each task at each
    ratio, as a share of those ranked there. Methods of tasks without a better direction follow in their order."""
    places: dict[str, list[float]] = defaultdict(list)
    for (_, metric, *_), compared in comparisons(rows).items():
        better = SHOWN[metric].better
        for mine in by_setting(compared).values():
            for ratio in {row.ratio_asked for row in mine}:
                alike = [row for row in mine if row.ratio_asked == ratio and not is_control(row.name)]
                alike.sort(key=lambda row: (row.value or 0.0) * {"low": 1, "high": -1, None: 0}[better])
                for place, row in enumerate(alike):
                    places[row.name].append(place / max(1, len(alike) - 1))
    return sorted(places, key=lambda name: sum(places[name]) / len(places[name]))


def is_paired(metric: str) -> bool:
    """Whether figures show the paired difference to the full cache: documents differ far more than methods do."""
    return metric in ("ppl", "nll", "bits_per_byte")
