"""Table of the texts generated for one document, for reading."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvbench.metrics.prefix_match import common_prefix
from kvbench.store.faults import faults_in, named, remarks_of
from kvbench.store.folder import RunFolder
from kvbench.store.records import HUMAN, Cell, GenerationRecord, Output


def side_by_side(folder: RunFolder, setting: str, document: str) -> Group:
    """Show the prefix, the human text, and the texts of the full cache and of every method, sampled and greedy.

    Args:
        setting, document: must exist in the run.
    """
    cells = [cell for cell in folder.cells() if cell.setting == setting]
    found: list[tuple[Cell, GenerationRecord]] = []
    for cell in cells:
        record = folder.texts(cell).get(document)
        if record is not None:
            found.append((cell, record))
    people = next((record for cell, record in found if cell.name == HUMAN), None)
    full = next((record for cell, record in found if cell.name == "full"), None)
    parts: list[Panel | Table | Text] = []
    if people is not None:
        title = Text(f"{cells[0].task}: {document}, prefix")
        parts.append(Panel(Text(people.prefix or ""), title=title, title_align="left"))
        parts.append(Panel(Text(people.of("human")[0].text), title="human", title_align="left"))
    written = [(cell, record) for cell, record in found if cell.name != HUMAN]
    if not written:
        return Group(*parts, Text("Nothing has been written for this document yet: run the same command again."))
    kinds = list(dict.fromkeys((o.decode, o.draw) for o in written[0][1].outputs))
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, expand=True)
    table.add_column("method", no_wrap=True)
    for decode, draw in kinds:
        table.add_column(f"{decode} {draw + 1}" if sum(k == decode for k, _ in kinds) > 1 else decode, ratio=1)
    order = ("full", "none", "adapted")
    written.sort(key=lambda item: order.index(item[0].method) if item[0].method in order else len(order))
    for cell, record in written:
        label = f"{named(cell.method, remarks_of(cell))} {cell.ratio_asked or ''}".strip()
        table.add_row(label, *(_text(record.of(decode)[draw], full) for decode, draw in kinds))
    parts += [table, Text("Greedy: | stands before the first token that differs from the full cache's.", style="dim")]
    parts += [Text(fault, style="yellow") for fault in faults_in((c.method, remarks_of(c)) for c, _ in written)]
    return Group(*parts)


def _text(output: Output, full: GenerationRecord | None) -> Text:
    """Format an output; greedy ones get a mark where they first differ from the full cache's."""
    shown = output.text if output.text.strip() else "(empty)"
    ended = Text(" (ended)" if output.ended else "", style="dim")
    if output.decode != "greedy" or full is None:
        return Text(shown) + ended
    theirs = full.of("greedy")[output.draw]
    same = common_prefix(output.ids, theirs.ids)
    if same == max(len(output.ids), len(theirs.ids)):
        return Text(shown) + ended
    # The text of single tokens is not stored: the mark is where the texts differ, at most that many tokens on.
    place = common_prefix([*map(ord, output.text)], [*map(ord, theirs.text)])
    return Text(output.text[:place], style="dim") + Text("|", style="bold red") + Text(output.text[place:]) + ended
