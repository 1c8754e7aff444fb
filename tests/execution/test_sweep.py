"""Sweeps: what is kept, what is added, what fails by itself; kills and clusters are in test_sweep_long.py."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbench.errors import UserError
from kvbench.execution import executors
from kvbench.execution.executors import Ended, participate
from kvbench.execution.job import Job
from kvbench.execution.shards import ShardLocks, split_into_shards
from kvbench.store.folder import RECORDS, RUN, RunFolder
from kvbench.store.manifest import TaskInfo
from kvbench.store.progress import RunProgress
from tests.helpers.command import Call, Outcome, kvbench
from tests.helpers.records import CELL, TEXT, record


def sweep(*words: str, method: str = "sinks") -> list[str]:
    return ["sweep", "--method", method, "--ratio", "0.5", "--task", "minidocs", "--data", "docs.jsonl",
            "--set", "block=64", "--no-baselines", "--json", *words]


def write_documents(folder: Path) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": f"Number {i}. " + TEXT * (6 + i % 5)}) for i in range(12)]
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")


def recorded(folder: Path) -> dict[tuple[str, int], list[str]]:
    """(method, seed) -> its lines of records."""
    found = {}
    for path in folder.glob("cells/*/cell.json"):
        cell = json.loads(path.read_text())
        found[cell["method"], cell["seed"]] = (path.parent / RECORDS).read_text().splitlines()
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_documents(folder)
    return folder


@pytest.fixture(scope="module")
def first(place: Path) -> Outcome:
    """Two seeds of one method on four documents."""
    return kvbench(*sweep("--limit", "4", "--seed", "0", "--seed", "1", "--out", "run"), cwd=place)


@pytest.mark.heavy
def test_a_grid_has_rows_for_every_seed(first: Outcome, place: Path) -> None:
    assert first.code == 0, first.err
    assert {(r["method"], r["seed"]) for r in first.document["rows"]} == {
        (method, seed) for method in ("full", "sinks") for seed in (0, 1)
    }
    assert all(r["baseline"] == "full" for r in first.document["rows"] if r["delta"] is not None)
    manifest = RunFolder(place / "run").manifest()
    assert set(manifest.tasks) == {"minidocs@kvbench-tiny#0", "minidocs@kvbench-tiny#1"}
    assert manifest.finished
    assert set(RunFolder(place / "run").masks()) == {"full", "sinks 0.5"}


@pytest.mark.long
def test_more_documents_and_another_method_only_add(first: Outcome, place: Path) -> None:
    assert first.code == 0
    before = recorded(place / "run")
    more = kvbench(*sweep("--limit", "6", "--method", "window", "--out", "run"), cwd=place)
    assert more.code == 0, more.err
    after = recorded(place / "run")
    for key in (("full", 0), ("sinks", 0)):
        assert after[key][:4] == before[key]
        assert len(after[key]) == 6
    assert after["sinks", 1] == before["sinks", 1]  # not asked for this time, and kept
    assert {r["method"] for r in more.document["rows"]} == {"full", "sinks", "window"}
    assert {r["seed"] for r in more.document["rows"]} == {0}
    both = kvbench(*sweep("--limit", "6", "--seed", "0", "--seed", "1", "--out", "run"), cwd=place)
    assert {(r["seed"], r["n"]) for r in both.document["rows"] if r["metric"] == "recovery" or r["unit"] == "document"
            } == {(0, 6), (1, 6)}
    after = recorded(place / "run")
    assert len(after["sinks", 1]) == 6
    back = kvbench(*sweep("--limit", "4", "--seed", "0", "--seed", "1", "--out", "run"), cwd=place)
    assert recorded(place / "run") == after  # nothing was measured again
    numbers = [(r["method"], r["metric"], r["seed"], r["value"]) for r in first.document["rows"]]
    assert [(r["method"], r["metric"], r["seed"], r["value"]) for r in back.document["rows"]] == numbers


@pytest.mark.heavy
def test_a_damaged_cell_fails_by_itself(first: Outcome, place: Path, tmp_path: Path) -> None:
    assert first.code == 0
    write_documents(tmp_path)
    found = kvbench(*sweep("--limit", "3", "--method", "window", "--out", "run"), cwd=tmp_path)
    assert found.code == 0, found.err
    cells = {c.method: c for c in RunFolder(tmp_path / "run").cells()}
    path = RunFolder(tmp_path / "run").cell_folder(cells["sinks"]) / RECORDS
    path.write_text("not a record\n" + path.read_text())
    again = kvbench(*sweep("--limit", "5", "--method", "window", "--out", "run"), cwd=tmp_path)
    assert again.code == 1
    (failure,) = again.document["failures"]
    assert "sinks 0.5 on minidocs" in failure["error"]
    assert "line 1: damaged record" in failure["error"]
    assert "Traceback" not in again.err
    assert {r["method"] for r in again.document["rows"]} == {"full", "window"}
    assert {r["n"] for r in again.document["rows"] if r["metric"] == "ppl" and r["params"]["bin"] is None} == {5}
    report = kvbench("report", "run", "--json", cwd=tmp_path)  # and the report is made of the others
    assert report.code == 1
    assert [f["cell"] for f in report.document["failures"]] == [failure["cell"]]


@pytest.mark.heavy
def test_a_finished_folder_that_lost_records_is_completed(first: Outcome, place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    write_documents(tmp_path)
    for path in tmp_path.glob("run/cells/*/records.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[:-1]) + lines[-1][:40])  # the last one torn
    again = kvbench(*sweep("--limit", "4", "--seed", "0", "--seed", "1", "--out", "run"), cwd=tmp_path)
    assert again.code == 0, again.err
    assert "no longer whole" in again.err
    assert again.document["rows"] == first.document["rows"]


@pytest.mark.heavy
@pytest.mark.parametrize("policy", ["--keep-going", pytest.param("--fail-fast", marks=pytest.mark.long)])
def test_a_child_that_hangs_costs_its_cell(
    policy: str, called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path)
    monkeypatch.setattr(Job, "module", "tests.execution.hanging_worker")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    words = sweep("--method", "window", "--limit", "3", "--timeout", "3", "--out", "run", policy)
    found = called(words)
    assert found.code == 1
    by_method = {f["error"].split()[0]: f for f in found.document["failures"]}
    assert "no sign of life for 3 s" in by_method["sinks"]["error"]
    assert "--timeout" in by_method["sinks"]["hint"]
    if policy == "--keep-going":
        assert {r["method"] for r in found.document["rows"]} == {"full", "window"}
    else:
        assert set(by_method) >= {"sinks", "window"}
        assert "Stopped at the first failure" in found.err


@pytest.mark.long
def test_workers_elsewhere_fill_the_same_folder(
    called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An executor only starts commands: here two at once on this machine, one of which is killed."""
    write_documents(tmp_path)

    def here(
        command: Sequence[str], workers: int, options: Mapping[str, str], begin: Callable[[], None],
        look: Callable[[float], None],
    ) -> list[Ended]:
        begin()
        with ThreadPoolExecutor(workers + 1) as pool:
            tasks = [pool.submit(participate, command, str(tmp_path)) for _ in range(workers)]
            suicide = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {signal.SIGKILL})"]
            lost = pool.submit(participate, suicide, str(tmp_path))
            while not all(task.done() for task in tasks):
                look(0.2)
            return [task.result() for task in [*tasks, lost]]

    monkeypatch.setattr(executors, "EXECUTORS", {"ray": here})
    monkeypatch.setattr("kvbench.execution.cluster.EXECUTORS", {"ray": here})
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    found = called(sweep("--method", "window", "--executor", "ray", "--workers", "2", "--out", "run",
                         "--executor-option", "a=1", "--executor-option=b=2", "--fresh"))
    assert found.code == 0, found.err
    assert f"a worker ended with code {-signal.SIGKILL}" in found.err
    assert {r["method"] for r in found.document["rows"]} == {"full", "sinks", "window"}
    for lines in recorded(tmp_path / "run").values():
        names = [json.loads(line)["document"] for line in lines]
        assert len(names) == len(set(names)) == 12


