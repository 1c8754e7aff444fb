"""A profiling child that may take two GiB more than it has at its start."""

from __future__ import annotations

import resource

import psutil

from kvbench.profiling import worker

if __name__ == "__main__":
    most = psutil.Process().memory_info().vms + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    worker.main()
