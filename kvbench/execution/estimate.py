"""Estimates how long the cells of a plan take, for the dry run: from records on disk, or from the model's size."""

from __future__ import annotations

import os
import time
from functools import cache

import numpy as np

from kvbench.data.documents import Document
from kvbench.parsing import parse_json
from kvbench.planning.quality import Plan
from kvbench.store.folder import RECORDS, RunFolder
from kvbench.store.records import Cell

BYTES_PER_TOKEN = 4
LONGEST = 1280
"""Maximum number of tokens assumed per document, unless the protocol reads all of it (``block``, ``stream``)."""
WRITING = 3.0
"""Assumed cost of a generated text relative to one that is read, since its tokens are computed one by one."""
OVERHEAD = 3.0
"""Assumed time relative to arithmetic alone. Both are rough: a sweep estimated at 2 min took 3."""


def estimate_seconds(plan: Plan, folder: RunFolder) -> dict[str, float | None]:
    """Estimated seconds per cell for the documents not on disk; None if there is nothing to estimate from."""
    found: dict[str, float | None] = {}
    per_document = {cell.key: _measured(folder, cell) for cell in plan.cells}
    for workload in dict.fromkeys(cell.workload for cell in plan.cells):
        mine = [cell for cell in plan.cells if cell.workload == workload]
        documents = plan.corpora[mine[0].task].documents
        documents = documents[: plan.request.limit or len(documents)]
        known = [s for cell in mine if (s := per_document[cell.key]) is not None and cell.method != "human"]
        guess = float(np.mean(known)) if known else _by_arithmetic(plan, mine[0], documents)
        for cell in mine:
            left = len(documents) - len(folder.documents(cell))
            each = per_document[cell.key]
            cost = guess if each is None else each
            found[cell.key] = None if cost is None else max(0, left) * cost / _at_a_time(plan)
    return found


def _at_a_time(plan: Plan) -> int:
    """Number of child processes that measure at the same time: up to one per core if the model is small, else one."""
    from kvbench.execution.pool import MOST_CHILDREN, SMALL_MODEL_BYTES

    is_small = 0 < plan.model.weight_bytes <= SMALL_MODEL_BYTES and plan.request.device in ("cpu", "auto")
    return min(plan.request.threads or os.cpu_count() or 1, MOST_CHILDREN) if is_small else 1


def _measured(folder: RunFolder, cell: Cell) -> float | None:
    """Mean seconds per document on disk; damaged lines are ignored, and None is returned if there are no others."""
    path = folder.cell_folder(cell) / RECORDS
    seconds = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            seconds.append(float(parse_json(line)["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return float(np.mean(seconds)) if seconds else None


def _by_arithmetic(plan: Plan, cell: Cell, documents: tuple[Document, ...]) -> float | None:
    """Estimated seconds per document: two operations per weight and token, at the speed of a matrix product."""
    if plan.model.weight_bytes <= 0 or plan.request.device.startswith("cuda") or not documents:
        return None
    weights = plan.model.weight_bytes / 4
    cap = None if cell.protocol in ("block", "stream") else LONGEST
    lengths = [min(len(d.text.encode()) // BYTES_PER_TOKEN, cap or 1 << 40) for d in documents]
    factor = OVERHEAD * (WRITING if cell.writes else 1.0)
    return factor * 2 * weights * float(np.mean(lengths)) / _speed()


@cache
def _speed() -> float:
    """Operations per second of a matrix product, divided by the number of cores."""
    a = np.ones((512, 512), np.float32)
    a @ a
    started = time.perf_counter()
    for _ in range(8):
        a @ a
    return 8 * 2 * 512**3 / (time.perf_counter() - started) / (os.cpu_count() or 1)
