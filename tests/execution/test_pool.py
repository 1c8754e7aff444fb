"""How many child processes measure at the same time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from kvbench.execution import pool

GIB = 1 << 30


def plan(weights: int, device: str = "cpu", judge: int = 1, limit: int = 0, threads: int = 0) -> Any:
    """A plan with so many bytes of weights, and a judge."""
    models = {"scorer": SimpleNamespace(weight_bytes=judge)}
    cells = [SimpleNamespace(protocol="block", workload="text")]
    return SimpleNamespace(
        model=SimpleNamespace(weight_bytes=weights), judging=SimpleNamespace(models=models), cells=cells,
        request=SimpleNamespace(device=device, limit=limit, threads=threads),
    )


@pytest.mark.parametrize(("asked", "most", "free", "found"), [
    (plan(GIB // 64), 0, 64 * GIB, 4),
    (plan(GIB // 2), 0, 64 * GIB, 4),  # SmolLM2-135M in float32
    (plan(GIB // 2), 0, 5 * GIB, 2),  # each takes three times its weights, and a process of its own
    (plan(GIB // 2), 0, GIB, 1),
    (plan(GIB // 2), 2, GIB, 2),  # the user knows better
    (plan(GIB // 64, limit=12), 0, 64 * GIB, 2),  # two shards
    (plan(GIB // 2, limit=100), 0, 64 * GIB, 1),  # 13 shards: one child would be left alone with the last ones
    (plan(GIB // 2, limit=128), 0, 64 * GIB, 4),
    (plan(GIB // 2, threads=2), 0, 64 * GIB, 2),
    (plan(GIB // 2, judge=2 * GIB), 0, 64 * GIB, 1),
    (plan(2 * GIB), 0, 64 * GIB, 1),
    (plan(2 * GIB), 3, 64 * GIB, 3),
    (plan(0), 0, 64 * GIB, 1),
    (plan(GIB // 64, device="cuda"), 0, 64 * GIB, 1),
    (plan(GIB // 64, device="cuda"), 3, 64 * GIB, 3),  # several share a GPU if asked to
])
def test_as_many_children_as_are_useful(
    asked: Any, most: int, free: int, found: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(pool.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert pool.children(asked, most) == found
