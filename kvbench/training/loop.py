"""What both trainings share: the learning-rate schedule, and checkpoints that resume exactly."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from kvbench.errors import UserError

CHECKPOINT = "checkpoint.pt"
FLOOR = 0.03
"""Final learning rate as a fraction of the peak."""


class Progress(NamedTuple):
    """State of a training after a step; the loss is that of the step, in nats."""

    step: int
    loss: float


class Stateful(Protocol):
    """A module or an optimiser."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


def rate_factor(step: int, steps: int, warmup: int, decay_from: float) -> float:
    """Linear warm-up, constant, then linear down to 3 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    start = decay_from * steps
    if step < start:
        return 1.0
    return 1.0 - (1.0 - FLOOR) * (step - start) / max(1.0, steps - start)


def save_checkpoint(out: Path, plan: Any, step: int, parts: Mapping[str, Stateful]) -> None:
    """Write the state after ``step`` steps, atomically."""
    part = out / (CHECKPOINT + ".part")
    state = {name: thing.state_dict() for name, thing in parts.items()}
    torch.save({"plan": dataclasses.asdict(plan), "step": step, **state}, part)
    os.replace(part, out / CHECKPOINT)


def restore_checkpoint(out: Path, plan: Any, parts: Mapping[str, Stateful]) -> int:
    """Load the state of an interrupted training of the same plan.

    Settings that an older checkpoint does not contain are not compared.

    Returns:
        Steps done; 0 if there is no checkpoint.

    Raises:
        UserError: the checkpoint is that of another plan, or damaged.
    """
    path = out / CHECKPOINT
    if not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises many types
        raise UserError(f"{path} is damaged: {error}.", "Pass --fresh to start anew.") from error
    known = {name: value for name, value in state["plan"].items() if value != ""}
    if known != {name: value for name, value in dataclasses.asdict(plan).items() if name in known}:
        raise UserError(
            f"{path} is the checkpoint of a training with other settings.",
            "Repeat those settings to continue it, choose another --out, or pass --fresh.",
        )
    for name, thing in parts.items():
        thing.load_state_dict(state[name])
    return int(state["step"])
