"""Clocks, and what is read off them: the definitions of every span of time.

A mark is taken without waiting for the device; marks are turned into seconds once a request has
ended. So nothing in the timed loop stops a GPU.
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
    """Something that takes marks and later says when they were."""

    def mark(self) -> Any:
        """This moment of the work that has been handed to the device."""

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """The marks in seconds from the first; waits for the device."""


class WallClock:
    """The clock of a CPU: work is done when a call returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [mark - marks[0] for mark in marks]


class CudaClock:
    """Events in the stream of a GPU, read after the end."""

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
    """Marks of one request while it runs.

    Attributes:
        clock: what takes the marks.
        tokens: a mark for every new token, when it was chosen.
        aside: pairs of marks around what a method did outside the model, while the prompt was read.
    """

    clock: Clock
    started: Any = None
    prefilled: Any = None
    tokens: list[Any] = field(default_factory=list)
    aside: list[tuple[Any, Any]] = field(default_factory=list)

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """Around what is not the model's own forward pass; counted until the prompt has been read."""
        before = self.clock.mark() if self.prefilled is None else None
        yield
        if before is not None:
            self.aside.append((before, self.clock.mark()))

    def read(self) -> Timeline:
        """The marks in seconds."""
        flat = [mark for pair in self.aside for mark in pair]
        when = self.clock.seconds([self.started, self.prefilled, *self.tokens, *flat])
        first = 2 + len(self.tokens)
        pairs = zip(when[first::2], when[first + 1 :: 2], strict=True)
        return Timeline(when[0], when[1], tuple(when[2:first]), sum(b - a for a, b in pairs))


@dataclass(frozen=True)
class Timeline(Rates):
    """One request, in seconds on one clock.

    Attributes:
        started: the prompt is ready on the device.
        prefilled: the logits of its last token are there.
        tokens: when each new token was chosen.
        compress_s: what the method took outside the model's own forward passes while the prompt was
            read: planning masks, removing entries.
    """

    started: float
    prefilled: float
    tokens: tuple[float, ...]
    compress_s: float = 0.0

    @property
    def prefill_s(self) -> float:
        """From the prompt on the device to the logits of its last token, without ``compress_s``."""
        return self.prefilled - self.started - self.compress_s

    @property
    def ttft_s(self) -> float:
        """To the first token: prefill, compression, choosing it."""
        return self.tokens[0] - self.started

    @property
    def gaps(self) -> tuple[float, ...]:
        """Between one token and the next; the first token is in none of them."""
        return tuple(b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False))
