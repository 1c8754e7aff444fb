"""What this process knows of a run folder, and all that it writes into it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from kvbench.environment import describe
from kvbench.errors import StoppedError, UserError
from kvbench.execution.locks import KEPT, disk
from kvbench.execution.shards import Shard
from kvbench.planning.quality import Plan
from kvbench.store.folder import RUN, RunFolder, write_atomic
from kvbench.store.progress import RunProgress
from kvbench.store.records import Cell, DocumentRecord, Failure, GenerationRecord


@dataclass
class RunWriter:
    """The folder of some plans, which other processes may write into as well.

    Attributes:
        content: hash of what is asked for.
        cells: of all plans, by key.
        tasks: setting -> what a child said of the task under it.
        probes: model -> what a probe of it has shown.
        failed: keys of the cells that are left alone from now on.
        opened: whether anything has been written.
    """

    plans: Sequence[Plan]
    folder: RunFolder
    content: str
    command: list[str]
    fresh: bool
    cells: dict[str, Cell] = field(init=False)
    recorded: RunProgress = field(init=False)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    opened: bool = False

    def __post_init__(self) -> None:
        self.cells = {cell.key: cell for plan in self.plans for cell in plan.cells}
        self.recorded = RunProgress(self.folder)

    def open(
        self, plan: Plan, tasks: dict[str, Any], masks: dict[str, Any], probe: dict[str, Any]
    ) -> list[Failure]:
        """Write ``run.json`` and the cells' folders: from here on there is something to continue.

        Returns:
            The cells whose records are damaged.
        """
        folder = self.folder
        damaged = []
        with disk(folder.path, "Choose another folder with --out."):
            folder.path.mkdir(parents=True, exist_ok=True)
            if self.fresh and not self.opened:
                folder.clear()
            settings = {cell.workload: cell.setting for cell in plan.cells}
            self.tasks |= {settings[name]: info for name, info in tasks.items()}
            self.probes[plan.model.name] = probe
            earlier = folder.manifest()["tasks"] if (folder.path / RUN).exists() else {}
            self.describe()
            folder.keep_masks(masks)
            self.opened = True
            for cell in plan.cells:
                try:
                    made = earlier.get(cell.setting, {}).get("signature")
                    folder.open_cell(cell, self.tasks[cell.setting]["signature"], made)
                except UserError as damage:
                    damaged.append(Failure(cell.key, f"{cell.label}: {damage.message}", damage.hint))
        return damaged

    def is_whole(self, plan: Plan) -> bool:
        """Whether a plan is on disk from end to end, so that nothing need be loaded."""
        if self.fresh or not (self.folder.path / RUN).exists():
            return False
        manifest = self.folder.manifest()
        settings = {cell.setting for cell in plan.cells}
        is_mine = (manifest["content"], manifest["limit"]) == (self.content, plan.request.limit)
        known = manifest.get("probes", {}).get(plan.model.name)
        if not is_mine or known is None or not settings <= set(manifest["tasks"]):
            return False
        tasks = {setting: manifest["tasks"][setting] for setting in settings}
        for cell in plan.cells:
            try:
                missing = set(tasks[cell.setting]["documents"]) - self.recorded.documents(cell)
            except (ValueError, KeyError, TypeError):
                return False
            if missing or self.folder.failure(cell) is not None:
                return False
        self.tasks |= tasks
        self.probes[plan.model.name] = known
        self.opened = True
        return True

    def is_done(self, cell: Cell) -> bool:
        """Whether every document of a cell is known to be on disk."""
        info = self.tasks.get(cell.setting)
        return info is not None and set(info["documents"]) <= self.recorded.documents(cell)

    def left_of(self, shard: Shard) -> tuple[dict[str, list[str]], tuple[str, ...]] | None:
        """Which of a shard's documents are on disk, by cell, and the cells that have failed; None if nothing is
        left to do."""
        failed = {c.key for c in shard.cells if c.key in self.failed or self.folder.failure(c) is not None}
        done = {c.key: self.recorded.documents(c) for c in shard.cells if c.key not in failed}
        if all(set(shard.documents) <= documents for documents in done.values()):
            return None
        return {key: sorted(found.intersection(shard.documents)) for key, found in done.items()}, tuple(sorted(failed))

    def append(self, key: str, records: Sequence[dict[str, Any]]) -> None:
        """Records as a child sent them."""
        cell = self.cells[key]
        load = GenerationRecord.load if cell.writes else DocumentRecord.load
        with disk(self.folder.path, KEPT, StoppedError):
            self.folder.append(cell, [load(record) for record in records])

    def fail(self, failure: Failure) -> None:
        self.failed.add(failure.cell)
        with disk(self.folder.path, KEPT, StoppedError):
            self.folder.fail(self.cells[failure.cell], failure)

    def describe(self) -> None:
        """Write ``run.json``; what it says of other tasks stays, if it is of the same run."""
        plans, folder = self.plans, self.folder
        with disk(folder.path, KEPT, StoppedError), folder.lock("manifest"):
            earlier = folder.manifest() if (folder.path / RUN).exists() else {}
            # With another limit, what is known of the tasks' documents is out of date.
            same = (earlier.get("content"), earlier.get("limit")) == (self.content, plans[0].request.limit)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            manifest = {
                "schema": 1, "content": self.content,
                "started": earlier["started"] if earlier.get("content") == self.content else now,
                "command": self.command, "limit": plans[0].request.limit, "finished": None,
                "sources": {name: corpus.source for plan in plans for name, corpus in plan.corpora.items()},
                "tasks": {**(earlier["tasks"] if same else {}), **self.tasks},
                "probes": {**(earlier.get("probes", {}) if same else {}), **self.probes}, "environment": describe(),
                "cells": [dataclasses.asdict(cell) for cell in self.cells.values()],
            }
            write_atomic(folder.path / RUN, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
