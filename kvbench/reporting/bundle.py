"""A run as one file to give to others: its records and settings, without texts, paths and names of machines."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.analysis.texts import without_texts
from kvbench.errors import UserError
from kvbench.parsing import bytes_of
from kvbench.store.folder import FAILURE, MASKS, MAUVE, RECORDS, RUN, Record, RunFolder, write_atomic
from kvbench.store.manifest import TaskInfo
from kvbench.store.nameless import named_anew, without_message, without_paths
from kvbench.store.records import HUMAN, Cell

if TYPE_CHECKING:
    from rich.console import Console

LEFT_OUT = (
    "Left out: texts and tokens (what was read, written, asked and answered), sentence embeddings, paths, and messages "
    "of failures. Ids of documents are in it. Numbers are the same; 'kvbench show' has nothing to show, "
    "'kvbench compare' no prefix_match, and the run cannot be continued."
)
_READ_ME = f"""A run of kvbench, without its texts. Unpack it, then:

    kvbench report FOLDER                  tables, figures and a page
    kvbench compare FOLDER OTHER-FOLDER    every metric, paired by document

{LEFT_OUT}
"""
_NO_TIME = (1980, 1, 1, 0, 0, 0)
"""Every file's time, so that equal runs make equal archives."""


@dataclass(frozen=True)
class Bundle:
    """An archive that was written.

    Attributes:
        size: bytes.
        is_finished: whether every cell of the run was complete.
    """

    path: Path
    size: int
    is_finished: bool


def write_bundle(run: Path, out: Path) -> Bundle:
    """Write a run folder as ``NAME.zip``, NAME being the folder's, whole or not at all.

    Args:
        out: folder to write into; made if it does not exist.

    Raises:
        UserError: it is not a run folder, is damaged, or the archive cannot be written.
    """
    folder = RunFolder(run)
    manifest = folder.manifest()
    cells = named_anew(manifest)
    described = replace(without_paths(manifest, cells), without_texts=True)
    files = {"README.txt": _READ_ME, RUN: described.text()}
    if masks := folder.masks():
        files[MASKS] = json.dumps(masks) + "\n"
    for setting in dict.fromkeys(cell.setting for cell in manifest.cells):
        mine = [cell for cell in manifest.cells if cell.setting == setting]
        for cell, records in _records(folder, mine, manifest.tasks.get(setting)):
            place = f"cells/{cells[cell.key].key}"
            if lines := "".join(map(_line, records)):
                files[f"{place}/{RECORDS}"] = lines
            if failure := folder.failure(cell):
                kept = without_message(failure, cell, cells[cell.key])
                files[f"{place}/{FAILURE}"] = json.dumps(dataclasses.asdict(kept), indent=1) + "\n"
            mauve = folder.cell_folder(cell) / MAUVE
            if mauve.exists():
                files[f"{place}/{MAUVE}"] = mauve.read_text(encoding="utf-8", errors="replace")
    name = run.resolve().name
    path = out / f"{name}.zip"
    packed = _packed({f"{name}/{inner}": text for inner, text in files.items()})
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, packed)
    except OSError as error:
        raise UserError(f"The bundle {path} cannot be written: {error.strerror}.", "Choose another --out.") from error
    return Bundle(path, len(packed), manifest.finished is not None)


def print_bundle(runs: Sequence[Path], out: Path | None, console: Console) -> None:
    """Write the bundle of one run and say where it is, how large, and what is not in it.

    Args:
        out: folder to write into; None for the run's own.

    Raises:
        UserError: as for :func:`write_bundle`; or there are several runs.
    """
    if len(runs) > 1:
        raise UserError(f"A bundle is of one run, and {len(runs)} are given.", "Give them one by one.")
    found = write_bundle(runs[0], out or runs[0])
    console.print(f"bundle: {found.path} ({bytes_of(found.size)})", soft_wrap=True, highlight=False, markup=False)
    if not found.is_finished:
        console.print("The run is not finished: reports of the bundle say what is missing.", highlight=False)
    console.print(LEFT_OUT, highlight=False, markup=False)


def bundle_notes(runs: Sequence[Path]) -> list[str]:
    """A note for every run that is an unpacked bundle."""
    return [
        f"{run} is a bundle of a run that was measured elsewhere. {LEFT_OUT}"
        for run in runs if RunFolder(run).manifest().without_texts
    ]


def _records(
    folder: RunFolder, cells: Sequence[Cell], info: TaskInfo | None
) -> Iterable[tuple[Cell, Sequence[Record]]]:
    """The records of the cells of a setting, without texts.

    What metrics count in texts is known of complete cells only, as in a report; other cells keep what says how far
    they are.
    """
    documents = set(info.documents) if info else set()
    complete = [cell for cell in cells if cell.writes and documents and documents <= folder.documents(cell)]
    people = next((folder.texts(cell) for cell in complete if cell.name == HUMAN), {})
    full = next((folder.texts(cell) for cell in complete if cell.name == "full"), None)
    for cell in cells:
        found: Sequence[Record]
        if cell.is_profile:
            found = list(folder.measurements(cell).values())
        elif cell.answers:
            found = [record.without_texts() for record in folder.answers(cell).values()]
        elif not cell.writes:
            found = list(folder.records(cell).values())
        elif info is not None and cell in complete:
            found = without_texts(cell, folder.texts(cell), people, full, info)
        else:
            found = [record.without_texts({}) for record in folder.texts(cell).values()]
        yield cell, found


def _line(record: Record) -> str:
    return json.dumps(dataclasses.asdict(record), allow_nan=False, ensure_ascii=False) + "\n"


def _packed(files: dict[str, str]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _NO_TIME)
            entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            archive.writestr(entry, files[name].encode(errors="backslashreplace"))
    return memory.getvalue()
