"""What both trainings share: the learning-rate schedule, the running loss, and checkpoints that resume exactly."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from kvbench.errors import StoppedError, UserError

CHECKPOINT = "checkpoint.pt"
FLOOR = 0.03
"""Final learning rate as a fraction of the peak."""


SMOOTHING = 0.98


class CheckpointError(UserError):
    """The checkpoint in a folder cannot be continued as asked."""


class DivergedError(StoppedError):
    """The loss, or the model's predictions, are not finite."""




class Progress(NamedTuple):
    """State of a training after a step; the loss is a running mean, in nats per token."""

    step: int
    loss: float


Measure = Callable[[int, float], Mapping[str, Mapping[str, float]] | None]
"""Measures on held-out text, given the step and the loss; None if there is no such text."""
Follow = Callable[[Iterator[Progress], int, Measure, int], None]
"""Runs a training of so many steps to its end, shows its progress, and calls the measurement every so many steps."""


class Stateful(Protocol):
    """A module or an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Running:
    """Steps done, their loss as an exponential mean, and the time that they took; it is part of the checkpoint."""

    def __init__(self) -> None:
        self.steps = 0
        self.loss = math.nan
        self.seconds = 0.0

    def add(self, loss: float, seconds: float) -> None:
        """Take in a step."""
        self.loss = loss if math.isnan(self.loss) else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.seconds += seconds
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.steps, self.loss, self.seconds = state["steps"], state["loss"], state["seconds"]


def falls_after(steps: int, decay_from: float) -> int:
    """Number of steps before the first whose rate is lower than the peak."""
    return math.ceil(decay_from * steps)


def rate_factor(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """Linear warm-up, constant, then linear down to 3 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * steps
    if step < start:
        return 1.0
    return 1.0 - (1.0 - FLOOR) * (step - start) / max(1.0, steps - start)


def checkpoint_step(out: Path) -> int:
    """Steps done by the checkpoint in a folder; 0 if there is none that can be read."""
    try:
        return int(torch.load(out / CHECKPOINT, map_location="meta", weights_only=True, mmap=True)["step"])
    except Exception:  # the unpickler raises many types
        return 0


def save_checkpoint(out: Path, plan: Any, step: int, parts: Mapping[str, Stateful]) -> None:
    """Write the state after ``step`` steps into the folder of a training, atomically."""
    write_state(out / CHECKPOINT, plan, step, parts)


def write_state(path: Path, plan: Any, step: int, parts: Mapping[str, Stateful]) -> None:
    """Write the state after ``step`` steps into a file, atomically."""
    part = path.with_name(path.name + ".part")
    state = {name: thing.state_dict() for name, thing in parts.items()}
    torch.save({"plan": dataclasses.asdict(plan), "step": step, **state}, part)
    os.replace(part, path)


def read_state(path: Path, parts: Mapping[str, Stateful], most: int) -> int:
    """Load the state of a training that was alike up to there, unless more than ``most`` steps have been done.

    Returns:
        Steps done; 0 if there is no such state.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler raises many types; it is only used to save time
        return 0
    if state["step"] > most or set(parts) - set(state):
        return 0
    for name, thing in parts.items():
        thing.load_state_dict(state[name])
    return int(state["step"])


def restore_checkpoint(out: Path, plan: Any, parts: Mapping[str, Stateful]) -> int:
    """Load the state of an interrupted training of the same plan.

    Returns:
        Steps done; 0 if there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint is that of another plan, or damaged.
    """
    state = check_checkpoint(out, plan)
    if state is None:
        return 0
    missing = sorted(set(parts) - set(state))
    if missing:
        raise CheckpointError(
            f"{out / CHECKPOINT} has no {', '.join(missing)}: another kvbench wrote it.", "Pass --fresh to start anew."
        )
    for name, thing in parts.items():
        thing.load_state_dict(state[name])
    return int(state["step"])


def check_checkpoint(out: Path, plan: Any) -> dict[str, Any] | None:
    """Read the checkpoint in a folder, and check that it is one of the same plan; None if there is none.

    Settings that an older checkpoint does not contain are not compared.

    Raises:
        CheckpointError: it is that of another plan, or damaged.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        known = {name: value for name, value in state["plan"].items() if value != ""}
    except Exception as error:  # the unpickler raises many types
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} is damaged: {said}", "Pass --fresh to start anew.") from error
    now = dataclasses.asdict(plan)
    changed = sorted(name for name, value in known.items() if now.get(name) != value)
    if "data" in changed:
        raise CheckpointError(
            f"{path} is the checkpoint of a training on other texts: a --data file has changed, or is another.",
            "Bring the former texts back to continue it, choose another --out, or pass --fresh.",
        )
    if changed:
        raise CheckpointError(
            f"{path} is the checkpoint of a training with other settings: {', '.join(changed)}.",
            "Repeat those settings to continue it, choose another --out, or pass --fresh.",
        )
    return state
