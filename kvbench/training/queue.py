"""A queue of adapters to train: a TOML file, and the order in which they take turns.

Settings at the top of the file hold for all adapters, and each ``[[adapter]]`` may have its own. With ``slice`` they
take turns of so many tokens, those that have seen the fewest first, so that all reach any number of tokens together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

from kvbench.config import read_toml
from kvbench.errors import UserError
from kvbench.methods.budget import parse_ratio
from kvbench.models.adapter import CARD, read_card
from kvbench.models.references import DEFAULT_MODEL
from kvbench.training.adapter_recipe import Measured, measure_untrained, run_adapter_training
from kvbench.training.curve import Point, Scores, read_curve
from kvbench.training.folder import check_out
from kvbench.training.held_out import DOCUMENTS, RATIOS
from kvbench.training.loop import Follow, checkpoint_step, falls_after
from kvbench.training.materials import Materials
from kvbench.training.request import AdapterRequest, alike, make_plan
from kvbench.training.team import processes

BESIDE = "beside.json"


class AdapterSettings(BaseModel):
    """Settings of a training, for all adapters of a file or for one of them.

    Attributes:
        model, revision: the base model.
        data: files of training text; ``held_out``: one of other text; ``column``: what their text is called.
        tokens: text tokens to train on in all.
        every: text tokens between checkpoints and measurements; 0 for a tenth of ``tokens``.
        warmup: text tokens of linear warm-up of the rate; 0 for a tenth of ``tokens``, at most 100 steps. Adapters that
            differ in their ``tokens`` only share their steps before the rate falls, if they have the same warm-up.
        batch_size, length: sequences per step, and text tokens per sequence.
        lr, rank, seed: peak learning rate, rank of the low-rank pairs, seed.
        set: what ``--set`` takes.
        ratios, documents, recall: what is measured on held-out text: at which ratios, on how many documents, and
            whether facts are to be recalled.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str = DEFAULT_MODEL
    revision: str | None = None
    data: list[str] = Field(default_factory=list)
    held_out: str | None = None
    column: str = "text"
    tokens: int = Field(default=1_280_000, gt=0)
    every: int = Field(default=0, ge=0)
    warmup: int = Field(default=0, ge=0)
    batch_size: int = Field(default=2, ge=1)
    length: int = Field(default=512, ge=32)
    lr: float = Field(default=2e-3, ge=0)
    rank: int = Field(default=64, ge=1)
    seed: int = Field(default=0, ge=0)
    set: dict[str, str] = Field(default_factory=dict)
    ratios: list[str] = Field(default=list(RATIOS), min_length=1)
    documents: int = Field(default=DOCUMENTS, ge=1)
    recall: bool = True


class AdapterEntry(AdapterSettings):
    """One ``[[adapter]]`` of the file.

    Attributes:
        method: the trained method.
        name: its folder in ``out``; the method's name if left out.
    """

    method: str
    name: str = Field(default="", pattern=r"^[\w.+-]*$")


