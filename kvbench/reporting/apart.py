"""Tells the rows of several runs apart that would have one name in a table, and leaves out what another run has too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kvbench.reporting.tables.format import name_of, task_of
from kvbench.store.folder import RunFolder
from kvbench.store.manifest import Manifest
from kvbench.store.records import Cell
from kvbench.store.rows import Results, Row

ADAPTER = "adapter"


class _Origin(NamedTuple):
    """What a row was measured with.

    Attributes:
        model: content hash of the model.
        dtype: what it computes in.
        documents: ids of the documents of its task; None for profiles.
        adapter: name and content hash of the method's adapter; None without one, and for profiles, which weights do not
            change.
    """

    model: str
    dtype: str
    documents: tuple[str, ...] | None
    adapter: tuple[str, str] | None


def told_apart(folders: Sequence[RunFolder], results: Sequence[Results]) -> list[list[Row]]:
    """The rows of each run, such that no table, panel or curve mixes what differs.

    Models of one name with different files are named with their fingerprints, and with their dtypes where one task was
    measured in several; tasks over different documents with the number of these; methods with different adapters with
    the adapter's name. What an earlier run has measured alike is left out of later ones.
    """
    by_run = [list(found.rows) for found in results]
    origins = [_origins(folder, rows) for folder, rows in zip(folders, by_run, strict=True)]

    def apart(
        within: Callable[[Row], Hashable], what: Callable[[_Origin], Hashable],
        marked: Callable[[Row, _Origin, RunFolder], Row],
    ) -> None:
        """Mark rows where ``what`` differs among those with the same key ``within``."""
        found: dict[Hashable, set[Hashable]] = {}
        for rows, mine in zip(by_run, origins, strict=True):
            for row, origin in zip(rows, mine, strict=True):
                if what(origin) is not None:
                    found.setdefault(within(row), set()).add(what(origin))
        for place, (folder, rows, mine) in enumerate(zip(folders, by_run, origins, strict=True)):
            by_run[place] = [
                marked(row, origin, folder) if what(origin) is not None and len(found[within(row)]) > 1 else row
                for row, origin in zip(rows, mine, strict=True)
            ]

    different = {origin.documents for mine in origins for origin in mine if origin.documents}
    sizes = Counter(map(len, different))

    def of_documents(row: Row, origin: _Origin, folder: RunFolder) -> Row:
        count = len(origin.documents or ())
        where = f" of {folder.path.resolve().name}" if sizes[count] > 1 else ""
        return replace(row, params={**row.params, "documents": f"{count} documents{where}"})

    def with_adapter(row: Row, origin: _Origin, folder: RunFolder) -> Row:
        name, content = origin.adapter or ("", "")
        alike = {one.adapter for mine in origins for one in mine if one.adapter and one.adapter[0] == name}
        variant = f"{ADAPTER}={name}{f'@{content[:8]}' if len(alike) > 1 else ''}"
        before = row.params.get("variant")
        return replace(row, params={**row.params, "variant": f"{before},{variant}" if before else variant})

    apart(
        lambda row: row.model, lambda origin: origin.model,
        lambda row, origin, _: replace(row, model=f"{row.model}@{origin.model[:8] or 'unknown'}"),
    )
    apart(
        _setting, lambda origin: origin.dtype,
        lambda row, origin, _: replace(row, model=f"{row.model} ({origin.dtype})"),
    )
    apart(_setting, lambda origin: origin.documents, of_documents)
    apart(lambda row: (row.model, row.name), lambda origin: origin.adapter, with_adapter)
    return _once(by_run)


def _once(by_run: Sequence[Sequence[Row]]) -> list[list[Row]]:
    """The rows of each run without those that an earlier run has, too; every profile is a measurement of its own."""
    found: set[Hashable] = set()
    kept = []
    for rows in by_run:
        identities = [_identity(row) for row in rows]
        kept.append([
            row for row, one in zip(rows, identities, strict=True) if one not in found or row.protocol == "profile"
        ])
        found.update(identities)
    return kept


def _identity(row: Row) -> Hashable:
    return (*_setting(row), name_of(row), row.ratio_asked, row.metric, row.signature, row.params.get("bin"))


def _setting(row: Row) -> tuple[str, str, str, int]:
    return task_of(row), row.protocol, row.model, row.seed


def _origins(folder: RunFolder, rows: Sequence[Row]) -> list[_Origin]:
    manifest, cells = folder.manifest(), folder.cells()
    exact = {(cell.task, cell.model, cell.method, cell.variant or None): cell for cell in cells}
    alike = {(cell.task, cell.model): cell for cell in cells}
    return [
        _origin(
            manifest, row,
            exact.get((row.task, row.model, row.method, row.params.get("variant") or None))
            or alike.get((row.task, row.model)) or cells[0],
        )
        for row in rows
    ]


def _origin(manifest: Manifest, row: Row, cell: Cell) -> _Origin:
    names = (f"{row.task}:{row.params.get('question')}", row.task)
    tasks = [manifest.tasks[key] for name in names if (key := f"{name}@{row.model}#{row.seed}") in manifest.tasks]
    if row.protocol == "profile":
        return _Origin(cell.model_hash, cell.dtype, None, None)
    documents = tuple(tasks[0].documents) if tasks else None
    adapter = None if cell.adapter is None else (Path(cell.adapter).name, cell.adapter_hash or "")
    return _Origin(cell.model_hash, cell.dtype, documents, adapter)
