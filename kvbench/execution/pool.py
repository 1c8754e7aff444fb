"""The child processes of one plan: how many to start, and the state of each."""

from __future__ import annotations

import os
import queue
import time

import psutil

from kvbench.execution.channel import Event
from kvbench.execution.job import Job
from kvbench.execution.process import WorkerProcess
from kvbench.execution.shards import FEW, Shard
from kvbench.judges.choice import JudgeChoice
from kvbench.planning.quality import Plan

SMALL_MODEL_BYTES = 1 << 30
"""Weights in float32 of which every child may hold its own, if the memory is enough."""
TINY_MODEL_BYTES = 256 << 20
"""Weights of a model so small that a second thread helps a child little."""
MOST_CHILDREN = 4
SHARDS_EACH = 4
"""Shards that there must be for every child of a model that is not tiny: the last ones are measured by few children."""
UNKNOWN = 1 << 16
"""Shards of texts whose number nobody knows yet: enough."""
PROCESS = 700 << 20
"""Bytes of a process with PyTorch and transformers, before it has loaded a model."""

Events = queue.Queue[tuple[int, Event | None]]


class WorkerHandle:
    """A child process and the shard that it is measuring.

    Attributes:
        tokens, records: tokens and records of the shard that are done.
        ended: whether it will not measure anything more.
    """

    def __init__(self, job: Job, number: int, events: Events) -> None:
        self.job, self.number, self.events = job, number, events
        self.is_ready = self.ended = False
        self.shard: Shard | None = None
        self.tokens = self.records = 0
        self.child = WorkerProcess(job, number, events)
        self.touch()

    def restart(self) -> None:
        """Start a new child process in place of the dead one."""
        self.child.stop()
        self.is_ready = False
        self.child = WorkerProcess(self.job, self.number, self.events)
        self.touch()

    @property
    def is_idle(self) -> bool:
        return self.is_ready and not self.ended and self.shard is None

    def take(self, shard: Shard) -> None:
        self.shard, self.tokens, self.records, self.child.at = shard, 0, 0, None
        self.touch()

    def dismiss(self) -> None:
        if self.is_idle:
            self.ended = True
            self.child.dismiss()

    def touch(self) -> None:
        self.touched = time.monotonic()

    @property
    def seconds_since(self) -> float:
        """Seconds since the last event from the child."""
        return time.monotonic() - self.touched

    def stop(self) -> None:
        self.child.stop()


def started_workers(plan: Plan, most: int, skip_infeasible: bool, events: Events) -> list[WorkerHandle]:
    """Start the child processes of a plan.

    Args:
        most: maximum number of children; 0 for as many as are useful.
        skip_infeasible: see :class:`Job`.
    """
    request, count = plan.request, children(plan, most)
    cores = request.threads or os.cpu_count() or 1
    # If the user gives the number of children, others may run on the same machine: one alone then takes one thread,
    # since several threads per process would compete for the cores.
    alone = 1 if most and _is_small(plan) else 0  # 0: PyTorch's choice
    threads = max(1, cores // count) if count > 1 or request.threads else alone
    data = str(request.data) if request.data else None
    job = Job(
        plan.cells, plan.model.location, plan.task_files, data, request.limit, threads, plan.judging, skip_infeasible,
        request.column,
    )
    return [WorkerHandle(job, number, events) for number in range(count)]


def children(plan: Plan, most: int = 0) -> int:
    """Number of child processes that measure at the same time.

    On a CPU several single-threaded children are faster than one with several threads, since a model that reads a few
    tokens at a time is limited by the overhead of calls. Models too large for that are measured by one child, and so is
    any model on a GPU, unless the user asks for more.

    Args:
        most: what the user asks for; 0 for as many as are useful.
    """
    shards = _most_shards(plan)
    if not _is_small(plan):
        return min(most or 1, shards)
    found = min(plan.request.threads or os.cpu_count() or 1, most or MOST_CHILDREN, shards)
    if most or plan.model.weight_bytes <= TINY_MODEL_BYTES:
        return found
    fitting = psutil.virtual_memory().available // (PROCESS + 3 * plan.model.weight_bytes)
    found = max(1, min(found, fitting))
    return found if shards >= SHARDS_EACH * found else 1


def _is_small(plan: Plan) -> bool:
    """Whether a model is measured on a CPU, and is small enough for several children."""
    on_cpu = plan.request.device == "cpu" or (plan.request.device == "auto" and not _cuda())
    return on_cpu and 0 < plan.model.weight_bytes <= SMALL_MODEL_BYTES and not _has_large_judge(plan.judging)


def _most_shards(plan: Plan) -> int:
    """Upper bound on the number of shards; a child without a shard would load the model for nothing."""
    if not plan.request.limit or any(cell.protocol == "online" for cell in plan.cells):
        return UNKNOWN  # one document becomes many trials
    return len({cell.workload for cell in plan.cells}) * -(-plan.request.limit // FEW)


def _has_large_judge(judging: JudgeChoice) -> bool:
    """Whether a judge is large or of unknown size; every child would load it."""
    return any(not 0 < model.weight_bytes <= SMALL_MODEL_BYTES for model in judging.models.values())


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
