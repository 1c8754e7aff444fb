"""Profiles under faults: children that die, memory that is short, runs that are cut off, budgets."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from queue import Queue
from tempfile import TemporaryFile
from typing import Any

import pytest

from kvbench.analysis.profile import profile_results
from kvbench.errors import UserError
from kvbench.execution.channel import At, Channel, End, Event, Failed, Ready, Records, event_of
from kvbench.execution.process import WorkerProcess
from kvbench.models.random_models import is_shape
from kvbench.models.references import resolve_model
from kvbench.planning.profile import ProfilePlan, ProfileRequest, at_batch, build_profile_plan
from kvbench.profiling.job import ProfileJob
from kvbench.profiling.parent import check_machine
from kvbench.profiling.worker import Worker
from kvbench.store.folder import RUN, RunFolder
from kvbench.store.manifest import Machine, ProfileInfo
from kvbench.store.profile_records import TimingRecord
from kvbench.store.records import Cell
from tests.helpers.command import Call, begun, descendants, kvbench, refused
from tests.helpers.profiles import SMALL, rows


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


QUICK = ("--repeats", "1", "--rounds", "1", "--no-baselines", *SMALL)
GRID = (
    "profile", "--method", "sinks", "--seq-len", "32", "--seq-len", "96", "--batch-size", "1", "--batch-size", "2",
    *QUICK,
)
TWO_REPEATS = ("profile", "--method", "sinks", "--seq-len", "64", *QUICK, "--repeats", "2")


@pytest.mark.long
def test_a_child_that_is_killed_for_memory_takes_one_cell_with_it(
    called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two methods, two lengths, two batches: the other 7 cells are complete."""
    monkeypatch.setattr(ProfileJob, "module", "tests.profiling.killed_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
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


def test_killed_and_run_again_it_ends_as_if_nothing_had_happened(work: Path) -> None:
    with open(os.devnull, "w") as nothing:
        victim = begun(*TWO_REPEATS, "--out", "torn", cwd=work, out=nothing.fileno(), err=nothing.fileno())
    deadline = time.monotonic() + 100
    while not list((work / "torn").glob("cells/*/records.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = descendants(victim)
    assert children
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    for child in children:
        child.wait(timeout=30)  # a child without a parent ends by itself
    folder = RunFolder(work / "torn")
    before = {cell.key: set(folder.measurements(cell)) for cell in folder.cells()}
    found = kvbench(*TWO_REPEATS, "--out", "torn", "--json", cwd=work)
    assert found.code == 0, found.err
    assert folder.manifest().finished
    for cell in folder.cells():
        lines = (folder.cell_folder(cell) / "records.jsonl").read_text().splitlines()
        assert len(lines) == len(folder.measurements(cell)) == 5  # twice a warm-up and a request; a memory pass
        assert before[cell.key] <= set(folder.measurements(cell))


@pytest.mark.long
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
    # Nothing of it is missing: it is printed again although its end was not noted, and no child is started.
    manifest = json.loads((work / "budget" / RUN).read_text())
    (work / "budget" / RUN).write_text(json.dumps({**manifest, "finished": None}))
    again = kvbench(*arguments, cwd=work)
    assert again.code == 0, again.err
    assert again.document == found.document
    # A search that was cut off is not passed off as one that has ended.
    for cell in folder.cells():
        folder.forget(cell, "search")
    cut = kvbench("report", "budget", "--json", cwd=work)
    assert cut.code == 1
    assert {f["error"].split(":")[1] for f in cut.document["failures"]} == {
        " the search for the largest batch has not ended."
    }
    assert not rows(cut, metric="max_batch")


def test_weights_that_do_not_fit_are_refused_before_they_are_made(
    called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ProfileJob, "module", "tests.profiling.poor_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    refused(
        called, ["profile", "--model", "shape:llama-3.1-8b", "--seq-len", "64", *SMALL], "The weights of",
        "29.92 GiB", "are free",
    )
    monkeypatch.undo()


def test_what_is_measured_again_does_not_stand_beside_the_old(tmp_path: Path) -> None:
    """A repeat is one process: requests of two processes are never paired."""
    folder = RunFolder(tmp_path / "run")
    cell = cells_of()[0]
    folder.open_cell(cell)
    old = [TimingRecord(r, 0, False, 1.0, 0.0, 1.0, (1.0,), 2.0, 64, 64, 64.0, 1, 1) for r in (0, 1)]
    folder.append(cell, old)
    folder.forget(cell, "time/1/")
    assert list(folder.measurements(cell)) == ["time/0/round/0"]
    folder.append(cell, [dataclasses.replace(old[1], gaps=(10.0,))])
    again = folder.measurements(cell)["time/1/round/0"]
    assert isinstance(again, TimingRecord)
    assert again.tpot_s == 10.0


def test_rows_of_a_profile_by_hand(tmp_path: Path) -> None:
    """Constant sizes have no slope per entry; without full, its twin stands for it; without both there is none."""
    folder = RunFolder(tmp_path / "run")
    cells = cells_of(methods=("none",), seq_lens=(64, 128, 256), baselines=True)
    speed = {"full": 1.0, "full-again": 1.0, "full-dynamic": 4.0, "none": 0.5}
    for cell in cells:
        folder.open_cell(cell)
        raw = int(cell.options["seq_len"])
        entries = 16.0 if cell.method == "none" else float(raw)
        folder.append(cell, [
            TimingRecord(
                r, n, False, 1.0, 0.0, 1.0, (speed[cell.method] * (1 + 0.01 * n),) * 3, 2.0, raw, raw, entries, 1, 1,
                1e9,
            )
            for r in range(2) for n in range(3)
        ])
    info = ProfileInfo(repeats=2, signature="s")

    def speedups(without: tuple[str, ...]) -> dict[str, tuple[float | None, str | None]]:
        found, _ = profile_results(folder, info, [c for c in cells if c.method not in without])
        return {r.method: (r.value, r.baseline) for r in found
                if r.metric == "decode_speedup" and r.params["seq_len"] == 64}

    assert speedups(())["none"] == (pytest.approx(2.0), "full")
    assert speedups(())["full-dynamic"] == (pytest.approx(0.25), "full")
    assert "full" not in speedups(())
    assert speedups(("full",))["none"] == (pytest.approx(2.0), "full-again")
    assert speedups(("full", "full-again")) == {}
    found, _ = profile_results(folder, info, cells)
    assert {r.method for r in found if r.metric == "tpot_per_raw_s"} == set(speed)
    assert {r.method for r in found if r.metric == "tpot_per_entry_s"} == set(speed) - {"none"}


def test_a_profile_is_not_continued_on_another_machine(tmp_path: Path) -> None:
    here = Machine(device="cpu", dtype="float32", threads=2)
    with pytest.raises(UserError, match="measured with threads 1, and here it is 2"):
        check_machine(tmp_path, replace(here, threads=1), here)
    check_machine(tmp_path, here, here)


def build(**settings: Any) -> ProfilePlan:
    wanted: dict[str, Any] = {
        "model": "kvbench-tiny", "revision": None, "adapters": (), "methods": ("sinks",), "ratios": ("0.7",),
        "seq_lens": (64,), "batch_sizes": (1,), "new_tokens": 4, "chunk": 256, "fill": "synthetic", "repeats": 1,
        "rounds": 1, "warmups": 1, "budget": None, "timeout": 60, "seed": 0, "options": {}, "out": None,
        "reports": Path("reports"), "baselines": False, "device": "cpu", "dtype": "auto", "threads": 1,
    }
    return build_profile_plan(ProfileRequest(**(wanted | settings)))


def cells_of(**settings: Any) -> tuple[Cell, ...]:
    """The cells of a request; without the twin and the cache of transformers, unless asked for."""
    return build(**settings).cells


def job_of(kind: str, cells: tuple[Cell, ...], **settings: Any) -> ProfileJob:
    name = cells[0].model
    location = name if is_shape(name) else resolve_model(name).location
    longest = max(int(c.options["seq_len"]) + int(c.options["new_tokens"]) for c in cells)
    return ProfileJob(kind, cells, location, longest, 0, rounds=1, warmups=1, **settings)


def events_of(job: ProfileJob) -> list[Any]:
    """What a child would report, run inside this process."""
    said = StringIO()
    worker = Worker(job, Channel(said))
    worker.run(worker.prepare())
    return [event_of(line) for line in said.getvalue().splitlines()]


def test_a_random_adapter_and_extended_positions_are_said() -> None:
    cells = cells_of(model="shape:gpt2", methods=("ccm-concat",), ratios=("0.9",), seq_lens=(1100,))
    assert [(c.method, c.adapter) for c in cells] == [("full", None), ("ccm-concat", "random")]
    ready, *events = events_of(job_of("time", cells))
    assert ready.machine.notes == ("random weights", "positions extended from 1024 to 1104")
    records = [record for event in events if isinstance(event, Records) for record in event.records]
    assert [(r["held"], r["warmup"]) for r in records] == [(1100, True), (110, True), (1100, False), (110, False)]
    assert all(r["ttft_s"] is None and len(r["gaps"]) == 3 for r in records)
    assert events[-1] == End()


def test_a_shape_that_does_not_fit_is_refused_before_it_is_allocated() -> None:
    events = events_of(job_of("time", cells_of(batch_sizes=(100_000_000,))))
    assert [type(event) for event in events] == [Ready, At, Failed]
    assert "nothing was allocated" in events[-1].failure.error
    assert "--batch-size" in events[-1].failure.hint


@pytest.mark.parametrize("kind", ["time", "memory"])
def test_memory_that_cannot_be_had_is_a_failed_cell(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a limit on the address space: 64 tokens x 40000 rows x 6 KiB are 14.6 GiB."""
    monkeypatch.setattr(ProfileJob, "module", "tests.profiling.short_worker")
    monkeypatch.chdir(Path(__file__).parents[2])
    events: Queue[tuple[int, Event | None]] = Queue()
    child = WorkerProcess(job_of(kind, cells_of(batch_sizes=(40_000,))[:1]), 0, events)
    child.tell("go")
    said = [event for _, event in iter(lambda: events.get(timeout=100), (0, None))]
    assert isinstance(said[-1], Failed), child.death()
    assert "--batch-size" in said[-1].failure.hint
    child.stop()


def test_a_probe_that_runs_out_of_memory_does_not_fit() -> None:
    cells = cells_of(batch_sizes=(4,), budget="30MiB")
    search = next(c for c in cells if c.options["batch_size"] == "0")

    def probed(batch: int, budget: int) -> dict[str, Any]:
        events = events_of(job_of("probe", (at_batch(search, batch),), budget=budget))
        return next(event.records[0] for event in events if isinstance(event, Records))

    fits = probed(2, 64 << 20)
    assert (fits["fits"], fits["why"], fits["batch"]) == (True, "", 2)
    assert 20 << 20 < fits["needed"] < 64 << 20
    short = probed(2, fits["needed"] - 8192)  # what a layout works out once is not taken again in this process
    assert (short["fits"], short["why"][:4]) == (False, "took")
    far = probed(4000, 64 << 20)
    assert (far["fits"], far["why"][:14]) == (False, "needs at least")


def test_interrupted_keeps_what_was_measured(work: Path) -> None:
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        victim = begun(*TWO_REPEATS, "--out", "broken-off", cwd=work, out=out.fileno(), err=err.fileno())
        deadline = time.monotonic() + 100
        while not (work / "broken-off" / RUN).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        victim.send_signal(signal.SIGINT)
        code = victim.wait(timeout=60)
        out.seek(0)
        err.seek(0)
        printed, said = out.read(), err.read()
    assert (code, printed) == (130, "")
    assert "interrupted; what was measured is kept" in said
    assert "Traceback" not in said
