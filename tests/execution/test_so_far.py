"""What the progress display says while a run goes on."""

from __future__ import annotations

import io
import math
from dataclasses import replace

from rich.console import Console

from kvbench.execution.so_far import Display, SoFar
from tests.helpers.records import ASKED, FULL_ASKED, LOCAL, SINKS, record, sample

FULL = replace(SINKS, method="full", ratio_asked=None)


def test_perplexities_are_of_all_targets_so_far() -> None:
    """Nats and targets are summed, as in the table: not the mean of the documents' perplexities."""
    found = SoFar()
    found.add(FULL, [replace(record("a"), nll=20.0, tokens=10), replace(record("b"), nll=30.0, tokens=30)])
    found.add(SINKS, [replace(record("a"), nll=40.0, tokens=10)])
    assert found.line(SINKS) == (
        f"so far, minidocs: full {math.exp(50 / 40):.2f} (2), sinks 0.5 {math.exp(4):.2f} (1)"
    )


def test_the_full_cache_stands_first_and_the_last_cells_behind_it() -> None:
    found = SoFar()
    for method in ("a", "b", "c", "d", "e"):
        found.add(replace(LOCAL, method=method), [record("x")])
    found.add(FULL, [record("x")])
    found.add(replace(LOCAL, method="a"), [record("y")])
    names = [part.split()[0] for part in found.line(FULL).partition(": ")[2].split(", ")]
    assert names == ["full", "c", "d", "e", "a"]


def test_answers_have_accuracy_by_setting() -> None:
    found = SoFar()
    found.add(FULL_ASKED, [sample("a", [1.0, 0.0]), sample("b", [1.0, 1.0])])
    found.add(ASKED, [sample("a", [0.0, 0.0])])
    found.add(SINKS, [record("x")])
    assert found.line(ASKED) == "so far, needles: full 0.75 (2), sinks 0.5 0.00 (1)"


def test_the_line_stands_below_the_bar_and_is_cut_to_the_width() -> None:
    text = io.StringIO()
    console = Console(file=text, width=60, force_terminal=True)
    with Display(console) as display:
        display.add_task("snapkv 0.5 on books", total=10, documents="3/9 documents x cells")
        display.found = "so far, books: " + "x" * 90
        display.refresh()
    shown = text.getvalue()
    assert "3/9 documents x cells" in " ".join(shown.split())
    assert "so far, books: xxx" in shown
    assert "x" * 61 not in shown