class QueueFile(AdapterSettings):
    """The content of a queue file.

    Attributes:
        out: folder in which every adapter has a folder of its own; relative to the queue file.
        about: what is to be found out, and by which rule; for the reader.
        slice: text tokens of a turn; 0 to train one adapter after the other.
        beside: methods without adapters that are measured once on the held-out text.
        adapter: the adapters, in their order.
    """

    out: str = Field(min_length=1)
    about: str = ""
    slice: int = Field(default=0, ge=0)
    beside: list[str] = Field(default_factory=list)
    adapter: list[AdapterEntry] = Field(min_length=1)


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
        self.out = path.parent / self.file.out
        self.queued = [self._queued(entry, device, threads) for entry in self.file.adapter]
        self._check_different()
        for one in self.queued:
            make_plan(one.request)
            for ratio in one.request.ratios:
                parse_ratio(ratio)

    def turns(self) -> Iterator[Queued]:
        """What is left to do: the adapter whose turn it is."""
        while unfinished := [one for one in self.queued if not one.is_finished]:
            steps = {one.name: one.steps_done for one in unfinished}
            ready = [one for one in unfinished if steps[one.name] or not self._waits(one, steps)]
            if self.file.slice:
                ready.sort(key=lambda one: steps[one.name] * one.tokens_per_step)
            yield ready[0]

    def _waits(self, one: Queued, steps: dict[str, int]) -> bool:
        """Whether a shorter training is about to leave a state from which this one can begin."""
        plan = make_plan(one.request)
        return any(
            alike(make_plan(other.request)) == alike(plan) and other.request.steps < plan.steps
            and steps[other.name] < falls_after(other.request.steps, plan.decay_from)
            for other in self.queued if other.name in steps
        )

    def run(self, follow: Callable[[Queued], Follow]) -> None:
        """Train all that is not finished; started again, it goes on where it was.

        Args:
            follow: shows the progress of an adapter.

        Raises:
            UserError: an adapter cannot be trained as asked.
        """
        if processes() > 1:
            raise UserError("A queue is trained in one process.", "Start it without accelerate launch.")
        for one in self.queued:
            if one.is_finished:
                _check_as_asked(one)
            else:
                check_out(one.request.out, CARD)
        materials = Materials()
        with self._alone():
            self._measure_beside(materials)
            for one in self.turns():
                run_adapter_training(one.request, follow(one), one.steps_per_turn, materials)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out of the folder."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with FileLock(self.out / ".lock", timeout=0):
                yield
        except Timeout:
            raise UserError(
                f"Another process trains into {self.out}.", "Wait for it, or look at its curves with --curves."
            ) from None
        except OSError as error:
            raise UserError(f"{self.out} cannot be written: {error.strerror}.") from error

    def beside(self) -> list[Measured]:
        """Scores of the methods without adapters, as far as they have been measured."""
        try:
            stored = json.loads((self.out / BESIDE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        return [Measured(*item) for item in stored["scores"]] if stored.get("key") == self._beside_key() else []

    def _measure_beside(self, materials: Materials) -> None:
        if not self.file.beside or self.file.held_out is None or self.beside():
            return
        found = measure_untrained(self.queued[0].request, self.file.beside, materials)
        text = json.dumps({"key": self._beside_key(), "scores": found}, indent=1)
        (self.out / BESIDE).write_text(text + "\n", encoding="utf-8")

    def _beside_key(self) -> str:
        """What the scores of methods without adapters depend on."""
        file, request = self.file, self.queued[0].request
        text = request.held_out.read_bytes() if request.held_out and request.held_out.is_file() else b""
        known = (file.beside, file.ratios, file.documents, file.recall, file.length, file.model, file.revision)
        return hashlib.sha256(repr(known).encode() + text).hexdigest()[:16]

    def _queued(self, entry: AdapterEntry, device: str, threads: int) -> Queued:
        own = {name: getattr(entry, name) for name in entry.model_fields_set & set(AdapterSettings.model_fields)}
        made = self.file.model_copy(update={**own, "set": {**self.file.set, **entry.set}})
        per_step, here = made.batch_size * made.length, self.path.parent
        steps = -(-made.tokens // per_step)
        name = entry.name or entry.method
        return Queued(name, AdapterRequest(
            method=entry.method, data=tuple(here / file for file in made.data), out=self.out / name, model=made.model,
            revision=made.revision, steps=steps, batch=made.batch_size, length=made.length, lr=made.lr,
            rank=made.rank, held_out=None if made.held_out is None else here / made.held_out,
            every=max(1, (made.every // per_step) or steps // 10), seed=made.seed, options=made.set, device=device,
            threads=threads, column=made.column, ratios=tuple(made.ratios), documents=made.documents,
            recall=made.recall, warmup=made.warmup // per_step, shared=self.out / ".shared",
        ), max(1, self.file.slice // per_step) if self.file.slice else None)

    def _check_different(self) -> None:
        seen: dict[str, str] = {}
        for one in self.queued:
            folder = f"the folder {one.name}"
            alike = repr(replace(one.request, out=Path()))
            if folder in seen:
                raise UserError(
                    f"{self.path}: two adapters have {folder}.",
                    f"Give one of them another name, such as name = \"{one.name}-2\".",
                )
            if alike in seen:
                raise UserError(f"{self.path}: {one.name} is trained in the same way as {seen[alike]}.", "Delete one.")
            seen |= {folder: one.name, alike: one.name}


def _check_as_asked(one: Queued) -> None:
    """Check that a finished adapter was trained with the settings that the file has now.

    Raises:
        UserError: with others.
    """
    trained, now = read_card(one.request.out).training, asdict(make_plan(one.request))
    now.pop("data")  # a card lists the files
    changed = sorted(name for name, value in trained.items() if name in now and now[name] != value)
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

