"""Makes a run folder of prediction files, or adds them to one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import kvbench
from kvbench.errors import StoppedError, UserError
from kvbench.execution.locks import disk, locked
from kvbench.integrations.kvpress.cells import Imported, imported, questions
from kvbench.integrations.kvpress.datasets import DATASETS
from kvbench.integrations.kvpress.predictions import file_of
from kvbench.integrations.kvpress.settings import Settings, settings_of
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.folder import RunFolder
from kvbench.store.manifest import Manifest
from kvbench.store.records import Cell

CONTENT = "imported:kvpress"
"""Content of the manifests of such folders: any files may be added to one."""
_KEPT = "What was written before is kept, and the same command goes on."


@dataclass(frozen=True)
class Summary:
    """What an import did.

    Attributes:
        added: the new cells, with their files.
        present: files whose cells were in the folder already.
        remarks: sentences that the user should know.
    """

    added: tuple[tuple[Cell, Path], ...]
    present: tuple[Path, ...]
    remarks: tuple[str, ...]


def import_predictions(
    paths: Sequence[Path], out: Path, given: Settings | None = None, column: str = "", command: Sequence[str] = ()
) -> Summary:
    """Import prediction files, or folders that hold one each, into a run folder: all of them, or none.

    Args:
        out: a new folder, or one that files were imported into before.
        given: what neither ``config.yaml`` nor the folders' names say.
        column: column of the files that says which rows share a context.
        command: the command line, for ``run.json``.

    Raises:
        UserError: a file cannot be imported, or does not ask what the others ask; nothing is written then.
    """
    folder = RunFolder(out)
    folder.check(CONTENT)
    files = list(dict.fromkeys(map(file_of, paths)))
    made = [one for file in files for one in imported(file, settings_of(file, given or Settings()), column)]
    with locked(out):
        earlier = folder.earlier()
        before = () if earlier is None else earlier.cells
        found = _without_needless(made, before)
        _check_configurations(found, before, out)
        for setting in dict.fromkeys(one.cell.setting for one in found):
            _check_paired([one for one in found if one.cell.setting == setting], folder, earlier)
        cells = _ordered((*before, *(one.cell for one in found)))
        with disk(out, _KEPT, StoppedError):
            _write(found, folder, earlier, cells, command)
    keys = {cell.key for cell in before}
    return Summary(
        tuple((one.cell, one.source) for one in found if one.cell.key not in keys),
        tuple(dict.fromkeys(one.source for one in found if one.cell.key in keys)), tuple(_remarks(found, cells)),
    )


def _without_needless(made: Sequence[Imported], before: Sequence[Cell]) -> list[Imported]:
    """Leave out full caches that are lent to a setting that nothing else was measured in, or that has its own."""
    others = [*before, *(one.cell for one in made if not one.is_lent)]
    wanted = {cell.setting for cell in others if cell.name != "full"}
    own = {cell.setting for cell in others if cell.name == "full" and "lent" not in cell.options}
    return [one for one in made if not one.is_lent or one.cell.setting in wanted - own]


def _check_configurations(found: Sequence[Imported], before: Sequence[Cell], out: Path) -> None:
    """Check that no two files are of the same configuration.

    Raises:
        UserError: two are.
    """
    seen: dict[tuple[str, str, str | None], tuple[str, str]] = {
        _configuration(cell): (cell.key, f"what {out} holds") for cell in before
    }
    for one in found:
        cell, shown = one.cell, str(one.source)
        key, other = seen.setdefault(_configuration(cell), (cell.key, shown))
        if key != cell.key or other not in (shown, f"what {out} holds"):
            raise UserError(
                f"{shown} and {other} are both of {cell.label} by {cell.model}.",
                "Give one of them, or import the other into a folder of its own.",
            )


def _configuration(cell: Cell) -> tuple[str, str, str | None]:
    return cell.setting, cell.name, cell.ratio_asked


def _check_paired(found: Sequence[Imported], folder: RunFolder, earlier: Manifest | None) -> None:
    """Check that files of one setting ask the same questions about the same contexts.

    Raises:
        UserError: they do not; the message says how many pair up, and the line of the first that does not.
    """
    setting = found[0].cell.setting
    first = next((one for one in found if one.is_full), found[0])
    label, theirs, signature = f"{first.cell.label} ({first.source})", first.asked.records, first.info.signature
    for cell in earlier.cells if earlier else ():
        info = earlier.tasks[setting] if earlier and cell.setting == setting else None
        if info and set(there := folder.answers(cell)) == set(info.documents):  # else its writing was interrupted
            label, theirs, signature = f"{cell.label} in {folder.path}", there, info.signature
            break
    for one in found:
        _check_pair(one, label, theirs, signature)


def _check_pair(one: Imported, label: str, theirs: dict[str, AnswerRecord], signature: str) -> None:
    mine = one.asked.records
    same = {name for name in mine if name in theirs and questions(mine[name]) == questions(theirs[name])}
    counts = f"{len(same)} of {len(theirs)} contexts pair up"
    hint = "Give files of one data set, fraction and length, with the same columns."
    for name in mine:
        if name not in same:
            raise UserError(
                f"{one.asked.where[name]}: this is not asked in {label}; {counts}.", hint
            )
    if len(same) < len(theirs):
        raise UserError(f"{one.source}: it lacks questions that {label} has; {counts}.", hint)
    if one.info.signature != signature:
        raise UserError(
            f"{one.source}: contexts were told apart otherwise than in {label} ({one.info.signature}; {signature}).",
            "Use the same --context.",
        )


def _ordered(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, by task, setting (the question hidden first), and the full cache first."""
    unique = {cell.key: cell for cell in cells}
    tasks, settings = (list(dict.fromkeys(names)) for names in zip(
        *((cell.task, cell.setting) for cell in unique.values()), strict=True
    ))

    def place(cell: Cell) -> tuple[int, bool, int, bool]:
        return tasks.index(cell.task), cell.workload != cell.task, settings.index(cell.setting), cell.name != "full"

    return sorted(unique.values(), key=place)


