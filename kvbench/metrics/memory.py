"""Bytes of the cache after a piece has been read: mean over pieces, without an interval (nothing is sampled)."""

from __future__ import annotations

from collections.abc import Callable

from kvbench.metrics.base import Array, Metric, Shown, Totals


def _mean(column: str) -> Callable[[Totals], Array]:
    def value(t: Totals) -> Array:
        return t[column] / t["pieces"]

    return value


MEMORY = tuple(
    Metric(name, _mean(column), f"bytes|{what}|mean per sequence|v:1", unit="sequence", has_interval=False,
           shown=Shown(heading, 1, label=f"{heading}, MiB", scale=2**-20))
    for name, column, what, heading in (
        ("kv_bytes_logical", "kv_logical", "entries held x bytes per entry", "KV entries"),
        ("kv_bytes_physical", "kv_physical", "distinct storages alive", "KV held"),
        ("kv_bytes_full", "kv_full", "what the whole cache would take", "full KV"),
    )
)
