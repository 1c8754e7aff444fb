"""A child process that measures, as seen from its parent."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from typing import IO, ClassVar, Generic, Protocol, TypeVar

from kvbench.execution.channel import Event, event_of


class Task(Protocol):
    """The job of a child process: the module that runs it, and its JSON form."""

    module: ClassVar[str]

    def to_json(self) -> str: ...


Work = TypeVar("Work", bound=Task)


class WorkerDiedError(Exception):
    """A child process died before it was ready; the message says how."""


class WorkerProcess(Generic[Work]):
    """A child process, and a thread that puts its events into a queue: (number, event), and (number, None) at the
    end."""

    def __init__(self, job: Work, number: int, events: queue.Queue[tuple[int, Event | None]]) -> None:
        self.job = job
        self.at: str | None = None
        self.ended = False
        self.killed_for = ""
        self.log: IO[str] = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", job.module], text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        self.tell(job.to_json())
        threading.Thread(target=self._listen, args=(number, events), daemon=True).start()

    def _listen(self, number: int, events: queue.Queue[tuple[int, Event | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith("\n"):
                events.put((number, event_of(line)))
        events.put((number, None))

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it died; the None in the queue reports it
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def death(self) -> str:
        """Wait until the process has ended, and describe how, with the last line of its log."""
        code = self.process.wait()
        if self.killed_for:
            return self.killed_for
        self.log.seek(0)
        lines = [line for line in self.log.read().splitlines() if line.strip()]
        last = f" Its last words: {lines[-1][:300]}" if lines else ""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return f"the measuring process {how}.{last}"

    def hint(self) -> str:
        if self.killed_for:
            return "Give it more time with --timeout, or fewer or shorter documents."
        if self.process.returncode == -signal.SIGKILL:
            return "It was probably out of memory: try --dtype bfloat16, shorter blocks, or a smaller model."
        return ""

    def kill(self, reason: str) -> None:
        """Kill the process; ``death`` then returns this reason."""
        self.killed_for = reason
        self.process.kill()

    def dismiss(self) -> None:
        """Close the input of the process, which then exits by itself."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
