"""A grid of models, methods, ratios, tasks and seeds, as plans that share one folder.

The folder is named after models, tasks, data and settings, not after the grid: a sweep with another method, ratio or
seed, or with more documents, reuses the results that are already there, above all those of the full cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvbench.planning.quality import Plan, Request, build_plan


@dataclass(frozen=True)
class Sweep:
    """One plan per model and seed, and the folder that they share."""

    plans: tuple[Plan, ...]
    folder: Path
    content: str


def build_sweep(request: Request, models: Sequence[str], seeds: Sequence[int]) -> Sweep:
    """Create the plans of a grid.

    Args:
        request: the request to repeat; its model and seed are replaced.

    Raises:
        UserError: the request cannot be carried out.
    """
    plans = tuple(
        build_plan(replace(request, model=model, seed=seed), skip_infeasible=True)
        for model in dict.fromkeys(models) for seed in dict.fromkeys(seeds)
    )
    cells = [cell for plan in plans for cell in plan.cells]
    content = _hash(sorted(cell.request for cell in cells))
    ground = sorted({(
        cell.model_hash, cell.task, cell.data_hash, cell.protocol, cell.dtype, cell.execution,
        *(f"{name}={value}" for name, value in request.budget.options.items()),
    ) for cell in cells})
    tasks = "+".join(dict.fromkeys(cell.task for cell in cells))[:60]
    folder = request.out or request.reports / f"sweep-{tasks}-{_hash(ground)}"
    return Sweep(plans, folder, content)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:10]
