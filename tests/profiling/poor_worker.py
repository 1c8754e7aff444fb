"""A profiling child on a machine with one GiB of free memory."""

from __future__ import annotations

from kvbench.profiling import bench, worker

if __name__ == "__main__":
    bench.free_bytes = lambda device: 1 << 30
    worker.main()
