"""The command line, called by tests, and what is known of its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.helpers.warm import WarmProcess, call_warm

RUN = ["run", "--method", "sinks", "--ratio", "0.5", "--limit", "2"]
ROW_KEYS = {
    "task", "protocol", "model", "method", "ratio_asked", "ratio_realised", "ratio_mean", "entries_peak",
    "removal", "params", "groups", "metric", "value", "ci_low", "ci_high", "n", "unit", "delta",
    "delta_ci_low", "delta_ci_high", "p_value", "baseline", "seed", "signature",
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def kvbench(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> Outcome:
    """Run the command in a process of its own, offline; it begins warm where processes can be forked."""
    return module("kvbench", *arguments, cwd=cwd, env=env)


def module(*words: str | Path, cwd: Path, env: dict[str, str] | None = None) -> Outcome:
    """The same for any module, which is named first."""
    said, wanted = [str(word) for word in words], _environment(env)
    if sys.platform == "linux":
        return Outcome(*call_warm(said, cwd, wanted, timeout=600))
    done = subprocess.run(
        [sys.executable, "-m", *said], cwd=cwd, text=True, capture_output=True, env=wanted, timeout=600, check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def begun(*arguments: str | Path, cwd: Path, out: int, err: int) -> subprocess.Popen[bytes] | WarmProcess:
    """Start the command in a process of its own, for a test to end it.

    Args:
        out, err: numbers of the files that it writes to.
    """
    words = ["kvbench", *map(str, arguments)]
    with open(os.devnull) as nothing:
        if sys.platform == "linux":
            return WarmProcess(words, (nothing.fileno(), out, err), _environment(), cwd)
        return subprocess.Popen(
            [sys.executable, "-m", *words], cwd=cwd, env=_environment(), stdin=nothing, stdout=out, stderr=err
        )


def descendants(process: subprocess.Popen[bytes] | WarmProcess) -> list[psutil.Process]:
    """The children of a process that has begun; those of a warm one are forks of the process that it was forked from,
    and found with it."""
    one = psutil.Process(process.pid)
    return (one.parents()[1] if isinstance(process, WarmProcess) else one).children(recursive=True)


def _environment(more: dict[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "140", **(more or {})}


Call = Callable[[Sequence[str | Path]], Outcome]


def refused(call: Call, arguments: Sequence[str | Path], *words: str) -> str:
    """The request is refused with these words, without traceback, and leaves no trace."""
    before = sorted(Path.cwd().rglob("*"))
    found = call(arguments)
    assert found.code == 2, (found.code, found.out, found.err)
    for word in words:
        assert word in found.err, found.err
    assert "Traceback" not in found.err
    assert found.out == ""
    assert sorted(Path.cwd().rglob("*")) == before
    return found.err