def test_a_worker_that_is_refused_is_a_sentence(
    called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_documents(tmp_path)
    monkeypatch.setattr(
        "kvbench.execution.cluster.EXECUTORS",
        {"ray": lambda *_: [Ended(2, "kvbench: No model hub can be reached.")]},
    )
    found = called(sweep("--executor", "ray", "--out", "run"))
    assert found.code == 2
    assert "No model hub can be reached." in found.err
    assert not (tmp_path / "run").exists()


def test_a_missing_executor_leaves_what_was_measured(
    called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--fresh clears when there is something to start, and old results are not taken for new ones."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / RUN).write_text('{"content": "another", "limit": 0, "cells": [], "tasks": {}}')
    write_documents(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert called(sweep("--executor", "ray", "--fresh", "--out", "run")).code == 2
    assert (tmp_path / "run" / RUN).exists()
    broken = {"ray": lambda *_: [Ended(1, "ModuleNotFoundError: x")]}
    monkeypatch.setattr("kvbench.execution.cluster.EXECUTORS", broken)
    found = called(sweep("--executor", "ray", "--out", "run"))
    assert found.code == 2
    assert "ModuleNotFoundError: x" in found.err


def test_what_a_method_cannot_do_is_left_out_and_said(called: Call) -> None:
    words = ["sweep", "--method", "ccm-concat", "--ratio", "0.3", "--ratio", "0.9", "--dry-run"]
    found = called(words)
    assert found.code == 0
    assert "left out: ccm-concat at ratio 0.3" in found.out
    cells = called([*words, "--json"]).document["cells"]
    assert {c["ratio_asked"] for c in cells if c["method"] == "ccm-concat"} == {"0.9"}
    assert {c["ratio_asked"] for c in cells if c["method"] == "local"} == {"0.3", "0.9"}
    assert "About" in found.out  # and what it costs
    refused = called(["sweep", "--method", "ccm-concat", "--ratio", "0.3"])
    assert refused.code == 2
    assert "needs chunks of 3 tokens" in refused.err


def test_the_folder_follows_what_is_measured_on(called: Call) -> None:
    def folder(*words: str) -> str:
        return str(called(["sweep", *words, "--dry-run", "--json"]).document["run"])

    usual = folder("--method", "sinks")
    assert usual == folder("--method", "window", "--ratio", "0.2", "--seed", "4", "--limit", "3")
    assert usual != folder("--method", "sinks", "--task", "minidocs")
    assert usual != folder("--method", "sinks", "--dtype", "bfloat16")


def test_the_grid_is_read_from_the_settings(called: Call, tmp_path: Path) -> None:
    grid = 'method = ["sinks"]\nratio = [0.25]\ntask = ["recall"]\nseed = [3, 4]\n'
    (tmp_path / "grid.toml").write_text(f"[sweep]\n{grid}")
    cells = called(["sweep", "grid.toml", "--dry-run", "--json"]).document["cells"]
    assert {c["seed"] for c in cells} == {3, 4}
    assert {c["task"] for c in cells} == {"recall"}


@pytest.mark.parametrize(("words", "message"), [
    (["--executor", "kubernetes"], "Unknown executor"),
    (["--timeout", "0"], "not above 0"),
    (["--executor-option", "num_cpus=2"], "is for --executor ray or slurm"),
    (["--seed", "-1"], "negative"),
    (["--limit", "0"], "below 1"),
    (["missing.toml"], "There is no settings file"),
    (["one.toml", "--config", "other.toml"], "given twice"),
    (["bad.toml"], "unknown key 'sweep.methods'"),
    (["--method", "sinks", "--executor", "ray", "--executor-option", "gpus=1"], "Unknown option of ray"),
])
def test_bad_requests_are_sentences(words: list[str], message: str, called: Call, tmp_path: Path) -> None:
    if "ray" in words:
        pytest.importorskip("ray")
    (tmp_path / "bad.toml").write_text('[sweep]\nmethods = ["sinks"]\n')
    found = called(["sweep", *words])
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(("executor", "module", "extra"), [("ray", "ray", "[ray]"), ("slurm", "submitit", "[slurm]")])
def test_a_missing_extra_is_a_sentence(
    executor: str, module: str, extra: str, called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    found = called(["sweep", "--method", "sinks", "--executor", executor])
    assert found.code == 2
    assert f"pip install 'kvbench{extra}'" in found.err


def test_a_part_is_held_by_one(tmp_path: Path) -> None:
    mine, theirs = ShardLocks(RunFolder(tmp_path)), ShardLocks(RunFolder(tmp_path))
    assert mine.take("part")
    assert not mine.take("part")
    assert not theirs.take("part")
    assert theirs.take("other")
    mine.release("part")
    assert theirs.take("part")
    theirs.release_all()
    assert mine.take("part")
    assert mine.take("other")


@given(st.integers(1, 700), st.integers(1, 5))
def test_parts_hold_every_document_once(count: int, methods: int) -> None:
    cells = [dataclasses.replace(CELL, method=f"m{i}") for i in range(methods)]
    documents = [f"d{i}" for i in range(count)]
    info = TaskInfo(
        kind="lm", signature="s", seq_len=8, documents=tuple(documents), lengths=(3,) * count
    )
    parts = split_into_shards(cells, {CELL.task: info})
    assert [name for part in parts for name in part.documents] == documents
    assert len({part.name for part in parts}) == len(parts)
    assert sum(part.tokens for part in parts) == 3 * count * methods


def test_what_a_killed_process_left_is_cut_off_before_the_next_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open_cell(CELL)
    folder.append(CELL, [record("a")])
    path = folder.cell_folder(CELL) / RECORDS
    with path.open("ab") as file:
        file.write(path.read_bytes()[:30])
    folder.append(CELL, [record("b")])
    assert list(RunFolder(tmp_path).records(CELL)) == ["a", "b"]
    assert len(path.read_text().splitlines()) == 2


def test_documents_are_read_as_they_come(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.open_cell(CELL)
    seen = RunProgress(folder)
    assert seen.documents(CELL) == set()
    folder.append(CELL, [record("a")])
    assert seen.documents(CELL) == {"a"}
    path = folder.cell_folder(CELL) / RECORDS
    with path.open("ab") as file:
        file.write(b'{"document": "tor')
    assert seen.documents(CELL) == {"a"}
    folder.append(CELL, [record("b"), record("c")])
    assert seen.documents(CELL) == {"a", "b", "c"}
    path.write_text(path.read_text().splitlines()[0] + "\n")  # dropped by another process
    assert seen.documents(CELL) == {"a"}


def test_no_worker_can_begin_outside_the_shared_folder(tmp_path: Path) -> None:
    ended = participate(["true"], str(tmp_path / "elsewhere"))
    assert ended.code == 2
    assert os.uname().nodename in ended.words


def test_a_report_of_two_runs(first: Outcome, place: Path, called: Call, tmp_path: Path) -> None:
    assert first.code == 0
    run = place / "run"
    assert called(["report", run, run]).code == 2
    found = called(["report", run, run, "--out", tmp_path / "paper", "--json"])
    assert found.code in (0, 1)
    names = {path.name for path in (tmp_path / "paper").iterdir()}
    assert names == {"results.json", "table.txt", "tables", "figures", "report.html"}
    assert (tmp_path / "paper" / "figures" / "masks.pdf").exists()
    assert (run / RUN).exists()
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder(tmp_path / "paper").manifest()
