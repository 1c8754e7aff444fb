"""Cells one after another, none for longer than it may take, and all of them within the minutes that there are.

A cell that is slow is interrupted by the alarm clock of the process; one that no longer answers (a kernel that
hangs) by a thread that writes what there is and ends the process; one that does not even let that thread run by
``faulthandler``, whose clock needs no Python. What is on disk says of every cell what became of it, whichever of
them it was.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from benchmarks.gpu.cells import NotHereError
from benchmarks.gpu.report import CUT, FAILED, OK, RUNNING, SKIPPED, WRONG, Outcome, Report

GRACE = 5.0
"""Seconds that a cell which has been interrupted has to end."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class TooLongError(BaseException):
    """The alarm clock; no cell may take it for a fault of its own."""


class StoppedError(BaseException):
    """Somebody wants the run to end."""


class Runner:
    """Carries out the cells of a report.

    Args:
        end: the moment (``time.monotonic``) at which everything is over.
    """

    def __init__(self, report: Report, end: float) -> None:
        self.report, self.end = report, end
        self._lock = threading.RLock()
        self._current: tuple[Outcome, float] | None = None  # the cell, and the moment at which it counts as hanging
        self._is_over = self._may_interrupt = False

    def run(self) -> int:
        """The exit code: 0 if every cell held or could not be had here, 1 otherwise."""
        ended = "All cells were tried."
        with self._watched():
            try:
                for outcome in self.report.outcomes:
                    if time.monotonic() >= self.end:
                        ended = "The minutes were over; cells that were not reached say so."
                        break
                    self._try(outcome)
            except StoppedError as stop:
                ended = f"Stopped by {stop}."
        self._close(ended)
        return 0 if self.report.is_right else 1

    def _try(self, outcome: Outcome) -> None:
        started = time.monotonic()
        limit = min(outcome.cell.limit, self.end - started)
        outcome.status, outcome.why = RUNNING, "The run ended while this cell was being tried."
        self._write()
        self._current = outcome, started + limit + GRACE
        status, why, trace = FAILED, "", ""
        try:
            self._may_interrupt = True
            signal.setitimer(signal.ITIMER_REAL, max(0.01, limit))
            outcome.cell.run(outcome.found, min(started + outcome.cell.share, self.end))
            self._may_interrupt = False
            status = OK if outcome.found.is_right else WRONG
        except NotHereError as reason:
            status, why = SKIPPED, str(reason)
        except ModuleNotFoundError as error:
            status, why = SKIPPED, f"This Python has no {error.name}."
        except TooLongError:
            status, why = CUT, f"It was cut short after {limit:.0f} s."
        except StoppedError as stop:
            status, why = CUT, f"The run was stopped by {stop} while this cell was being tried."
            raise
        except Exception as error:  # whatever goes wrong on a machine that nobody has seen
            status, why, trace = _verdict(error)
        finally:
            self._may_interrupt = False
            signal.setitimer(signal.ITIMER_REAL, 0)
            with self._lock:
                self._current = None
                outcome.status, outcome.why, outcome.trace = status, why, trace
                outcome.seconds = time.monotonic() - started
            say(outcome.line())
            self._write()
            _tidy()

    def _write(self) -> None:
        with self._lock:
            try:
                self.report.write()
            except OSError as error:  # a full disk: what is printed is still there
                say(f"{self.report.folder} cannot be written: {error}")

    def _close(self, ended: str) -> None:
        with self._lock:
            if not self._is_over:
                self._is_over = True
                self.report.ended = ended
                self._write()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """With signals turned into exceptions, and with something that ends the process if nothing else does."""
        def alarm(*_: Any) -> None:
            if self._may_interrupt:
                raise TooLongError

        def stop(number: int, _: Any) -> None:
            raise StoppedError(signal.Signals(number).name)

        before = {number: signal.signal(number, stop) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, alarm)
        over = threading.Event()
        watchdog = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watchdog.start()
        faulthandler.dump_traceback_later(max(1.0, self.end - time.monotonic() + GRACE + 2), exit=True)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()
            over.set()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(0.2):
            with self._lock:
                current = self._current
                if current is None or time.monotonic() < current[1]:
                    continue
                outcome = current[0]
                outcome.status = CUT
                outcome.why = "It no longer answered, and the run was ended with it."
                say(outcome.line())
                self._close("Ended in a cell that no longer answered; cells that were not reached say so.")
                os._exit(1)


def _verdict(error: Exception) -> tuple[str, str, str]:
    """Status, sentence and traceback of something that was raised."""
    from kvbench.profiling.worker import is_out_of_memory

    reason = (str(error).strip().splitlines() or [""])[0]
    if is_out_of_memory(error):
        return SKIPPED, f"It does not fit: {reason}", ""
    return FAILED, f"{type(error).__name__}: {reason}", traceback.format_exc()


def _tidy() -> None:
    """Give back what a cell has left, so that the next one has the memory."""
    import torch

    gc.collect()
    with suppress(RuntimeError):  # a GPU that has failed fails here too; the next cell will say so
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def say(line: str) -> None:
    """Print at once; nobody need be listening."""
    with suppress(OSError):
        print(line, flush=True)
