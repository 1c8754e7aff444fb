"""The run folder: torn lines, damage, kills, failing cells."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvbench.errors import UserError
from kvbench.models.adapter import WEIGHTS
from kvbench.models.references import assets
from kvbench.store.folder import RUN, RunFolder
from kvbench.store.progress import RunProgress
from kvbench.store.records import Failure
from kvbench.store.rows import Results
from tests.helpers.command import Outcome, kvbench
from tests.helpers.records import CELL, TEXT, record


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    made.open_cell(CELL)
    made.append(CELL, [record("a"), record("b")])
    return made


def test_records_round_trip(folder: RunFolder) -> None:
    assert list(folder.records(CELL)) == ["a", "b"]
    assert folder.records(CELL)["a"] == record("a")


def test_a_torn_last_line_is_ignored_and_repaired(folder: RunFolder) -> None:
    path = folder.cell_folder(CELL) / "records.jsonl"
    with path.open("a") as file:
        file.write('{"document": "c", "gro')
    assert list(folder.records(CELL)) == ["a", "b"]
    folder.open_cell(CELL)
    folder.append(CELL, [record("c")])
    assert list(folder.records(CELL)) == ["a", "b", "c"]


def test_packed_records_are_read_and_added_to(folder: RunFolder) -> None:
    path = folder.cell_folder(CELL) / "records.jsonl"
    packed = path.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    fresh = RunFolder(folder.path)
    assert list(fresh.records(CELL)) == ["a", "b"]
    assert RunProgress(fresh).documents(CELL) == {"a", "b"}
    assert not path.exists()
    fresh.open_cell(CELL)
    fresh.append(CELL, [record("c")])
    assert list(RunFolder(folder.path).records(CELL)) == ["a", "b", "c"]
    assert not packed.exists()


def test_damaged_packed_records_are_named_and_stay(folder: RunFolder) -> None:
    path = folder.cell_folder(CELL) / "records.jsonl"
    packed = path.with_suffix(".jsonl.gz")
    whole = gzip.compress(path.read_bytes())
    path.unlink()
    for raw in (whole[:-9], b"no gzip", whole[:12] + b"x" + whole[13:]):
        packed.write_bytes(raw)
        for use in (folder.records, folder.open_cell):
            with pytest.raises(UserError, match=r"records\.jsonl\.gz"):
                use(CELL)
        assert packed.read_bytes() == raw


def test_damage_in_the_middle_is_named(folder: RunFolder) -> None:
    path = folder.cell_folder(CELL) / "records.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(UserError, match="line 1: damaged record"):
        folder.records(CELL)


def test_a_document_counts_once(folder: RunFolder) -> None:
    folder.append(CELL, [record("a")])
    assert list(folder.records(CELL)) == ["a", "b"]


def test_records_without_the_comparison_are_measured_again(folder: RunFolder) -> None:
    folder.append(CELL, [dataclasses.replace(record("c"), kl=None, top1=None, kl_bins=None)])
    assert list(folder.records(CELL)) == ["a", "b", "c"]
    folder.open_cell(CELL)
    assert list(folder.records(CELL)) == ["a", "b"]


def test_keys_follow_the_content_only() -> None:
    assert dataclasses.replace(CELL, role="baseline", adapter="elsewhere").key == CELL.key
    for change in ({"seed": 1}, {"ratio_asked": "0.6"}, {"data_hash": "e"}, {"options": {"chunk": "1"}}):
        assert dataclasses.replace(CELL, **change).key != CELL.key


def test_results_refuse_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Results("r", True, (Failure("k", float("nan")),)).to_json()  # type: ignore[arg-type]


COMMAND = ["run", "--method", "sinks", "--method", "window", "--ratio", "0.5", "--task", "minidocs",
           "--data", "docs.jsonl", "--json", "--set", "block=64"]
DOCUMENTS = 24  # three shards


@pytest.fixture
def command(model_folder: Callable[..., Path]) -> list[str]:
    """On a small model: what is killed and continued is not what it predicts."""
    return [*COMMAND, "--model", str(model_folder("llama"))]


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    lines = [json.dumps({"id": f"d{i}", "text": f"Number {i}. " + TEXT * (6 + i % 5)}) for i in range(DOCUMENTS)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def values(outcome: Outcome) -> dict[tuple[str, str, str], float]:
    """Every number of every row that is one."""
    return {
        (r["method"], r["metric"], key): r[key]
        for r in outcome.document["rows"] for key in ("value", "ci_low", "delta", "p_value") if r[key] is not None
    }


@pytest.mark.heavy
def test_killed_at_any_moment_and_continued_equals_uninterrupted(documents: Path, command: list[str]) -> None:
    """With two children, whose records come in any order."""
    command += ["--threads", "2"]
    whole = kvbench(*command, "--out", "whole", cwd=documents)
    assert whole.code == 0, whole.err
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    patience = DOCUMENTS  # records on disk when the process is killed
    victim = subprocess.Popen(
        [sys.executable, "-m", "kvbench", *command, "--out", "killed"], cwd=documents, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline and victim.poll() is None:
        files = list((documents / "killed").glob("cells/*/records.jsonl"))
        if sum(len(f.read_bytes().splitlines()) for f in files) >= patience:
            break
        time.sleep(0.01)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    left = sum(len(path.read_bytes().splitlines()) for path in (documents / "killed").glob("cells/*/records.jsonl"))
    assert patience <= left < 6 * DOCUMENTS, "it was killed in the middle"
    continued = kvbench(*command, "--out", "killed", cwd=documents)
    assert continued.code == 0, continued.err
    assert values(continued) == pytest.approx(values(whole), rel=1e-6, abs=1e-9)
    for path in (documents / "killed").glob("cells/*/records.jsonl"):
        names = [json.loads(line)["document"] for line in path.read_text().splitlines()]
        assert len(set(names)) == len(names) == DOCUMENTS


@pytest.mark.heavy
def test_a_failing_cell_leaves_the_others_whole(documents: Path) -> None:
    """Weights that are not numbers break the cell that uses them, and it says why."""
    folder = documents / "damaged"
    shutil.copytree(assets() / "adapters" / "kvbench-tiny-sentinel", folder)
    weights = load_file(folder / WEIGHTS)
    save_file({name: torch.full_like(w, float("nan")) for name, w in weights.items()}, folder / WEIGHTS)
    found = kvbench("run", "--method", "sentinel", "--adapter", "damaged", "--ratio", "0.5", "--task", "minidocs",
                    "--data", "docs.jsonl", "--limit", "3", "--json", "--out", "faulty", cwd=documents)
    assert found.code == 1
    assert not found.document["ok"]
    (failure,) = found.document["failures"]
    assert "sentinel 0.5 on minidocs" in failure["error"]
    assert "not finite" in failure["error"]
    assert {r["method"] for r in found.document["rows"]} == {"full", "none", "local", "scattered", "sinks"}
    assert len(list((documents / "faulty").glob("cells/*/failure.json"))) == 1


@pytest.mark.heavy
def test_streams_beyond_learned_positions_are_refused(documents: Path, model_folder: Callable[..., Path]) -> None:
    found = kvbench("run", "--model", model_folder("gpt2", context=96), "--method", "sinks", "--ratio", "0.5",
                    "--task", "minidocs", "--data", "docs.jsonl", "--limit", "3", "--protocol", "stream",
                    "--set", "tokens=200", "--json", "--out", "beyond", cwd=documents)
    assert found.code == 2
    assert "learned positions up to 96" in found.err
    assert "--set tokens=96" in found.err
    assert not (documents / "beyond").exists()


@pytest.mark.heavy
def test_a_killed_child_costs_its_cell_only(documents: Path, command: list[str]) -> None:
    victim = subprocess.Popen(
        [sys.executable, "-m", "kvbench", *command, "--out", "wounded", "--threads", "1"], cwd=documents, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    children = Path(f"/proc/{victim.pid}/task/{victim.pid}/children")
    deadline = time.monotonic() + 100
    while not list((documents / "wounded").glob("cells/*/records.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = [int(pid) for pid in children.read_text().split()]
    os.kill(pids[0], signal.SIGKILL)
    out, _ = victim.communicate(timeout=200)
    document = json.loads(out)
    assert victim.returncode == 1
    (failure,) = document["failures"]
    assert "SIGKILL" in failure["error"]
    assert "memory" in failure["hint"]
    broken = json.loads((documents / "wounded" / "cells" / failure["cell"] / "cell.json").read_text())["method"]
    methods = {r["method"] for r in document["rows"]}
    assert methods == {"full", "none", "local", "scattered", "sinks", "window"} - {broken}
    again = kvbench(*command, "--out", "wounded", "--threads", "1", cwd=documents)
    assert again.code == 0, again.err
    assert again.document["ok"]


@pytest.mark.heavy
def test_interrupted_keeps_what_was_measured(documents: Path) -> None:
    # Tests that a script starts in the background inherit a SIGINT that is ignored: kvbench shall not.
    start = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('kvbench', run_name='__main__')"
    )
    victim = subprocess.Popen(
        [sys.executable, "-c", start, *COMMAND, "--out", "broken-off"], cwd=documents, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    deadline = time.monotonic() + 100
    while not (documents / "broken-off" / RUN).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGINT)
    out, err = victim.communicate(timeout=60)
    assert (victim.returncode, out) == (130, "")
    assert "interrupted; what was measured is kept" in err
    assert "Traceback" not in err
    assert RunFolder(documents / "broken-off").manifest().finished is None


def test_two_processes_cannot_share_a_folder(
    called: Callable[[Sequence[str | Path]], Outcome], tmp_path: Path
) -> None:
    from kvbench.execution.locks import locked

    with locked(tmp_path / "run"):
        found = called(["run", "--method", "sinks", "--limit", "1", "--task", "minidocs", "--out", "run"])
    assert found.code == 2
    assert "Another kvbench is measuring" in found.err


def test_damaged_notes_are_sentences(folder: RunFolder) -> None:
    folder.fail(CELL, Failure(CELL.key, "it broke"))
    (folder.cell_folder(CELL) / "failure.json").write_text("{")
    found = folder.failure(CELL)
    assert found is not None
    assert "cannot be read" in found.error
    (folder.path / RUN).write_text(json.dumps({"content": "x", "tasks": {}, "cells": [{"model": "m"}]}))
    with pytest.raises(UserError, match="damaged"):
        folder.cells()


def test_a_run_that_was_killed_before_its_first_file_can_be_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.lock("manifest"):
        (folder.path / "run.json.0123.part").write_text("{")
    folder.check("content")
    (folder.path / "letters.txt").write_text("mine")
    with pytest.raises(UserError, match="not a kvbench run"):
        folder.check("content")
