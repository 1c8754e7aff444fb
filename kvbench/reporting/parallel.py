"""Runs functions (here: tasks) in several processes; these are forked, so that data need not be sent to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_all_start_methods, get_context
from typing import Any, TypeVar

T = TypeVar("T")
MAX_PROCESSES = 4
"""Largest number of processes."""

_inherited: list[Callable[[], Any]] = []
"""The tasks, which a forked process finds in its copy of the memory."""


def in_parallel(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """Run tasks in parallel and return their results in order; one after the other on one core or without ``fork``."""
    workers = min(MAX_PROCESSES, os.cpu_count() or 1, len(tasks))
    if workers < 2 or "fork" not in get_all_start_methods():
        return [task() for task in tasks]
    _inherited[:] = tasks
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            return list(pool.map(_carried_out, range(len(tasks))))
    finally:
        _inherited.clear()


def _carried_out(number: int) -> Any:
    return _inherited[number]()
