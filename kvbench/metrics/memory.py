"""Bytes of the cache when a piece has been read: mean per piece, no interval (nothing is sampled)."""

from __future__ import annotations

from collections.abc import Callable

from kvbench.metrics.base import Array, Metric, Totals


def _mean(column: str) -> Callable[[Totals], Array]:
    def value(t: Totals) -> Array:
        return t[column] / t["pieces"]

    return value


MEMORY = tuple(
    Metric(name, _mean(column), f"bytes|{what}|mean per sequence|v:1", unit="sequence", has_interval=False)
    for name, column, what in (
        ("kv_bytes_logical", "kv_logical", "entries held x bytes per entry"),
        ("kv_bytes_physical", "kv_physical", "distinct storages alive"),
        ("kv_bytes_full", "kv_full", "what the whole cache would take"),
    )
)
