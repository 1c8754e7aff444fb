"""Standard output and standard error that may be closed early, full, or missing."""

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
    """A file descriptor whose write errors are recorded instead of raised.

    After the first error, which is kept in ``fault``, everything written is dropped: what a command does must not
    depend
    on whether its output is read.
    """

    fault: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop what cannot be written; returns the number of bytes written or dropped."""
        if self.fault is None:
            try:
                return super().write(data)
            except OSError as error:
                self.fault = error
        return memoryview(data).nbytes

    @property
    def lost(self) -> str:
        """Why output was lost; empty if none was.

        A reader that closes the pipe early, as ``head`` does, is not an error.
        """
        return "" if self.fault is None or isinstance(self.fault, BrokenPipeError) else str(self.fault.strerror)


@contextmanager
def outlets() -> Iterator[Outlet]:
    """Replace standard output and error by streams that never fail, within the block; yields the outlet of the
    former."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # fill descriptors that were closed at start, so that
        pass  # no file that is opened later gets number 0, 1 or 2
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
