"""What compression costs by the distance from where entries were last replaced; a recorded curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbench.statistics import bootstrap_intervals
from kvbench.store.records import Cell, DocumentRecord, Row

SIGNATURE = "nats|mean over targets at that distance from the last replaced entries|v:1"


def distance_rows(cell: Cell, records: Sequence[DocumentRecord], info: dict[str, Any]) -> list[Row]:
    """One row per distance: metric ``nll``, with its difference to ``full`` on the same targets.

    ``params.bin`` is ``since=d``: targets with at least d text tokens (and fewer than the next
    d) between them and the last summary. Methods that replace no entries have no such rows.
    """
    bins = sorted({int(name) for r in records for name in r.by_distance or ()})
    groups = sorted({r.group for r in records})
    place = {name: i for i, name in enumerate(groups)}
    rows = []
    for start in bins:
        table = np.zeros((len(groups), 3))
        for r in records:
            table[place[r.group]] += (r.by_distance or {}).get(str(start), (0, 0.0, 0.0))

        table = table[table[:, 0] > 0]

        def means(drawn: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
            return (drawn[0][:, 1:] / drawn[0][:, :1]).T

        (low, high), (delta_low, delta_high) = bootstrap_intervals([table], means, cell.seed)
        count, nll, loss = table.sum(0)
        rows.append(Row(
            task=cell.task, protocol=cell.protocol, model=cell.model, method=cell.method,
            ratio_asked=None if cell.ratio_asked is None else float(cell.ratio_asked),
            ratio_realised=None, ratio_mean=None, entries_peak=None,
            removal="real" if cell.execution == "streamed" else "masked",
            params={
                "seq_len": info["seq_len"], "batch_size": None, "new_tokens": None, "step": None,
                "bin": f"since={start}", "position_rule": cell.position_rule, **cell.options,
            },
            groups=len(table), metric="nll", value=float(nll / count), ci_low=_known(low), ci_high=_known(high),
            n=int(count), unit="token", delta=float(loss / count), delta_ci_low=_known(delta_low),
            delta_ci_high=_known(delta_high), p_value=None, baseline="full", seed=cell.seed,
            signature=f"nll:{info['signature']}|{SIGNATURE}",
        ))
    return rows


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