def _write(
    found: Sequence[Imported], folder: RunFolder, earlier: Manifest | None, cells: Sequence[Cell],
    command: Sequence[str],
) -> None:
    """Write ``run.json``, and the records that are not there."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    start = earlier or Manifest(content=CONTENT, started=now, cells=())
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.describe(replace(
        start, command=tuple(command), finished=now, cells=tuple(cells),
        sources={**start.sources, **{one.cell.task: "predictions of kvpress' evaluation" for one in found}},
        tasks={**start.tasks, **{one.cell.setting: one.info for one in found}},
        environment={"imported_from": "kvpress' evaluation", "packages": {"kvbench": kvbench.__version__}},
    ))
    for one in found:
        folder.open_cell(one.cell, one.info.signature)
        present = folder.answers(one.cell)
        folder.append(one.cell, [record for name, record in one.asked.records.items() if name not in present])


def _remarks(found: Sequence[Imported], cells: Sequence[Cell]) -> Iterable[str]:
    for setting in dict.fromkeys(one.cell.setting for one in found):
        mine = [one for one in found if one.cell.setting == setting]
        first = mine[0].cell
        if all(cell.name != "full" for cell in cells if cell.setting == setting):
            yield (
                f"{first.workload} by {first.model} has no file of the full cache, so there are no differences to it: "
                "give that of no_press as well."
            )
        if any(one.is_lent for one in mine):
            yield f"{first.workload}: the full cache is that of the question hidden, since nothing is removed there."
        if any(not one.asked.by for one in mine) and not _has_own_contexts(mine[0]):
            yield (
                f"{first.workload}: the files do not say which rows share a context, so that each is resampled alone, "
                "and intervals may be too narrow. --context COLUMN names a column that says it."
            )


def _has_own_contexts(one: Imported) -> bool:
    name = one.info.signature.removeprefix("kvpress:").partition("|")[0]
    return DATASETS[name].own_contexts
