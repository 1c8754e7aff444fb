"""Training on several devices through accelerate, which is not imported for one device.

Started by ``accelerate launch -m kvbench train ...`` (or torchrun), every process takes its share of the rows of each
batch and gradients are averaged, so that the weights are those of training on one device.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.errors import UserError


@dataclass(frozen=True)
class Team:
    """The processes of a training, as seen from one of them.

    Attributes:
        rank, size: index of this process, and number of processes.
        accelerator: the ``Accelerator``; None if there is one process.
    """

    rank: int = 0
    size: int = 1
    accelerator: Any = None

    @property
    def leads(self) -> bool:
        """Whether this process writes, measures and prints."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process."""
        return asked if self.accelerator is None else str(self.accelerator.device)

    def own_rows(self, ids: Tensor) -> Tensor:
        """This process's rows of a batch."""
        return ids[self.rank :: self.size]

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes."""
        if self.accelerator is None:
            return
        for parameter in parameters:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.accelerator.reduce(grad, reduction="mean")

    def wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


def processes() -> int:
    """Number of processes that a launcher started, from the environment variable ``WORLD_SIZE``.

    Raises:
        UserError: the variable holds no number.
    """
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdigit() or given == "0":
        raise UserError(f"WORLD_SIZE={given} is no number of processes.", "Unset it, or use accelerate launch.")
    return int(given)


def assemble(device: str, batch: int) -> Team:
    """The team of this process; one process unless a launcher started several.

    Raises:
        UserError: the batch cannot be divided evenly.
    """
    size = processes()
    if size == 1:
        return Team()
    if batch % size:
        raise UserError(
            f"--batch-size {batch} cannot be shared out over {size} processes.", f"Use a multiple of {size}."
        )
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    return Team(accelerator.process_index, accelerator.num_processes, accelerator)
