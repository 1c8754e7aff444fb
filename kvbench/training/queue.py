"""A queue of adapters to train: a TOML file, and the order in which they take turns.

Settings at the top of the file hold for all adapters, and each ``[[adapter]]`` may have its own. With ``slice`` they
take turns of so many tokens, those that have seen the fewest first, so that all reach any number of tokens together.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from kvbench.config import read_toml
from kvbench.errors import UserError
from kvbench.models.adapter import CARD, read_card, recover
from kvbench.models.references import resolve_model
from kvbench.training.adapter_recipe import (
    Measured,
    check_untrained,
    measure_untrained,
    prepare,
    run_adapter_training,
)
from kvbench.training.curve import Point, Scores, read_curve
from kvbench.training.data import hash_of
from kvbench.training.loop import (
    CheckpointError,
    DivergedError,
    Follow,
    check_checkpoint,
    checkpoint_step,
    falls_after,
)
from kvbench.training.materials import Materials
from kvbench.training.queue_file import AdapterEntry, QueueFile, place_of, request_of
from kvbench.training.request import AdapterRequest, alike, held_out_key, make_plan
from kvbench.training.team import processes

BESIDE, DIVERGED = ".beside.json", "diverged"
"""Files for the scores of methods without adapters, and of why a training has ended early."""


class Queued(NamedTuple):
    """An adapter of the queue.

    Attributes:
        name: name of its folder.
        request: how it is trained.
        steps_per_turn: optimiser steps of a turn; None for all.
    """

    name: str
    request: AdapterRequest
    steps_per_turn: int | None

    @property
    def tokens_per_step(self) -> int:
        return self.request.batch * self.request.length

    @property
    def is_finished(self) -> bool:
        return (self.request.out / CARD).exists()

    @property
    def has_diverged(self) -> bool:
        return (self.request.out / DIVERGED).exists()

    @property
    def steps_done(self) -> int:
        return self.request.steps if self.is_finished else checkpoint_step(self.request.out)

    @property
    def curve(self) -> list[Point]:
        return read_curve(self.request.out)


class Queue:
    """The adapters of a queue file.

    Args:
        path: the file.
        device, threads: as in :class:`AdapterRequest`.

    Raises:
        UserError: the file is missing, or has an unknown key, a wrong value, or an adapter twice.
    """

    def __init__(self, path: Path, device: str = "auto", threads: int = 0) -> None:
        self.path = path
        self.file = read_toml(path, QueueFile, "queue file", "Give --queue FILE; docs/training.md shows one.")
        self.out = place_of(path.parent, self.file.out)
        self.queued = []
        for entry in self.file.adapter:
            with self._named(entry.folder):
                self.queued.append(self._queued(entry, device, threads))
                make_plan(self.queued[-1].request)
        self._check_different()
        check_untrained(self.file.beside)
        if self.file.beside and self.queued[0].request.held_out is None:
            raise UserError(f"{path}: beside is measured on held-out text.", "Give held_out = FILE.")

    def turns(self) -> Iterator[Queued]:
        """What is left to do: the adapter whose turn it is."""
        while unfinished := [one for one in self.queued if not (one.is_finished or one.has_diverged)]:
            steps = {one.name: one.steps_done for one in unfinished}
            ready = [one for one in unfinished if steps[one.name] or not self._waits(one, steps)]
            if self.file.slice:
                ready.sort(key=lambda one: steps[one.name] * one.tokens_per_step)
            yield ready[0]

    def _waits(self, one: Queued, steps: dict[str, int]) -> bool:
        """Whether a shorter training is about to leave a state from which this one can begin."""
        plan = make_plan(one.request)
        return plan.keep != "best" and any(
            alike(make_plan(other.request)) == alike(plan) and other.request.steps < plan.steps
            and steps[other.name] < falls_after(other.request.steps, plan.decay_from)
            for other in self.queued if other.name in steps
        )

    def run(self, follow: Callable[[Queued], Follow]) -> list[str]:
        """Train all that is not finished; started again, it goes on where it was.

        An adapter whose loss is no longer finite is left as it is, and the others go on.

        Args:
            follow: shows the progress of an adapter.

        Returns:
            What was said of adapters that have diverged, now or before.

        Raises:
            UserError: an adapter cannot be trained as asked; this is found out before any is.
        """
        if processes() > 1:
            raise UserError("A queue is trained in one process.", "Start it without accelerate launch.")
        materials = Materials()
        with self._alone():
            for one in self.queued:
                with self._named(one.name):
                    self._check(one, materials)
            self._measure_beside(materials)
            for one in self.turns():
                with self._named(one.name):
                    try:
                        run_adapter_training(one.request, follow(one), one.steps_per_turn, materials)
                    except DivergedError as error:
                        (one.request.out / DIVERGED).write_text(f"{error.message}\n", encoding="utf-8")
        diverged = [one.request.out / DIVERGED for one in self.queued if one.has_diverged]
        return [path.read_text(encoding="utf-8").strip() for path in diverged]

    def _check(self, one: Queued, materials: Materials) -> None:
        """Check that an adapter can be trained as asked, or has been.

        Raises:
            UserError: it cannot, or has been trained otherwise.
        """
        recover(one.request.out)
        if one.is_finished:
            _check_as_asked(one)
        elif not one.has_diverged:
            plan = prepare(one.request, materials).plan
            check_checkpoint(one.request.out, plan)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Say in errors which adapter they are about, and what can be done about it in a queue."""
        try:
            yield
        except CheckpointError as error:
            raise UserError(
                f"{self.path}: {name}: {error.message}",
                f"Delete {self.out / name} to train it anew, or give the adapter another name in the file.",
            ) from error
        except UserError as error:
            raise UserError(f"{self.path}: {name}: {error.message}", error.hint) from error

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the folder."""
        lock = FileLock(self.out / ".lock")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"Another process trains into {self.out}.", "Wait for it, or look at its curves with --curves."
            ) from None
        except OSError as error:
            raise UserError(f"{self.out} cannot be written: {error.strerror}.") from error
        try:
            yield
        finally:
            lock.release()

    def beside(self) -> list[Measured]:
        """Scores of the methods without adapters, as far as they have been measured."""
        try:
            stored = json.loads((self.out / BESIDE).read_text(encoding="utf-8"))
            if stored["key"] != self._beside_key():
                return []
            return [Measured(method, dict(scores)) for method, scores in stored["scores"]]
        except (OSError, ValueError, TypeError, KeyError, UserError):
            return []

    def _measure_beside(self, materials: Materials) -> None:
        if not self.file.beside or self.beside():
            return
        found = measure_untrained(self.queued[0].request, self.file.beside, materials)
        part = self.out / (BESIDE + ".part")
        part.write_text(json.dumps({"key": self._beside_key(), "scores": found}, indent=1) + "\n", encoding="utf-8")
        os.replace(part, self.out / BESIDE)

    def _beside_key(self) -> str:
        """What the scores of methods without adapters depend on."""
        request = self.queued[0].request
        known = (self.file.beside, held_out_key(request), request.model, request.revision)
        return hashlib.sha256(repr(known).encode()).hexdigest()[:16]

    def _queued(self, entry: AdapterEntry, device: str, threads: int) -> Queued:
        request = request_of(self.file, entry, self.path.parent, self.out, device, threads)
        per_step = request.batch * request.length
        return Queued(entry.folder, request, max(1, self.file.slice // per_step) if self.file.slice else None)

    def _check_different(self) -> None:
        seen: dict[str, str] = {}
        for one in self.queued:
            folder = f"the folder {one.name}"
            request, plan = one.request, make_plan(one.request)
            same = repr((asdict(plan), request.data, request.model, request.revision, request.column))
            if folder in seen:
                raise UserError(
                    f"{self.path}: two adapters have {folder}.",
                    f"Give one of them another name, such as name = \"{one.name}-2\".",
                )
            if same in seen:
                raise UserError(f"{self.path}: {one.name} is trained in the same way as {seen[same]}.", "Delete one.")
            seen |= {folder: one.name, same: one.name}


def _check_as_asked(one: Queued) -> None:
    """Check that a finished adapter was trained with the settings, and on the texts, that the file has now.

    Raises:
        UserError: with others, or a text cannot be read.
    """
    card, request = read_card(one.request.out), one.request
    now = {**asdict(make_plan(request)), "held_out": held_out_key(request)}
    now |= {"data": [hash_of(path) for path in request.data]}
    trained = {**card.training, "data": [source["sha256"] for source in card.training.get("data", ())]}
    changed = sorted(name for name, value in trained.items() if name in now and now[name] != value)
    if not resolve_model(request.model, request.revision).has_fingerprint(card.base_hash):
        changed.insert(0, "model")
    if changed:
        raise UserError(
            f"{one.request.out} was trained with other settings: {', '.join(changed)}.",
            "Give the adapter another name in the queue file, or delete that folder.",
        )


def curve_rows(queue: Queue) -> Iterator[tuple[str, int, int, float | None, Scores]]:
    """The held-out curves of a queue as rows: name, tokens seen, tokens in all, training loss, and scores.

    Methods without adapters come first, with 0 tokens.
    """
    for method, scores in queue.beside():
        yield method, 0, 0, None, scores
    for one in queue.queued:
        total = one.request.steps * one.tokens_per_step
        for point in one.curve or [Point(0, float("nan"), {})]:
            yield one.name, point.step * one.tokens_per_step, total, point.loss, point.held_out

