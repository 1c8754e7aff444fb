"""The command as a launcher starts it: a process of its own, which begins warm where processes can be forked."""

from __future__ import annotations

import os
import runpy
import sys

from tests.helpers.warm import WarmProcess

if __name__ == "__main__":
    if sys.platform == "linux":
        sys.exit(WarmProcess(["kvbench", *sys.argv[1:]], (0, 1, 2), os.environ).wait())
    runpy.run_module("kvbench", run_name="__main__", alter_sys=True)
