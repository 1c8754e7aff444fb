"""What is printed may find no reader, or no room: neither is a traceback, and nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvbench.cli.streams import outlets
from tests.helpers import warm

BAD = ("Traceback", "Exception ignored", "BrokenPipe", "Errno")
FULL = "kvbench: standard output cannot be written: No space left on device."


def shell(line: str, cwd: Path, begins_warm: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a line of bash, in which ``kvbench`` is the command, and every part of a pipe counts."""
    command, place = "-m kvbench", {}
    if begins_warm and sys.platform == "linux":
        command, place = f'"{warm.__file__}" kvbench', {warm.PLACE: warm.place()}
    kvbench = f'kvbench() {{ "{sys.executable}" {command} "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail\n{kvbench}{line}"], cwd=cwd, text=True, capture_output=True, check=False,
        env={**os.environ, "COLUMNS": "140", **place}, timeout=300,
    )
    assert not any(word in done.stdout + done.stderr for word in BAD), done
    return done


@pytest.mark.parametrize("command", ["list tasks", "list tasks --json", "--help"])
def test_a_reader_who_leaves_is_no_fault(tmp_path: Path, command: str) -> None:
    for rest in ("| head -c 1", "2>&1 | head -c 1", "| true"):
        done = shell(f"kvbench {command} {rest}", tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), rest


def test_no_output_at_all_is_no_fault(tmp_path: Path) -> None:
    assert shell("kvbench list tasks >&-", tmp_path).returncode == 0
    assert shell("kvbench list tasks >&- 2>&- <&-", tmp_path).returncode == 0
    assert shell("kvbench list nothing >&- 2>&-", tmp_path).returncode == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["list tasks", "list tasks --json", "--version"])
def test_a_full_disk_is_a_sentence(tmp_path: Path, command: str) -> None:
    done = shell(f"kvbench {command} > /dev/full", tmp_path)
    assert (done.returncode, done.stderr.strip()) == (1, FULL)
    assert shell(f"kvbench {command} > /dev/full 2>&1", tmp_path).returncode == 1


@pytest.mark.heavy
def test_a_run_is_kept_whoever_reads_it(tmp_path: Path) -> None:
    """From a file whose name and column are unusual, too."""
    text = "The mill by the bridge had nine flat stones, and an otter. " * 40
    data = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    data.write_text(json.dumps({"id": "a", "body": text}) + "\n")
    what = "--method sinks --ratio 0.5 --no-baselines --task books --data caf*.jsonl --column body"
    run = f"kvbench run {what} --out run"
    done = shell(f"{run} 2>&1 | head -c 1", tmp_path, begins_warm=True)
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]
    assert len(list((tmp_path / "run" / "cells").glob("*/records.jsonl"))) == 2
    if Path("/dev/full").exists():
        full = shell(f"{run} --json > /dev/full", tmp_path, begins_warm=True)
        assert (full.returncode, full.stderr.splitlines()[-1]) == (1, FULL)
    assert shell("kvbench report run | head -c 1", tmp_path, begins_warm=True).returncode == 0


def test_the_streams_are_put_back(capfd: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with outlets() as out:
        print("half a character: \ud83d")
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before
    assert (capfd.readouterr().out, out.lost) == ("half a character: \\ud83d\n", "")
