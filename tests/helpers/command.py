"""The command line, called by tests, and what is known of its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.warm import call_warm

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
    words = [str(word) for word in arguments]
    wanted = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "140", **(env or {})}
    if sys.platform == "linux":
        return Outcome(*call_warm(words, cwd, wanted, timeout=600))
    done = subprocess.run(
        [sys.executable, "-m", "kvbench", *words], cwd=cwd, text=True, capture_output=True, env=wanted, timeout=600,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


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
