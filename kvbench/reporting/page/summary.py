"""What runs say in sentences: who is best at which ratio, what is significant, what is not decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from kvbench.analysis.largest_ratio import FOUND
from kvbench.metrics.largest_ratio import LARGEST_RATIO
from kvbench.reporting.best import NO_USE, UNDER_FLOOR, are_unequal, best, unranked
from kvbench.reporting.tables.compact import main_metric, reading, too_few_to_test
from kvbench.reporting.tables.format import by_setting, is_control, name_of, task_of
from kvbench.statistics import SIGNIFICANT
from kvbench.store.rows import Row

_ACCURACY = ("answer_accuracy", "accuracy")
_NAMED = 4
"""Methods that a sentence names at most."""


@dataclass(frozen=True)
class Task:
    """What is said of one task: its name, and sentences."""

    label: str
    sentences: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """Sentences on all tasks, by model, and on each task."""

    sentences: tuple[str, ...]
    tasks: tuple[Task, ...]


def summary_of(rows: Sequence[Row]) -> Summary:
    """What rows say; profiles are left out, since speed is no loss."""
    settings = {key: mine for key, mine in by_setting(rows).items() if key[1] != "profile"}
    models = dict.fromkeys(model for _, _, model, _ in settings)
    tasks = tuple(
        Task(f"{label} ({protocol}, {model}, seed {seed})", _of_task(mine))
        for (label, protocol, model, seed), mine in settings.items()
    )
    sentences = tuple(
        sentence for model in models
        for sentence in _of_model(model, [mine for key, mine in settings.items() if key[2] == model])
    )
    return Summary(sentences, tuple(task for task in tasks if task.sentences))


def _of_model(model: str, tasks: Sequence[list[Row]]) -> list[str]:
    """Sentences on one model: who keeps most at each ratio, how much is told apart from the full cache, what is not
    decided."""
    solved = [mine for mine in tasks if not _why(mine)]
    found = []
    ratios = sorted({row.ratio_asked for mine in solved for row in _rivals(mine) if row.ratio_asked is not None})
    for ratio in ratios:
        alike = [[row for row in _rivals(mine) if row.ratio_asked == ratio] for mine in solved]
        tested = [row for some in alike for row in some if row.p_value is not None]
        lost = sum((row.p_value or 0.0) < SIGNIFICANT for row in tested)
        parts = [part for part in (_accuracy(ratio, solved), _text(alike)) if part]
        if tested:
            parts.append(f"{lost} of {len(tested)} comparisons with the full cache are significant")
        if parts:
            found.append(f"{model}, {ratio:g} removed: {'; '.join(parts)}.")
    for why, said in (
        (UNDER_FLOOR, "does not solve, even with the full cache"),
        (NO_USE, "does not predict reliably better with a context than without one"),
    ):
        under = [task_of(mine[0]) for mine in tasks if _why(mine) == why]
        if under:
            found.append(f"{model} {said}, and ranks nothing by: {'; '.join(under)}.")
    few = sum(bool(too_few_to_test([row for row in _rivals(mine) if row.p_value is not None])) for mine in solved)
    if few:
        found.append(f"{model}: {_tasks(few)} with too few documents for any significance.")
    return found


def _accuracy(ratio: float, tasks: Sequence[list[Row]]) -> str:
    """Who keeps most of the full cache's accuracy: mean over the tasks that all of them answer, with the bytes."""
    shares: dict[str, list[float]] = {}
    held: dict[str, list[float]] = {}
    count = 0
    for mine in tasks:
        rivals = [row for row in _rivals(mine) if row.ratio_asked == ratio and row.metric in _ACCURACY]
        full = next((r.value for r in mine if rivals and r.metric == rivals[0].metric and r.name == "full"), None)
        if not full:
            continue
        count += 1
        share = _bytes(mine, ratio)
        for row in rivals:
            shares.setdefault(name_of(row), []).append((row.value or 0.0) / full)
            held.setdefault(name_of(row), []).extend(share.get(name_of(row), []))
    means = sorted(((fmean(some), name) for name, some in shares.items() if len(some) == count), reverse=True)
    if len(means) < 2:
        return ""
    (best, first), (_, second) = means[:2]
    ahead = sum(a > b for a, b in zip(shares[first], shares[second], strict=True))
    size = f", with {100 * fmean(held[first]):.0f} % of its bytes" if held[first] else ""
    return (
        f"of the full cache's accuracy, {first} keeps {100 * best:.0f} % (mean of {_tasks(count)}{size}), then "
        + ", ".join(f"{name} {100 * share:.0f} %" for share, name in means[1:_NAMED])
        + f"; {first} is ahead of {second} on {ahead} of {count}"
    )


def _text(alike: Sequence[list[Row]]) -> str:
    """Who has the lowest perplexity most often, of those that removed as much on average."""
    compared = [some for some in alike if len(some) > 1 and some[0].metric == "ppl"]
    leads = Counter(name_of(row) for some in compared for row in best(some))
    if not leads:
        return ""
    named = ", ".join(f"{name} ({count} of {len(compared)})" for name, count in leads.most_common(_NAMED))
    unequal = ", among those that removed as much on average" if any(map(are_unequal, compared)) else ""
    return f"lowest perplexity{unequal}: {named}"


def _bytes(rows: Sequence[Row], ratio: float) -> dict[str, list[float]]:
    """Share of the full cache's bytes that each method holds at a ratio."""
    at = {(name_of(row), row.metric): row.value for row in rows if row.ratio_asked == ratio and _is_whole(row)}
    return {
        name: [value / full] for (name, metric), value in at.items()
        if metric == "kv_bytes_physical" and value is not None and (full := at.get((name, "kv_bytes_full")))
    }


def _of_task(rows: Sequence[Row]) -> tuple[str, ...]:
    whole = list(filter(_is_whole, rows))
    if _why(rows) or not _rivals(whole):
        return ()
    found = [reading(whole, main_metric(whole))]
    largest = [row for row in rows if row.metric == LARGEST_RATIO and row.params["of"] == main_metric(whole)]
    kept = sorted((row for row in largest if row.params["outcome"] == FOUND), key=lambda row: -(row.value or 0.0))
    if kept:
        named = ", ".join(f"{name_of(row)} {row.value:g}" for row in kept)
        found.append(f"Largest ratio without significant loss: {named}.")
    undecided = [name_of(row) for row in largest if row.params["untested"]]
    if undecided:
        found.append(f"Not decided at some ratios, since too few documents differ: {', '.join(undecided)}.")
    return tuple(sentence for sentence in found if sentence)


def _rivals(rows: Sequence[Row]) -> list[Row]:
    """The rows of a task that are compared with each other: its main metric, without controls and bins."""
    whole = list(filter(_is_whole, rows))
    metric = main_metric(whole) if whole else ""
    return [row for row in whole if row.metric == metric and not is_control(row.name) and row.value is not None]


def _is_whole(row: Row) -> bool:
    """Whether a row is about all documents, not a bin of them."""
    return row.params.get("bin") is None


def _why(rows: Sequence[Row]) -> str:
    """Why a task ranks nothing; empty if it does."""
    whole = list(filter(_is_whole, rows))
    return unranked(whole, main_metric(whole)) if whole else ""


def _tasks(count: int) -> str:
    return f"{count} task{'' if count == 1 else 's'}"
