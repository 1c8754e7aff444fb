"""Choosing a device. Separate from loading, since commands check it before they import transformers."""

from __future__ import annotations

import torch

from kvbench.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of that name; for ``auto``, CUDA if it is available and the CPU otherwise.

    A GPU is named with its number, which some of PyTorch's functions need.

    Raises:
        UserError: the device is unknown, or not present on this machine.
    """
    if name.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(f"Device {name!r} is not available here.", "kvbench runs on cpu and on cuda.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        present = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise UserError(
            f"Device {name!r} is not available here.", f"Available: {', '.join(present)}."
        ) from error
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device
