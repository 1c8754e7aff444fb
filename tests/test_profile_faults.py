"""Profiles under faults: children that die, memory that is short, runs that are cut off, budgets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvbench.profiling.job import ProfileJob
from kvbench.store.folder import RUN, RunFolder
from tests.conftest import kvbench
from tests.test_bad_input import refused
from tests.test_profile_command import SMALL, Call, rows


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


QUICK = ("--repeats", "1", "--rounds", "1", "--no-baselines", *SMALL)
GRID = (
    "profile", "--method", "sinks", "--seq-len", "32", "--seq-len", "96", "--batch-size", "1", "--batch-size", "2",
    *QUICK,
)
TWO_REPEATS = ("profile", "--method", "sinks", "--seq-len", "64", *QUICK, "--repeats", "2")


def test_a_child_that_is_killed_for_memory_takes_one_cell_with_it(
    called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods, two lengths, two batches: the other 7 cells are complete."""
    monkeypatch.setattr(ProfileJob, "module", "tests.killed_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    found = called([*GRID, "--out", "run", "--json"])
    assert found.code == 1, found.err
    document = found.document
    assert document["ok"] is False
    assert len(document["failures"]) == 1
    assert "full at 96 x 2" in document["failures"][0]["error"]
    assert "SIGKILL" in document["failures"][0]["error"]
    assert "memory" in document["failures"][0]["hint"]
    timed = {
        (r["method"], r["params"]["seq_len"], r["params"]["batch_size"]) for r in document["rows"]
        if r["metric"] == "tpot_s"
    }
    weighed = {
        (r["method"], r["params"]["seq_len"], r["params"]["batch_size"]) for r in document["rows"]
        if r["metric"] == "decode_peak_bytes"
    }
    every = {(m, s, b) for m in ("full", "sinks") for s in (32, 96) for b in (1, 2)}
    assert timed == weighed == every - {("full", 96, 2)}
    shown = called(["report", "run"])
    assert shown.code == 1
    assert "failed: full at 96 x 2" in shown.out
    monkeypatch.undo()


def test_memory_that_cannot_be_had_is_a_failed_cell(work: Path) -> None:
    """Under a limit on the address space the larger shape fails; the smaller one is complete."""
    code = (
        "import resource, runpy, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "sys.argv = ['kvbench', 'profile', '--method', 'sinks', '--fill', 'synthetic', '--seq-len', '64',\n"
        "  '--batch-size', '1', '--batch-size', '40000', '--new-tokens', '4', '--repeats', '1', '--rounds', '1',\n"
        "  '--no-baselines', '--threads', '1', '--out', 'limited', '--json']\n"
        "runpy.run_module('kvbench', run_name='__main__')"
    )
    # 64 tokens x 40000 rows x 6 KiB are 14.6 GiB, 4.6 at 0.7; PyTorch itself maps much more than it uses.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, (done.stdout[-500:], done.stderr[-2000:])
    document = json.loads(done.stdout)
    failed = [f["error"] for f in document["failures"]]
    assert any("full at 64 x 40000" in error for error in failed)
    assert all("x 40000" in error for error in failed)
    whole = {r["method"] for r in document["rows"] if r["metric"] == "tpot_s" and r["params"]["batch_size"] == 1}
    assert whole == {"full", "sinks"}
    assert "Traceback" not in done.stderr


def test_killed_and_run_again_it_ends_as_if_nothing_had_happened(work: Path) -> None:
    command = [sys.executable, "-m", "kvbench", *TWO_REPEATS, "--out", "torn"]
    victim = subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not list((work / "torn").glob("cells/*/records.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = psutil.Process(victim.pid).children()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for child in children:
        child.wait(timeout=30)  # a child without a parent ends by itself
    folder = RunFolder(work / "torn")
    before = {cell.key: set(folder.measurements(cell)) for cell in folder.cells()}
    found = kvbench(*TWO_REPEATS, "--out", "torn", "--json", cwd=work)
    assert found.code == 0, found.err
    assert folder.manifest()["finished"]
    for cell in folder.cells():
        lines = (folder.cell_folder(cell) / "records.jsonl").read_text().splitlines()
        assert len(lines) == len(folder.measurements(cell)) == 5  # twice a warm-up and a request; a memory pass
        assert before[cell.key] <= set(folder.measurements(cell))


def test_the_largest_batch_is_searched_for_and_timed(work: Path) -> None:
    """The fewer bytes a method keeps, the more rows fit; probes and timings are continued from disk."""
    arguments = (
        "profile", "--method", "sinks", "--ratio", "0.9", "--seq-len", "512", "--fill", "synthetic", *QUICK,
        "--memory-budget", "34MiB", "--out", "budget", "--json",
    )
    found = kvbench(*arguments, cwd=work)
    assert found.code == 0, found.err
    largest = {r["method"]: r["value"] for r in rows(found, metric="max_batch")}
    assert 1 <= largest["full"] < largest["sinks"]
    at_most = rows(found, metric="decode_tok_s", bin="budget=34MiB")
    assert {(r["method"], r["params"]["batch_size"]) for r in at_most} == set(largest.items())
    shown = kvbench("report", "budget", cwd=work)
    assert "the largest batch in 34MiB" in shown.out
    folder = RunFolder(work / "budget")
    probes = [k for c in folder.cells() for k in folder.measurements(c) if k.startswith("probe/")]
    assert "probe/1" in probes
    assert len(probes) > 4


def test_a_random_adapter_and_extended_positions_are_said(work: Path) -> None:
    arguments = (
        "profile", "--method", "ccm-concat", "--ratio", "0.9", "--model", "shape:gpt2", "--seq-len", "1100",
        "--fill", "synthetic", *QUICK, "--out", "shape",
    )
    found = kvbench(*arguments, cwd=work)
    assert found.code == 0, found.err
    assert "random weights; positions extended from 1024 to 1106; trained methods have random adapters" in " ".join(
        found.out.split()
    )
    assert "synthetic" in found.out
    again = kvbench("report", "shape", "--json", cwd=work)
    row = rows(again, method="ccm-concat", metric="tpot_s")[0]
    assert row["params"]["adapter"] == "random"
    assert row["params"]["fill"] == "synthetic"
    assert not rows(again, metric="prefill_peak_bytes")  # nothing was read


def test_weights_that_do_not_fit_are_refused_before_they_are_made(
    called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProfileJob, "module", "tests.poor_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    refused(
        called, ["profile", "--model", "shape:llama-3.1-8b", "--seq-len", "64", *SMALL], "The weights of",
        "29.92 GiB", "are free",
    )
    monkeypatch.undo()


def test_a_shape_that_does_not_fit_is_refused_before_it_is_allocated(work: Path) -> None:
    started = time.monotonic()
    found = kvbench(
        "profile", "--method", "sinks", "--seq-len", "64", "--batch-size", "1", "--batch-size", "100000000",
        "--fill", "synthetic", *QUICK, "--out", "large", "--json", cwd=work,
    )
    assert found.code == 1
    assert all("nothing was allocated" in f["error"] and "x 100000000" in f["error"]
               for f in found.document["failures"])
    assert {r["method"] for r in rows(found, metric="tpot_s")} == {"full", "sinks"}
    assert time.monotonic() - started < 120


def test_interrupted_keeps_what_was_measured(work: Path) -> None:
    start = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('kvbench', run_name='__main__')"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", start, *TWO_REPEATS, "--out", "broken-off"], cwd=work, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 100
    while not (work / "broken-off" / RUN).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGINT)
    out, err = victim.communicate(timeout=60)
    assert (victim.returncode, out) == (130, "")
    assert "interrupted; what was measured is kept" in err
    assert "Traceback" not in err
