"""Standard output and standard error as they may turn out to be: closed early, full, or not there at all."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class Outlet(io.FileIO):
    """A file descriptor that is written to for as long as it takes what is written.

    From the first fault on nothing is written any more, and nobody is told but ``fault``: what a command does must
    not depend on whether somebody reads what it says.
    """

    fault: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop what cannot be written; returns the bytes that are dealt with."""
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as error:
                self.fault = error
        return memoryview(data).nbytes

    @property
    def lost(self) -> str:
        """Why something was not written that somebody wanted to have; empty if all is well.

        A reader who has left, as ``head`` does, has what he wanted.
        """
        return "" if self.fault is None or isinstance(self.fault, BrokenPipeError) else str(self.fault.strerror)


@contextmanager
def outlets() -> Iterator[Outlet]:
    """Standard output and error that never fail, for the length of the block; the outlet of the former."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # what was closed before we were started is filled, so that
        pass  # no file of ours is taken for it
    os.close(spare)
    before = sys.stdout, sys.stderr
    streams = [_stream(stream, number) for number, stream in enumerate(before, start=1)]
    sys.stdout, sys.stderr = (text for text, _ in streams)
    try:
        yield streams[0][1]
    finally:
        for text, _ in streams:
            text.flush()
        sys.stdout, sys.stderr = before


def _stream(stream: TextIO | None, number: int) -> tuple[io.TextIOWrapper, Outlet]:
    if stream is not None:
        stream.flush()
        number = stream.fileno()
    outlet = Outlet(number, "w", closefd=False)
    encoding = "utf-8" if stream is None else stream.encoding
    text = io.TextIOWrapper(io.BufferedWriter(outlet), encoding, errors="backslashreplace", line_buffering=True)
    return text, outlet
