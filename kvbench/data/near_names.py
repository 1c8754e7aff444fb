"""Tasks and metrics that are asked for by another name, or one in the place of the other."""

from __future__ import annotations

from collections.abc import Iterable

from kvbench.errors import UserError, unknown
from kvbench.metrics import ANSWERED, GENERATION_NAMES, METRIC_NAMES, OTHER_NAMES

_OTHER_TASKS = {
    "wikitext": "wikitext2", "wikitext-2": "wikitext2", "pg19": "books", "c4": "c4-gen", "niah": "needles",
    "generation": "minidocs-gen", "qa": "docqa",
}
"""What tasks are called elsewhere."""


def unknown_task(name: str, tasks: Iterable[str]) -> UserError:
    """The error for a task that does not exist, which may be the name of a metric."""
    meant = OTHER_NAMES.get(name.lower(), name.lower())
    if meant in METRIC_NAMES:
        return UserError(
            f"Unknown task {name!r}: that is a metric, and is measured on every task that has it.",
            f"Name such a task: {_tasks_with(meant)}.",
        )
    return unknown("task", name, tasks, _OTHER_TASKS)


def check_chosen(metric: str) -> None:
    """Check that a metric is one of written text, which are those that can be chosen.

    Raises:
        UserError: it is not.
    """
    if metric in GENERATION_NAMES:
        return
    meant = OTHER_NAMES.get(metric.lower(), metric)
    if meant in METRIC_NAMES and meant not in GENERATION_NAMES:
        of_text = "; of written text it is --metric gen_ppl" if meant == "ppl" else ""
        raise UserError(
            f"--metric chooses among the metrics of written text. {meant!r} is none of them, and is measured on every "
            "task that has it.", f"Leave --metric out, and name such a task: {_tasks_with(meant)}{of_text}.",
        )
    raise unknown("metric of written text", metric, GENERATION_NAMES, OTHER_NAMES)


def _tasks_with(metric: str) -> str:
    """Tasks that a metric is measured on, as options."""
    if metric in ("accuracy", "answer_nll"):
        return "--task recall"
    if metric in GENERATION_NAMES:
        return "--task minidocs-gen"
    if metric in {one.name for one in ANSWERED}:
        return "--task ruler-niah-single-2, or another that asks questions"
    return "--task minidocs, --task wikitext2, or --task books --data FILE"
