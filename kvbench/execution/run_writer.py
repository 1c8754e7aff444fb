"""Writes into a run folder while it is measured, for runs and for profiles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kvbench.errors import StoppedError, UserError
from kvbench.execution.locks import KEPT, disk
from kvbench.store.environment import describe
from kvbench.store.folder import Record, RunFolder
from kvbench.store.manifest import Machine, Manifest, ProfileInfo, TaskInfo
from kvbench.store.progress import RunProgress
from kvbench.store.records import Cell, Failure


@dataclass
class RunWriter:
    """Writes ``run.json``, records and failures; other processes may write into the folder as well.

    Attributes:
        content: hash of the request; ``limit``: documents per task, or repeats of a profile.
        cells: cells of all plans, by key.
        sources: task -> where its documents come from.
        fresh: replace what the folder holds.
        recorded: the documents that are on disk.
        tasks, profiles: setting -> its task or profile, once a child has reported it.
        probes: model -> what a probe of it has found.
        machine: the machine of a profile.
        failed: keys of the cells that have failed.
        opened: whether the folder holds ``run.json`` of this run.
    """

    folder: RunFolder
    content: str
    limit: int
    command: Sequence[str]
    cells: dict[str, Cell]
    sources: dict[str, str]
    fresh: bool = False
    recorded: RunProgress = field(init=False)
    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    profiles: dict[str, ProfileInfo] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    machine: Machine | None = None
    failed: set[str] = field(default_factory=set)
    opened: bool = False

    def __post_init__(self) -> None:
        self.recorded = RunProgress(self.folder)

    @property
    def earlier(self) -> Manifest | None:
        """The manifest on disk that this run continues; None if there is none, or ``fresh`` is about to replace it."""
        return None if self.fresh and not self.opened else self.folder.earlier()

    def open(self, cells: Iterable[Cell], masks: dict[str, Any] | None = None) -> list[Failure]:
        """Write ``run.json`` and create the folders of cells, so that the run can be continued from here on.

        Args:
            masks: example masks of the methods to store, by method and ratio.

        Returns:
            A failure for every cell whose records are damaged.
        """
        folder, damaged = self.folder, []
        with self._disk():
            folder.path.mkdir(parents=True, exist_ok=True)
            if self.fresh and not self.opened:
                folder.clear()
            earlier = folder.earlier()
            self.describe()
            if masks is not None:
                folder.keep_masks(masks)
            self.opened = True
            for cell in cells:
                info = self.tasks.get(cell.setting)
                made = earlier.signature_of(cell.setting) if earlier else None
                try:
                    folder.open_cell(cell, info.signature if info else "", made)
                except UserError as damage:
                    damaged.append(Failure(cell.key, f"{cell.label}: {damage.message}", damage.hint))
        return damaged

    def add(self, cells: Sequence[Cell]) -> None:
        """Add cells that were not in the plan but were found while measuring."""
        self.cells |= {cell.key: cell for cell in cells}
        self.open(cells)

    def append(self, key: str, records: Sequence[Record]) -> None:
        """Append records to those of a cell."""
        with self._disk():
            self.folder.append(self.cells[key], records)

    def forget(self, key: str, prefix: str) -> None:
        """Remove the records of a cell whose keys start with ``prefix``."""
        with self._disk():
            self.folder.forget(self.cells[key], prefix)

    def fail(self, failure: Failure) -> None:
        """Record that a cell could not be finished."""
        self.failed.add(failure.cell)
        with self._disk():
            self.folder.fail(self.cells[failure.cell], failure)

    def describe(self) -> None:
        """Write ``run.json``; entries of other tasks are kept if it is of the same run."""
        with disk(self.folder.path, KEPT, StoppedError), self.folder.lock("manifest"):
            earlier = self.folder.earlier()
            now = datetime.now(UTC).isoformat(timespec="seconds")
            # With another limit, the tasks on disk list other documents.
            same = earlier if earlier and earlier.describes(self.content, self.limit) else None
            self.folder.describe(Manifest(
                content=self.content,
                started=earlier.started if earlier and earlier.content == self.content else now,
                command=tuple(self.command), limit=self.limit, sources=self.sources,
                tasks={**(same.tasks if same else {}), **self.tasks},
                profiles={**(same.profiles if same else {}), **self.profiles},
                probes={**(same.probes if same else {}), **self.probes},
                machine=self.machine, environment=describe(), cells=tuple(self.cells.values()),
            ))

    def _disk(self) -> AbstractContextManager[None]:
        """Turn the errors of a full disk into user errors; ``StoppedError`` once something is written, which is
        kept."""
        if self.opened:
            return disk(self.folder.path, KEPT, StoppedError)
        return disk(self.folder.path, "Choose another folder with --out.")
