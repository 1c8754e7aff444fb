"""The two passes over a request: one measures its time, the other its memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from kvbench.profiling.clock import Clock, Stopwatch, Timeline
from kvbench.profiling.memory import CpuMemory, CudaMemory
from kvbench.profiling.request import Request, cache_bytes


class Timed(NamedTuple):
    """A request that was timed.

    Attributes:
        wall_s: wall-clock seconds, synchronised with the device at both ends.
        held: entries held after prefill; ``entries``: mean number of entries during decoding.
    """

    timeline: Timeline
    wall_s: float
    held: int
    entries: float


def time_request(
    make: Callable[[Stopwatch], Request], clock: Clock, device: torch.device, fill: int | None,
    tokens: int | None = None,
) -> Timed:
    """Time prefill (or fill the cache instead) and decoding; marks are taken without waiting for the device.

    Args:
        make: creates the request, which may use the stopwatch to time its work outside the model.
        fill: seed of a random cache that replaces prefill; None to read the prompt.
        tokens: number of tokens to stop after; None for all.
    """
    watch = Stopwatch(clock)
    request = make(watch)
    logits = None if fill is None else request.fill(fill)
    with _undisturbed(), torch.inference_mode():
        _wait(device)
        begin = time.perf_counter()
        watch.started = clock.mark()
        logits = request.read() if logits is None else logits
        watch.prefilled = clock.mark()
        held, entries = request.held, 0
        for _ in request.write(logits):
            watch.tokens.append(clock.mark())
            entries += request.entries
            if len(watch.tokens) == tokens:
                break
        _wait(device)
        wall = time.perf_counter() - begin
    return Timed(watch.read(), wall, held, entries / len(watch.tokens))


class MemoryUse(NamedTuple):
    """Memory of a request in bytes; ``read``, ``written``: (logical, physical) after prefill and after decoding."""

    prefill_peak: int
    decode_peak: int
    read: tuple[int, int]
    written: tuple[int, int]
    held: int
    entries_peak: int


def measure_memory(make: Callable[[], Request], memory: CpuMemory | CudaMemory, fill: int | None) -> MemoryUse:
    """Run prefill (or fill the cache instead) and decoding, recording peak memory."""
    with torch.inference_mode(), memory.watched():
        request = make()
        logits = request.read() if fill is None else request.fill(fill)
        held, read = request.held, cache_bytes(request)
        memory.begin_writing()
        for _ in request.write(logits):
            pass
        written = cache_bytes(request)
    return MemoryUse(memory.peaks.prefill, memory.peaks.decode, read, written, held, request.peak)


@contextmanager
def settled() -> Iterator[None]:
    """Spare the collection before each request within the block what is there already: a million objects of modules,
    which take longer to look through than a short request takes."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Disable the garbage collector within the block, since it would slow down arbitrary steps."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
