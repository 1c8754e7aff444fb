"""The run folder: files are written atomically or appended and synced; incomplete last lines are tolerated on
reading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from uuid import uuid4

from filelock import FileLock

from kvbench.errors import UserError
from kvbench.parsing import parse_json
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.manifest import Manifest
from kvbench.store.packed import stored, unpacked
from kvbench.store.profile_records import ProfileRecord, load_profile_record
from kvbench.store.records import Cell, DocumentRecord, Failure, GenerationRecord

Record = DocumentRecord | GenerationRecord | AnswerRecord | ProfileRecord

LOCKS = ".locks"

R = TypeVar("R", DocumentRecord, GenerationRecord, AnswerRecord, ProfileRecord)

RUN, CELL, RECORDS, FAILURE, RESULTS, MAUVE, MASKS, SIGNATURE = (
    "run.json", "cell.json", "records.jsonl", "failure.json", "results.json", "mauve.json", "masks.json",
    "signature.txt",
)


def record_of(cell: Cell, raw: dict[str, Any]) -> Record:
    """Create a record of a cell from the output of ``dataclasses.asdict``.

    Raises:
        TypeError, KeyError: a field is missing or unknown.
    """
    if cell.is_profile:
        return load_profile_record(raw)
    if cell.answers:
        return AnswerRecord.load(raw)
    return GenerationRecord.load(raw) if cell.writes else DocumentRecord.load(raw)


def _repair(file: BinaryIO) -> None:
    """Remove an incomplete last line, and move to the end of the file."""
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write the whole content, or nothing: a reader never sees half a file, even if several processes write it."""
    part = path.with_name(f"{path.name}.{uuid4().hex[:12]}.part")
    try:
        data = content if isinstance(content, bytes) else content.encode(errors="backslashreplace")  # lone surrogates
        part.write_bytes(data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def check_writable(path: Path, hint: str = "") -> None:
    """Check that a folder can be made and written; nothing is left there.

    Raises:
        UserError: it cannot.
    """
    parent = path
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UserError(
            f"The output folder {path} cannot be written: {error.strerror} ({parent}).", hint
        ) from error


def _aside(path: Path, signature: str | None) -> Path:
    """Path where a file of another signature is set aside: ``records.jsonl`` as ``records-0123abcd.jsonl``."""
    return path.with_stem(f"{path.stem}-{hashlib.sha256(str(signature).encode()).hexdigest()[:8]}")


def _exchange(path: Path, aside: Path, earlier: Path) -> None:
    """Move a file to ``aside`` and ``earlier`` to its place, if they exist."""
    if path.exists():
        os.replace(path, aside)
    if earlier.exists():
        os.replace(earlier, path)


def _is_left_over(path: Path) -> bool:
    """Whether a file was left by a run that was killed before it had written any file: a lock, or a partial file."""
    return path.name == LOCKS or path.suffix == ".part"


class RunFolder:
    """A run on disk: ``run.json``, and a folder for each cell."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._locks: dict[str, FileLock] = {}
        self._read_before: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def check(self, content: str, fresh: bool = False, shared: bool = False) -> None:
        """Check that the folder can be used for a run of this content; writes nothing.

        Args:
            fresh: whether a run in the folder will be replaced.
            shared: whether it may hold another run, which stays.

        Raises:
            UserError: it is not a folder, is not writable, or holds something else.
        """
        check_writable(self.path, "Choose another folder with --out.")
        if not self.path.exists() or all(_is_left_over(path) for path in self.path.iterdir()):
            return
        if not (self.path / RUN).is_file():
            raise UserError(
                f"The output folder {self.path} holds something that is not a kvbench run.",
                "Choose an empty or a new folder with --out.",
            )
        if fresh:
            return
        earlier = self.manifest()
        if earlier.without_texts:
            raise UserError(
                f"The output folder {self.path} holds an unpacked bundle, whose texts were taken out: it can be "
                "reported and compared, but not continued.", "Choose another folder with --out.",
            )
        if not shared and earlier.content != content:
            raise UserError(
                f"The output folder {self.path} holds another run.",
                "Choose an empty or a new folder with --out.",
            )

    def clear(self) -> None:
        """Remove the files that runs and reports write, and nothing else."""
        for name in (RUN, RESULTS, MASKS, "table.txt", "report.html"):
            (self.path / name).unlink(missing_ok=True)
        for name in ("cells", "figures", "tables", "paper"):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def manifest(self) -> Manifest:
        """Read ``run.json``.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.path / RUN
        try:
            return Manifest.parse(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{self.path} is not a run folder: {path.name} is not there.",
                "Give a folder that 'kvbench run' wrote.",
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", "Make it readable.") from error
        except ValueError as error:
            raise UserError(f"{path} is damaged: {error}.", "Run again with --fresh.") from error

    def earlier(self) -> Manifest | None:
        """Read ``run.json``; None if it does not exist.

        Raises:
            UserError: it is damaged.
        """
        return self.manifest() if (self.path / RUN).exists() else None

    def describe(self, manifest: Manifest) -> None:
        """Write ``run.json``; the caller must hold the lock ``manifest`` if other processes may write it."""
        write_atomic(self.path / RUN, manifest.text())

    def cell_folder(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.key

    def open_cell(self, cell: Cell, signature: str = "", earlier: str | None = None) -> None:
        """Create the cell's folder, delete an old failure, and remove an incomplete last line of its records.

        Records with another signature are not comparable: they are set aside, and records that were set aside earlier
        under this signature are restored.

        Args:
            signature: signature of the records to come; empty if unknown.
            earlier: signature of existing records that have none of their own, if there are any.

        Raises:
            UserError: its records are damaged elsewhere than in the last line.
        """
        folder = self.cell_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        with self.lock("append"):
            (folder / FAILURE).unlink(missing_ok=True)
            write_atomic(folder / CELL, json.dumps(dataclasses.asdict(cell), indent=1) + "\n")
            records = self._unpacked(cell)
            if signature:
                path = folder / SIGNATURE
                made = path.read_text(encoding="utf-8", errors="replace") if path.exists() else earlier
                if made not in (None, signature):
                    for name in (RECORDS, MAUVE):
                        _exchange(folder / name, _aside(folder / name, made), _aside(folder / name, signature))
                write_atomic(path, signature)
            if records.exists():
                with records.open("r+b") as file:
                    _repair(file)
                if not cell.is_profile:
                    self.documents(cell)
                self._drop_incomparable(cell, records)

    def keep_masks(self, masks: dict[str, Any]) -> None:
        """Store example masks of methods in the folder: method and ratio -> mask."""
        with self.lock("manifest"):
            write_atomic(self.path / MASKS, json.dumps({**self.masks(), **masks}) + "\n")

    def masks(self) -> dict[str, Any]:
        """Read the stored masks; empty if there are none."""
        try:
            found = parse_json((self.path / MASKS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def lock(self, name: str) -> FileLock:
        """A lock shared by all processes that use this folder; the operating system releases it when its process
        ends. A network file system must support locks, as NFS 4 does."""
        (self.path / LOCKS).mkdir(parents=True, exist_ok=True)
        if name not in self._locks:  # kept: an interruption in the finaliser of a lock would be lost
            self._locks[name] = FileLock(self.path / LOCKS / f"{name}.lock")
        return self._locks[name]

    def _drop_incomparable(self, cell: Cell, path: Path) -> None:
        """Remove records that were made while ``full`` had failed: they lack the comparison with it, and are
        measured again."""
        if cell.writes or cell.answers or cell.is_profile:
            return
        found = self.records(cell)
        if cell.method != "full" and any(record.kl is None for record in found.values()):
            kept = (record for record in found.values() if record.kl is not None)
            write_atomic(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in kept))

    def append(self, cell: Cell, records: Sequence[Record]) -> None:
        """Append records and sync them to disk; other processes may append at the same time.

        An incomplete last line, left by a process that was killed, is removed first.
        """
        lines = "".join(
            json.dumps(dataclasses.asdict(r), allow_nan=False, ensure_ascii=False) + "\n" for r in records
        )
        with self.lock("append"), self._unpacked(cell).open("a+b") as file:
            _repair(file)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def _unpacked(self, cell: Cell) -> Path:
        """The file of a cell's records, which are added to: if it is packed, it is unpacked first."""
        path = self.cell_folder(cell) / RECORDS
        packed = stored(path)
        if packed != path:
            self.documents(cell)  # a damaged file is refused, and stays
            write_atomic(path, unpacked(packed))
            packed.unlink()
        return path

    def forget(self, cell: Cell, prefix: str) -> None:
        """Remove the records whose keys start with ``prefix``, before they are measured again."""
        path = self._unpacked(cell)
        if path.exists():
            found = self.measurements(cell)
            kept = (record for key, record in found.items() if not key.startswith(prefix))
            write_atomic(path, "".join(json.dumps(dataclasses.asdict(record)) + "\n" for record in kept))

    def records(self, cell: Cell) -> dict[str, DocumentRecord]:
        """The records of a cell that scores text, by document; an incomplete last line is ignored."""
        return self._read(cell, DocumentRecord.load)

    def texts(self, cell: Cell) -> dict[str, GenerationRecord]:
        """The records of a cell that generates text, by document; see :meth:`records`."""
        return self._read(cell, GenerationRecord.load)

    def answers(self, cell: Cell) -> dict[str, AnswerRecord]:
        """The records of a cell that answers questions, by document; see :meth:`records`."""
        return self._read(cell, AnswerRecord.load)

    def measurements(self, cell: Cell) -> dict[str, ProfileRecord]:
        """The records of a cell that is profiled, by kind and number; see :meth:`records`."""
        return self._read(cell, load_profile_record)

    def documents(self, cell: Cell) -> set[str]:
        """Ids of the documents that a cell has records of."""
        if cell.answers:
            return set(self.answers(cell))
        return set(self.texts(cell) if cell.writes else self.records(cell))

    def _read(self, cell: Cell, load: Callable[[dict[str, Any]], R]) -> dict[str, R]:
        path = stored(self.cell_folder(cell) / RECORDS)
        if not path.exists():
            return {}
        state = (path.stat().st_size, path.stat().st_mtime_ns)
        if path in self._read_before and self._read_before[path][0] == state:
            return dict(self._read_before[path][1])
        found: dict[str, R] = {}
        try:
            lines = unpacked(path).split(b"\n")
        except OSError as error:
            raise UserError(
                f"{path} cannot be read: {error.strerror or error}.", "Make it readable, or run again with --fresh."
            ) from error
        for number, line in enumerate(lines, start=1):
            if not line:
                continue
            try:
                record = load(parse_json(line))
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break
                raise UserError(
                    f"{path}, line {number}: damaged record ({error}).",
                    "Delete that line, or run again with --fresh.",
                ) from error
            found.setdefault(record.key, record)
        self._read_before[path] = (state, found)
        return dict(found)

    def fail(self, cell: Cell, failure: Failure) -> None:
        folder = self.cell_folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        content = dataclasses.asdict(failure)
        del content["incomplete"]  # kvbench before 0.2 refuses fields that it does not know
        write_atomic(folder / FAILURE, json.dumps(content, indent=1) + "\n")

    def failure(self, cell: Cell) -> Failure | None:
        path = self.cell_folder(cell) / FAILURE
        if not path.exists():
            return None
        try:
            return Failure(**parse_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # deleted meanwhile, or damaged: the cell has failed either way
            return Failure(cell.key, f"{cell.label}: failed, and the note of it cannot be read.", "Run it again.")

    def cells(self) -> list[Cell]:
        """The cells of the run, in the order of the plan."""
        return list(self.manifest().cells)
