"""Clocks, and the definitions of all time spans.

A mark stands for a point in time. It is taken without synchronising with the device, and converted to seconds once a
request has ended. So nothing in the timed loop waits for a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from kvbench.store.profile_records import Rates


class Clock(Protocol):
    """Takes marks, and converts them to seconds later."""

    def mark(self) -> Any:
        """Mark the end of all work submitted to the device so far."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Seconds from the first mark to each of the marks; waits for the device."""


class WallClock:
    """Clock for a CPU, where work is done when a call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """Clock for a GPU: events in its stream, read after the request has ended."""

    def mark(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        torch.cuda.synchronize()
        return [marks[0].elapsed_time(mark) / 1e3 for mark in marks]


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else WallClock()


@dataclass
class Stopwatch:
    """Takes the marks of one request while it runs.

    Attributes:
        clock: clock that takes the marks.
        started, prefilled: marks, None until they are taken (see ``Timeline``).
        tokens: one mark per new token, when it was chosen.
        aside: pairs of marks around the method's own work during prefill, of which ``compress_s`` is the sum.
    """

    clock: Clock
    started: Any = None
    prefilled: Any = None
    tokens: list[Any] = field(default_factory=list)
    aside: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """Time the block, work of the method outside the model's forward pass; counted during prefill only."""
        before = self.clock.mark() if self.prefilled is None else None
        yield
        if before is not None:
            self.aside.append((before, self.clock.mark()))

    def read(self) -> Timeline:
        """Convert the marks to seconds since ``started``."""
        flat = [mark for pair in self.aside for mark in pair]
        when = self.clock.seconds([self.started, self.prefilled, *self.tokens, *flat])
        first = 2 + len(self.tokens)
        pairs = zip(when[first::2], when[first + 1 :: 2], strict=True)
        return Timeline(when[0], when[1], tuple(when[2:first]), sum(b - a for a, b in pairs))


@dataclass(frozen=True)
class Timeline(Rates):
    """Times of one request, in seconds on one clock; ``Stopwatch.read`` makes ``started`` zero.

    Attributes:
        started: when the prompt was on the device.
        prefilled: when the logits of its last token were computed.
        tokens: when each new token was chosen.
        compress_s: time of the method's own work outside the model's forward passes during prefill:
            planning masks, removing entries.
    """

    started: float
    prefilled: float
    tokens: tuple[float, ...]
    compress_s: float = 0.0

    @property
    def prefill_s(self) -> float:
        """Seconds from the prompt on the device to the logits of its last token, without ``compress_s``."""
        return self.prefilled - self.started - self.compress_s

    @property
    def ttft_s(self) -> float:
        """Seconds to the first token: prefill, compression, and choosing the token."""
        return self.tokens[0] - self.started

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between consecutive tokens; the time to the first token is not among them."""
        return tuple(b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False))
