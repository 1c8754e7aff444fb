"""A profiling child that is killed, as a machine without memory kills it, when it comes to one cell."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from kvbench.profiling import worker
from kvbench.profiling.bench import Bench
from kvbench.store.records import Cell


class KilledWorker(worker.Worker):
    @contextmanager
    def guarded(self, cell: Cell, bench: Bench | None) -> Iterator[None]:
        with super().guarded(cell, bench):
            if (cell.method, cell.options["seq_len"], cell.options["batch_size"]) == ("full", "96", "2"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield


if __name__ == "__main__":
    worker.Worker = KilledWorker  # type: ignore[misc]
    worker.main()
