"""Tracks which documents are on disk, reading only what has been appended since."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvbench.parsing import parse_json
from kvbench.store.folder import RECORDS, RunFolder
from kvbench.store.packed import stored
from kvbench.store.records import Cell


@dataclass
class _Seen:
    read: int = 0
    file: int = 0
    documents: set[str] = field(default_factory=set)


class RunProgress:
    """The documents that cells have records of; what has been read is not read again.

    Other processes may append meanwhile.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.seen: dict[str, _Seen] = {}

    def documents(self, cell: Cell) -> set[str]:
        """The documents of a cell that are on disk now.

        Raises:
            ValueError, KeyError, TypeError: a line is not a record.
        """
        seen = self.seen.setdefault(cell.key, _Seen())
        path = self.folder.cell_folder(cell) / RECORDS
        if stored(path) != path:
            return self.folder.documents(cell)
        state = path.stat() if path.exists() else None
        size, file = (state.st_size, state.st_ino) if state else (0, seen.file)
        if size < seen.read or (seen.read and file != seen.file):  # rewritten without incomparable records
            seen = self.seen[cell.key] = _Seen()
        seen.file = file
        if size == seen.read:
            return seen.documents
        with path.open("rb") as lines:
            lines.seek(seen.read)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                seen.documents.add(parse_json(line)["document"])
                seen.read += len(line)
        return seen.documents
