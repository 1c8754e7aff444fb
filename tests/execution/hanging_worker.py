"""A measuring child that hangs when it comes to one cell."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from kvbench.execution import worker
from kvbench.store.records import Cell


class HangingWorker(worker.Worker):
    @contextmanager
    def guarded(self, cell: Cell) -> Iterator[None]:
        with super().guarded(cell):
            if cell.method == "sinks":
                time.sleep(600)
            yield


if __name__ == "__main__":
    worker.Worker = HangingWorker  # type: ignore[misc]
    worker.main()
