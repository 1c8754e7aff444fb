"""Answers to the questions about one context, for reading."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from kvbench.store.answer_records import Answer, AnswerRecord
from kvbench.store.faults import faults_in, named, remarks_of
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell


def answers_side_by_side(folder: RunFolder, setting: str, document: str) -> Group:
    """Show what the full cache and every method answered to each question about a context, with its score.

    Args:
        setting, document: must exist in the run.
    """
    cells = [cell for cell in folder.cells() if cell.setting == setting]
    found = [(cell, record) for cell in cells if (record := folder.answers(cell).get(document)) is not None]
    if not found:
        return Group(Text("Nothing has been answered about this context yet: run the same command again."))
    found.sort(key=lambda item: item[0].name != "full")
    title = Text(f"{cells[0].workload}: {document}")
    faults = faults_in((cell.method, remarks_of(cell)) for cell, _ in found)
    return Group(
        title, *(_question(found, number) for number in range(len(found[0][1].answers))),
        *(Text(fault, style="yellow") for fault in faults),
    )


def _question(found: list[tuple[Cell, AnswerRecord]], number: int) -> Table:
    first = found[0][1].answers[number]
    table = Table(
        title=_asked(first, number), title_justify="left", box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False,
        expand=True,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("score", justify="right")
    table.add_column("answer", ratio=1)
    for cell, record in found:
        answer = record.answers[number]
        label = f"{named(cell.method, remarks_of(cell))} {cell.ratio_asked or ''}".strip()
        table.add_row(label, f"{answer.score:.2f}", Text(answer.text if answer.text.strip() else "(empty)"))
    return table


def _asked(answer: Answer, number: int) -> Text:
    """The question and what counts as right, where the record has them."""
    said = f"question {number + 1}" + (f": {answer.question.strip()}" if answer.question else "")
    return Text(said + (f"\nright: {', '.join(answer.references)}" if answer.references else ""))
