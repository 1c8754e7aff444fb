"""Memory bandwidth of a device, which limits the speed of decoding."""

from __future__ import annotations

import time

import torch

BLOCK = 256 << 20
COPIES = 7


def copy_bandwidth(device: torch.device, block: int = BLOCK) -> float:
    """Bytes per second when copying a block too large for any processor cache; bytes read and written both count.

    The median of ``COPIES`` copies, with the current number of threads.
    """
    source = torch.ones(block // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(COPIES + 1):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * block / sorted(seconds[1:])[COPIES // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
