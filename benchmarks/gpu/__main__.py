"""``make gpu``: one process, a few minutes, no network, nothing installed.

Run: python3 -m benchmarks.gpu --device cuda --out reports/gpu
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import Cell, Found
from benchmarks.gpu.report import Report
from benchmarks.gpu.running import Runner, say

STARTED = time.monotonic()
"""Before anything heavy is imported: the minutes are those of the whole process."""
MINUTES, MARGIN = 6.0, 8.0
"""How long the whole may take, and the seconds of them that are left for ending."""


def main() -> int:
    """The exit code: 0 if all held or could not be had here, 1 if something did not, 2 if it cannot be tried."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"), help="folder for results.json and table.txt")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which it ends by itself (default: 6)")
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU: its numbers mean nothing")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        import torch

        from kvbench.errors import UserError
        from kvbench.models.device import pick_device

        torch.set_float32_matmul_precision("highest")  # not TF32: what must be equal is compared in float32
        device = pick_device(given.device)
    except ImportError as error:
        print(f"This Python has no {error.name}: torch and transformers are needed.", file=sys.stderr)
        return 2
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return _run(device, given)


def _run(device: Any, given: argparse.Namespace) -> int:
    from benchmarks.gpu.machine import describe

    machine = describe(device)
    note = " (small: no number means anything)" if given.small else ""
    title = f"kvbench {machine['kvbench']} on {machine.get('card', {}).get('name', device)}{note}"
    cells, settings = _planned(device, given.small)
    about = {"title": title, "small": given.small, "machine": machine, "settings": settings}
    try:
        report = Report(given.out, about, cells)
    except OSError as error:
        print(f"{given.out} cannot be written: {error}. Choose another folder with --out.", file=sys.stderr)
        return 2
    say(f"{title}: {len(cells)} cells, at most {given.minutes:g} min, into {given.out}")
    gc.collect()
    gc.freeze()  # what was imported is not gone through again before every request that is timed
    code = Runner(report, STARTED + max(1.0, 60 * given.minutes - MARGIN)).run()
    say(f"\n{report.table()}")
    return code


def _planned(device: Any, is_small: bool) -> tuple[Sequence[Cell], dict[str, Any]]:
    """The cells and how large they are; one that says why, where even that cannot be had."""
    try:
        from benchmarks.gpu.planning import planned
        from benchmarks.gpu.workshop import SMALL, Scale, Workshop

        scale = SMALL if is_small else Scale()
        return planned(Workshop(scale, device)), vars(scale)
    except Exception as error:  # versions that nobody has tried
        def fail(found: Found, until: float, error: Exception = error) -> None:
            raise error

        return [Cell("machine", "planning", fail)], {}


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # not through the destructors of libraries, which may hang after a fault of the device
