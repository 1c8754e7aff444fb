"""``make gpu`` on a CPU: it runs to its end with next to nothing installed, and an interrupted run still tells."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.cells import Cell, Found, NotHereError
from benchmarks.gpu.planning import planned
from benchmarks.gpu.report import Report
from benchmarks.gpu.running import Runner
from benchmarks.gpu.workshop import SMALL, Scale, Workshop
from kvbench.data.documents import embedded_documents, load_corpus
from kvbench.data.tasks import load_task
from kvbench.methods import METHODS, CachePolicy, LayoutMethod

ROOT = Path(__file__).resolve().parents[2]
NOT_THERE = ("pydantic", "datasets", "mauve", "rouge_score")
NOR_THESE = ("typer", "rich", "psutil", "scipy", "pandas", "peft", "matplotlib", "sacrebleu", "sentence_transformers")
FILES = {"results.json", "table.txt"}

WITHOUT = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
"""


def started(
    out: Path, *arguments: str, absent: tuple[str, ...] = NOT_THERE, module: str = "benchmarks.gpu"
) -> subprocess.Popen[str]:
    """A script in a process of its own, in which some packages are not installed."""
    hook = out.parent / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(WITHOUT.format(absent=set(absent)), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(hook), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", module, "--small", "--device", "cpu", "--out", str(out), *arguments],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )


def results(out: Path) -> dict[str, Any]:
    """What is in the folder, once it has been seen that nothing else is, and that every cell has an outcome."""
    assert {path.name for path in out.iterdir()} == FILES
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    table = (out / "table.txt").read_text(encoding="utf-8")
    for cell in found["cells"]:
        numbers = [number["value"] for number in cell["numbers"].values()]
        assert cell["says"] or numbers, cell
        assert all(value is not None and math.isfinite(value) for value in numbers), cell
        assert cell["name"] in table
    assert isinstance(found, dict)
    return found


@pytest.mark.heavy
def test_it_runs_to_its_end_without_what_a_bare_machine_has_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(out, absent=NOT_THERE + NOR_THESE)
    said, complaints = process.communicate(timeout=300)
    found = results(out)
    plan = planned(Workshop(SMALL, torch.device("cpu")))
    assert [(c["group"], c["name"]) for c in found["cells"]] == [(c.group, c.name) for c in plan]
    assert all(f"{c['group']}: {c['name']}" in said for c in found["cells"])
    # Timings may be disturbed here; whatever else does not hold is a fault.
    wrong = [c for c in found["cells"] if c["status"] not in ("ok", "skipped") and c["name"] != "time repeats"]
    assert not wrong, complaints
    skipped = {c["name"]: c["says"] for c in found["cells"] if c["status"] == "skipped"}
    assert skipped == {"halves are alike": "This Python has no pydantic."}
    assert process.returncode == int(any(c["status"] not in ("ok", "skipped") for c in found["cells"]))
    assert {name: found["machine"]["packages"][name] for name in NOT_THERE} == dict.fromkeys(NOT_THERE)
    assert found["machine"]["packages"]["torch"] == torch.__version__
    assert found["ended"] == "All cells were tried."


@pytest.mark.heavy
def test_a_run_that_is_killed_has_said_what_it_knew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(out)
    wait_for(out / "results.json", lambda: results(out)["cells"][2]["status"] == "ok")
    process.kill()
    process.communicate()
    leave_no_part(out)
    found = results(out)
    states = [cell["status"] for cell in found["cells"]]
    done = states.index("running") if "running" in states else states.index("waiting")
    assert set(states[:done]) <= {"ok", "skipped", "WRONG"}
    assert set(states[done + 1 :]) == {"waiting"}
    assert found["cells"][-1]["says"] == "The run ended before this cell was reached."
    assert "The run has not ended, or was killed." in (out / "table.txt").read_text(encoding="utf-8")


@pytest.mark.heavy
def test_a_run_that_is_asked_to_stop_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = started(out)
    wait_for(out / "results.json", lambda: results(out)["cells"][2]["status"] == "ok")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    found = results(out)
    assert process.returncode == 1
    assert found["ended"] == "Stopped by SIGTERM."
    assert found["ended"] in said
    assert found["cells"][-1]["status"] == "waiting"


def wait_for(path: Path, is_there: Any) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if path.exists():
            try:
                if is_there():
                    return
            except AssertionError:  # a file that is being written lies beside it
                pass
        time.sleep(0.05)
    raise AssertionError(f"{path} never came")


def leave_no_part(out: Path) -> None:
    """What a kill in the middle of writing may leave beside the whole files."""
    for path in out.glob("*.part"):
        path.unlink()


def run(tmp_path: Path, cells: list[Cell], seconds: float = 60.0) -> tuple[int, dict[str, Any]]:
    report = Report(tmp_path / "out", {"title": "a test"}, cells)
    code = Runner(report, time.monotonic() + seconds).run()
    return code, results(tmp_path / "out")


def a_number(found: Found, until: float) -> None:
    found.add("speed", 2.0, "tokens/s", [1.0, 3.0])


def test_a_cell_that_takes_too_long_keeps_what_it_found(tmp_path: Path) -> None:
    def slow(found: Found, until: float) -> None:
        a_number(found, until)
        while True:
            time.sleep(0.01)

    code, found = run(tmp_path, [Cell("g", "slow", slow, limit=0.2), Cell("g", "next", a_number)])
    assert code == 1
    assert [c["status"] for c in found["cells"]] == ["cut short", "ok"]
    assert found["cells"][0]["numbers"]["speed"] == {"value": 2.0, "unit": "tokens/s", "low": 1.0, "high": 3.0}


def test_a_fault_stays_in_its_cell(tmp_path: Path) -> None:
    def broken(found: Found, until: float) -> None:
        raise RuntimeError("the device is gone\nand more")

    def large(found: Found, until: float) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    def absent(found: Found, until: float) -> None:
        raise NotHereError("It needs 90 GiB.")

    def without(found: Found, until: float) -> None:
        import a_package_that_nobody_has  # type: ignore[import-not-found]  # noqa: F401

    def wrong(found: Found, until: float) -> None:
        found.is_right, found.says = False, "0.3 nats apart"

    def endless(found: Found, until: float) -> None:
        found.add("speed", 2.0, "x")

    kinds = (broken, large, absent, without, wrong, endless)
    code, found = run(tmp_path, [Cell("g", kind.__name__, kind) for kind in kinds])
    assert code == 1
    assert [(c["status"], c["says"]) for c in found["cells"]] == [
        ("FAILED", "RuntimeError: the device is gone"),
        ("skipped", "It does not fit: CUDA out of memory. Tried to allocate 80 GiB"), ("skipped", "It needs 90 GiB."),
        ("skipped", "This Python has no a_package_that_nobody_has."), ("WRONG", "0.3 nats apart"), ("ok", ""),
    ]
    assert "the device is gone" in " ".join(found["cells"][0]["trace"])


def test_nothing_is_begun_when_the_minutes_are_over(tmp_path: Path) -> None:
    def slow(found: Found, until: float) -> None:
        time.sleep(0.4)

    code, found = run(tmp_path, [Cell("g", "slow", slow), Cell("g", "late", a_number)], seconds=0.2)
    assert code == 1
    assert [c["status"] for c in found["cells"]] == ["cut short", "waiting"]
    assert found["ended"] == "The minutes were over; cells that were not reached say so."


def test_a_cell_that_no_longer_answers_ends_the_run(tmp_path: Path) -> None:
    """A wait that no signal interrupts, as that for a kernel which hangs is."""
    script = tmp_path / "hang.py"
    script.write_text(
        "import ctypes, pathlib, sys, time\n"
        "from benchmarks.gpu import running\n"
        "from benchmarks.gpu.cells import Cell\n"
        "from benchmarks.gpu.report import Report\n"
        "running.GRACE = 0.3\n"
        "def hang(found, until):\n"
        "    found.add('speed', 2.0, 'x')\n"
        "    import threading, signal\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])\n"
        "    threading.Event().wait()\n"
        "cells = [Cell('g', 'hang', hang, limit=0.2), Cell('g', 'next', hang)]\n"
        "report = Report(pathlib.Path(sys.argv[1]), {'title': 't'}, cells)\n"
        "running.Runner(report, time.monotonic() + 30).run()\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(script), str(out)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60,
        capture_output=True, text=True, check=False,
    )
    assert time.monotonic() - start < 20
    assert done.returncode == 1, done.stderr
    found = results(out)
    assert [c["status"] for c in found["cells"]] == ["cut short", "waiting"]
    assert found["cells"][0]["numbers"]["speed"]["value"] == 2.0
    assert found["ended"].startswith("Ended in a cell that no longer answered")


def test_a_device_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")], cwd=ROOT, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True, timeout=120, check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == "Device 'cuda' is not available here. Available: cpu."
    assert not (tmp_path / "out").exists()


@pytest.mark.heavy
def test_no_method_mixes_devices() -> None:
    """Every layout and policy, with adapters where they have one, on a device that is not the CPU."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("pretended_device.py"))], cwd=ROOT, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True, timeout=300, check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    tried = {name.partition(": ")[2] for name in found["tried"]}
    assert tried == {name for name, kind in METHODS.items() if issubclass(kind, (LayoutMethod, CachePolicy))}
    assert not found["wrong"]


def test_the_whole_is_planned_in_order_of_worth() -> None:
    cells = planned(Workshop(Scale(), torch.device("cpu")))
    names = [f"{cell.group}: {cell.name}" for cell in cells]
    assert len(set(names)) == len(names)
    assert all(cell.limit <= 20 for cell in cells)
    for length in (4096, 32768):
        for batch in (1, 8):
            for method in ("full", "sinks", "snapkv", "sentinel", "kivi"):
                assert f"profile: {method}, {length} x {batch}" in names
    order = [names.index(name) for name in (
        "doctor, float32: masked is removed", "profile: full, 4096 x 1", "training: a Sentinel step",
        "profile: full, 32768 x 1", "profile: full, 32768 x 8",
    )]
    assert order == sorted(order)


def test_embedded_documents_are_those_of_the_task() -> None:
    assert embedded_documents() == load_corpus(load_task("minidocs"), None).documents


def test_training_on_a_gpu_is_tried_on_the_cpu(tmp_path: Path) -> None:
    """Three adapters in turns, with next to nothing installed; what is written is whole."""
    out = tmp_path / "out"
    process = started(out, absent=NOT_THERE + NOR_THESE, module="benchmarks.gpu.training")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert {path.name for path in out.iterdir()} == {"training.json", "training.txt"}
    found = json.loads((out / "training.json").read_text(encoding="utf-8"))["methods"]
    assert list(found) == ["sentinel", "local-tuned", "adapted"]
    for method in found.values():
        assert (method["tokens"], [point["step"] for point in method["curve"]]) == (4 * 2 * 32, [2, 4])
        assert all(score["nll"] > 0 for point in method["curve"] for score in point["held_out"].values())
