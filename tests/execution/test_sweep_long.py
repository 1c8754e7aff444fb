"""What a sweep survives, on a grid of 5 methods, 4 ratios and 2 tasks; too long for every change: make test-heavy."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvbench.store.folder import RECORDS, RESULTS

pytestmark = pytest.mark.long

GRID = [
    "sweep", "--task", "minidocs", "--task", "recall",
    *(word for name in ("sentinel", "local", "sinks", "scattered", "window") for word in ("--method", name)),
    *(word for ratio in ("0.3", "0.5", "0.7", "0.9") for word in ("--ratio", ratio)),
]
CELLS = 3 * (5 * 4 + 2)
SMALL = ["--limit", "12"]


def start(*words: str, cwd: Path, log: str = "log") -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kvbench", *words], cwd=cwd, stdout=subprocess.DEVNULL,
        stderr=(cwd / log).open("ab"), env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True,
    )


def finished(*words: str, cwd: Path, log: str = "log") -> int:
    return start(*words, cwd=cwd, log=log).wait(timeout=900)


def numbers(folder: Path) -> dict[tuple[object, ...], float]:
    """Every number of every row of results.json."""
    rows = json.loads((folder / RESULTS).read_text())["rows"]
    return {
        (*(r[name] for name in ("task", "method", "ratio_asked", "metric")), r["params"]["bin"],
         r["params"].get("question"), key): r[key]
        for r in rows
        for key in ("value", "ci_low", "ci_high", "delta", "delta_ci_low", "p_value", "ratio_mean", "n")
        if r[key] is not None
    }


def lines(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob(f"cells/*/{RECORDS}"))


def check_records(folder: Path, documents: int | None = None) -> None:
    """No record twice, none lost, no torn line."""
    files = list(folder.glob(f"cells/*/{RECORDS}"))
    assert len(files) == CELLS
    for path in files:
        text = path.read_text()
        assert text.endswith("\n")
        names = [json.loads(line)["document"] for line in text.splitlines()]
        assert len(set(names)) == len(names)
        assert documents is None or len(names) == documents


def same(folder: Path, other: Path) -> None:
    assert numbers(folder) == pytest.approx(numbers(other), rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid on all documents, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert finished(*GRID, "--out", "run", cwd=folder) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid on a few documents."""
    folder = tmp_path_factory.mktemp("small")
    assert finished(*GRID, *SMALL, "--out", "run", cwd=folder) == 0
    return folder / "run"


def test_killed_ten_times_and_continued_equals_uninterrupted(whole: Path, tmp_path: Path) -> None:
    """Every other time with its children, every other time the parent alone."""
    moments = random.Random(0)
    for number in range(10):
        before = lines(tmp_path / "run")
        victim = start(*GRID, "--out", "run", cwd=tmp_path)
        while lines(tmp_path / "run") <= before and victim.poll() is None:
            time.sleep(0.1)
        time.sleep(moments.uniform(0, 8))
        assert victim.poll() is None, "the grid is too small for ten kills"
        if number % 2:
            os.killpg(victim.pid, signal.SIGKILL)
        else:
            victim.kill()
        victim.wait()
        if number == 4:  # and a line that was torn by a power cut
            path = max((tmp_path / "run").glob(f"cells/*/{RECORDS}"), key=lambda file: file.stat().st_size)
            path.write_bytes(path.read_bytes()[:-20])
    assert finished(*GRID, "--out", "run", cwd=tmp_path) == 0
    check_records(tmp_path / "run")
    same(tmp_path / "run", whole)


def test_two_processes_share_a_folder_and_the_work(whole: Path, tmp_path: Path) -> None:
    both = [start(*GRID, "--out", "run", "--workers", "1", cwd=tmp_path, log=name) for name in ("one", "other")]
    assert [process.wait(timeout=900) for process in both] == [0, 0]
    check_records(tmp_path / "run")
    same(tmp_path / "run", whole)


def test_one_of_two_is_killed_and_the_other_takes_over(small: Path, tmp_path: Path) -> None:
    both = [start(*GRID, *SMALL, "--out", "run", "--workers", "1", cwd=tmp_path) for _ in range(2)]
    time.sleep(14)
    os.killpg(both[0].pid, signal.SIGKILL)
    assert both[1].wait(timeout=900) == 0
    check_records(tmp_path / "run", 12)
    same(tmp_path / "run", small)


def test_ray_gives_the_same(small: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert finished(*GRID, *SMALL, "--out", "run", "--executor", "ray", "--workers", "2", cwd=tmp_path) == 0
    check_records(tmp_path / "run", 12)
    same(tmp_path / "run", small)


def test_slurm_jobs_give_the_same(small: Path, tmp_path: Path) -> None:
    """Submitted through submitit, to this machine."""
    pytest.importorskip("submitit")
    words = ["--executor", "slurm", "--workers", "2", "--executor-option", "cluster=local"]
    assert finished(*GRID, *SMALL, "--out", "run", *words, cwd=tmp_path) == 0
    check_records(tmp_path / "run", 12)
    same(tmp_path / "run", small)


JUMPING = """
import itertools, time
real = time.time
jumps = itertools.cycle([0, -259200, 3456000, -31536000, 7])
time.time = lambda: real() + next(jumps)
"""


def test_a_clock_that_jumps_changes_nothing(small: Path, tmp_path: Path) -> None:
    """In the parent and in its children, by days and years, at every look."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "kvbench", *GRID, *SMALL, "--out", "run"], cwd=tmp_path, stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "log").open("ab"), env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    assert process.wait(timeout=900) == 0, (tmp_path / "log").read_text()
    check_records(tmp_path / "run", 12)
    same(tmp_path / "run", small)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB."""
    mount = shutil.which("mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount or subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], check=False, capture_output=True
    ).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_the_rest_is_whole(small: Path, full_disk: Path, tmp_path: Path) -> None:
    assert finished(*GRID, *SMALL, "--out", str(full_disk / "run"), cwd=tmp_path) == 1
    words = (tmp_path / "log").read_text()
    assert "No space left on device" in words
    assert "Traceback" not in words
    shutil.copytree(full_disk / "run", tmp_path / "run", ignore=shutil.ignore_patterns(".locks"))
    assert finished(*GRID, *SMALL, "--out", "run", cwd=tmp_path) == 0
    check_records(tmp_path / "run", 12)
    same(tmp_path / "run", small)


def test_a_child_without_memory_costs_its_cell(small: Path, tmp_path: Path) -> None:
    """Killed with signal 9, as the kernel does it."""
    process = start(*GRID, *SMALL, "--out", "run", "--workers", "1", cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "run").glob(f"cells/*/{RECORDS}")) and time.monotonic() < deadline:
        time.sleep(0.05)
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    assert process.wait(timeout=900) == 1
    found = json.loads((tmp_path / "run" / RESULTS).read_text())
    (failure,) = found["failures"]
    assert "SIGKILL" in failure["error"]
    cell = json.loads((tmp_path / "run" / "cells" / failure["cell"] / "cell.json").read_text())
    key = (cell["task"], cell["method"], cell["ratio_asked"] and float(cell["ratio_asked"]))
    missing = {name[:3] for name in numbers(small)} - {name[:3] for name in numbers(tmp_path / "run")}
    assert missing == {key}
    assert finished(*GRID, *SMALL, "--out", "run", cwd=tmp_path) == 0
    same(tmp_path / "run", small)
