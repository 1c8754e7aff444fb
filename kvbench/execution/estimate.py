"""Estimates what a plan takes, for the dry run: time from records on disk or from the model's size, and memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from kvbench.data.documents import Document
from kvbench.data.tasks import load_task
from kvbench.execution.batch_size import rows_at_once, scores_at_once
from kvbench.execution.pool import PROCESS, children
from kvbench.models.sizes import sizes_of
from kvbench.parsing import parse_json
from kvbench.planning.quality import Plan
from kvbench.protocols.answer import LENGTHS, usual_length
from kvbench.store.folder import RECORDS, RunFolder
from kvbench.store.packed import stored, unpacked
from kvbench.store.records import HUMAN, Cell

BYTES_PER_TOKEN = 4
USUAL_ANSWER = 24
"""Tokens of an answer on average, which mostly ends before it must."""
QUESTION = 40
"""Tokens of a question, which every cell reads behind its own cache."""
ROW = 0.25
"""Assumed time of a token in one row of many, relative to a token alone."""
TOGETHER = 16
"""Documents that are continued together, at most: their tokens share forward passes."""
LONGEST = 1280
"""Maximum number of tokens assumed per document, unless the protocol reads all of it (``block``, ``stream``)."""
CHUNK = 64
"""Tokens that are fed at a time."""
ARITHMETIC = 1.6
"""Assumed time of reading relative to that of matrix products of its size."""
CALL = 4e-4
"""Assumed seconds that a layer costs for every forward pass, however few tokens it is given."""
BANDWIDTH = 6e9
"""Assumed bytes of weights per second, which bound a forward pass of a single token."""


def estimate_seconds(
    plan: Plan, folder: RunFolder, counts: Mapping[str, int] = MappingProxyType({})
) -> dict[str, float | None]:
    """Estimated seconds per cell for the documents not on disk; None if there is nothing to estimate from.

    Args:
        counts: workload -> number of its documents, where it is known better than by :func:`expected`.
    """
    found: dict[str, float | None] = {}
    per_document = {cell.key: _measured(folder, cell) for cell in plan.cells}
    for workload in dict.fromkeys(cell.workload for cell in plan.cells):
        mine = [cell for cell in plan.cells if cell.workload == workload]
        documents = plan.corpora[mine[0].task].documents
        documents = documents[: plan.request.limit or len(documents)]
        known = [s for cell in mine if (s := per_document[cell.key]) is not None and cell.method != HUMAN]
        sharing = [cell for cell in mine if _shares(cell)]
        for cell in mine:
            left = counts.get(workload, expected(plan, cell)) - len(folder.documents(cell))
            cost = per_document[cell.key]
            if cost is None:
                together = len(sharing) if cell in sharing else 1
                cost = float(np.mean(known)) if known else _by_arithmetic(plan, cell, documents, together)
                if cell.method == HUMAN and cost is not None:
                    cost = 0.0  # its texts are there
            found[cell.key] = None if cost is None else max(0, left) * cost / children(plan)
    return found


def expected(plan: Plan, cell: Cell) -> int:
    """Number of documents of a cell, as far as it is known before they are cut; samples are made from all texts."""
    count = int(cell.options.get("samples", len(plan.corpora[cell.task].documents)))
    return min(plan.request.limit or count, count)


def estimate_memory(plan: Plan) -> Memory | None:
    """Estimated bytes of one process; None if the sizes of the model are unknown."""
    sizes = sizes_of(Path(plan.model.location)) if plan.model.is_folder else None
    if sizes is None:
        return None
    width = 2 if plan.request.dtype in ("bfloat16", "float16") else 4
    longest = max(_tokens(plan, cell)[1] for cell in plan.cells)
    weights, cache = plan.model.weight_bytes * width // 4, longest * sizes.entry_bytes * width // 4
    scored = any(not cell.answers and not cell.writes for cell in plan.cells)
    targets = min(longest, LONGEST)
    rows = rows_at_once(targets, sizes.vocabulary) if scored else 1
    scores = scores_at_once(targets, sizes.vocabulary) if scored else targets * sizes.vocabulary
    logits = (3 if scored else 1) * scores * 4
    return Memory(weights, cache, weights + rows * cache + logits + PROCESS, children(plan))


class Memory(NamedTuple):
    """Bytes of the weights, of the full cache of the longest text, and of one process at its largest; and how many
    processes there are."""

    weights: int
    cache: int
    peak: int
    processes: int


def _measured(folder: RunFolder, cell: Cell) -> float | None:
    """Mean seconds per document on disk; damaged lines are ignored, and None is returned if there are no others."""
    path = stored(folder.cell_folder(cell) / RECORDS)
    seconds = []
    for line in unpacked(path).splitlines() if path.exists() else ():
        try:
            seconds.append(float(parse_json(line)["seconds"]))
        except (ValueError, KeyError, TypeError):
            continue
    return float(np.mean(seconds)) if seconds else None


def _shares(cell: Cell) -> bool:
    """Whether a cell reads a context together with others: a policy that compresses it at its end."""
    return cell.options.get("prefill") == "once" and (cell.answers or cell.protocol == "prefix") and not cell.adapter


def _by_arithmetic(plan: Plan, cell: Cell, documents: tuple[Document, ...], together: int) -> float | None:
    """Estimated seconds per document, from the time of matrix products and of calls.

    Args:
        together: number of cells that share reading a context, and a forward pass for a token of all answers.
    """
    sizes = sizes_of(Path(plan.model.location)) if plan.model.is_folder else None
    if sizes is None or plan.request.device.startswith("cuda") or not documents:
        return None
    weights, calls = plan.model.weight_bytes / 4, sizes.layers * CALL
    read, _, written = _tokens(plan, cell)
    own = 0.0 if together == 1 else QUESTION if cell.answers else read / 4
    speed = speed_of(plan.request.cell_dtype)
    step = max(plan.model.weight_bytes / BANDWIDTH, 2 * weights / speed) + calls
    if together > 1:
        step *= ROW
    fed = (read - own) / together + own
    return ARITHMETIC * fed * 2 * weights / speed + fed / CHUNK * calls + written * step


class Tokens(NamedTuple):
    """Tokens of a document on average and at most, and those that are generated for it."""

    read: float
    longest: int
    written: float


def _tokens(plan: Plan, cell: Cell) -> Tokens:
    if cell.answers:
        given = cell.options["length"]
        sizes = sizes_of(Path(plan.model.location)) if plan.model.is_folder else None
        context = sizes.context if sizes else min(LENGTHS)
        is_made = "samples" in cell.options
        length = int(given) if given != "auto" else usual_length(context) if is_made else context
        if is_made:
            return Tokens(length, length, USUAL_ANSWER)
    documents = plan.corpora[cell.task].documents
    documents = documents[: plan.request.limit or len(documents)]
    if cell.answers:
        asked = [len(document.sample.questions) for document in documents if document.sample is not None]
        lengths = [min(len(document.text.encode()) // BYTES_PER_TOKEN, length) for document in documents]
        return Tokens(float(np.mean(lengths)), max(lengths), USUAL_ANSWER * float(np.mean(asked)))
    if documents and documents[0].turns:
        return _of_turns(plan, cell, documents)
    cap = 1 << 40 if cell.protocol in ("block", "stream") else LONGEST
    lengths = [min(len(document.text.encode()) // BYTES_PER_TOKEN, cap) for document in documents]
    block = cell.options.get("block", "")
    longest = 512 if cell.protocol == "block" and not block.isdecimal() else int(block or max(lengths))
    if not cell.writes:
        return Tokens(float(np.mean(lengths)), longest, 0.0)
    new = cell.options.get("new_tokens", "")
    return Tokens(256.0, 512, (int(new) if new.isdecimal() else 64) / min(len(documents), TOGETHER))


def _of_turns(plan: Plan, cell: Cell, documents: tuple[Document, ...]) -> Tokens:
    """A dialogue is read anew at every step: so many turns, the one after them, and its answer."""
    spec = load_task(plan.task_files[cell.task]).online
    sizes = [[len(turn.encode()) // BYTES_PER_TOKEN for turn in document.turns] for document in documents]
    lengths = [sum(one[: t + 2]) for one in sizes for t in (spec.steps if spec else ()) if t + 2 <= len(one)]
    return Tokens(sum(lengths) / len(documents), max(lengths, default=0), 0.0)


@cache
def speed_of(dtype: str) -> float:
    """Operations per second of matrix products of the usual shapes, by PyTorch on the threads that it would take.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``; ``auto`` counts as float32.
    """
    import torch

    kind: torch.dtype = getattr(torch, dtype, torch.float32)
    a, b = torch.ones(CHUNK, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
    torch.mm(a, b)
    started = time.perf_counter()
    for _ in range(8):
        torch.mm(a, b)
    return 8 * 2 * CHUNK * 1024**2 / (time.perf_counter() - started)


def slow_dtype(plan: Plan) -> str | None:
    """A sentence if the processor computes faster in float32 than in the dtype asked for, for want of instructions."""
    from kvbench.models.device import pick_device

    dtype = plan.request.cell_dtype
    if dtype not in ("bfloat16", "float16") or pick_device(plan.request.device).type != "cpu":
        return None
    share = speed_of(dtype) / speed_of("float32")
    if share > 0.8:
        return None
    return (
        f"This processor multiplies in {dtype} at {share:.2f} of its speed in float32: without --dtype {dtype} the "
        "same is measured faster, if the memory is enough."
    )
