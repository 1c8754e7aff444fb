"""What a run says when it goes on, of what is not finished, and of what is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvbench.store.folder import FAILURE, RECORDS, RUN, RunFolder
from kvbench.store.records import Failure
from tests.helpers.command import Call, Outcome, kvbench
from tests.helpers.records import TEXT

ASKED = ["--method", "sinks", "--ratio", "0.5", "--task", "minidocs", "--data", "docs.jsonl", "--set", "block=64",
         "--no-baselines", "--threads", "1"]


def write_documents(folder: Path) -> None:
    lines = [json.dumps({"id": f"d{i}", "text": f"Number {i}. " + TEXT * 6}) for i in range(4)]
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")


def cut_off(run: Path) -> None:
    """The folder as a kill leaves it: the last document of every cell is not there, and the run has not ended."""
    for path in run.glob(f"cells/*/{RECORDS}"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    manifest = json.loads((run / RUN).read_text())
    (run / RUN).write_text(json.dumps({**manifest, "finished": None}))


def said(found: Outcome) -> str:
    return " ".join(found.err.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("going-on")
    write_documents(folder)
    first = kvbench("run", *ASKED, "--limit", "3", "--out", "run", cwd=folder)
    assert first.code == 0, first.err
    assert "on disk" not in first.err  # nothing was
    cut_off(folder / "run")
    return folder


def test_what_is_not_finished_is_incomplete_and_not_failed(place: Path) -> None:
    report = kvbench("report", "run", cwd=place)
    assert report.code == 1
    told = " ".join(report.out.split())
    for cell in ("full on minidocs", "sinks 0.5 on minidocs"):
        assert f"incomplete: {cell}: 2 of 3 documents are done. Run the command that measured it again" in told
    assert "failed" not in report.out
    assert "incomplete: full" in (place / "run" / "report.html").read_text()
    document = kvbench("report", "run", "--json", cwd=place).document
    assert {(f["incomplete"], f["left_out"]) for f in document["failures"]} == {(True, False)}


def test_a_cell_that_failed_still_says_so(place: Path) -> None:
    folder = RunFolder(place / "run")
    broken, other = folder.cells()
    folder.fail(broken, Failure(broken.key, f"{broken.label}: it broke."))
    note = folder.cell_folder(broken) / FAILURE
    assert set(json.loads(note.read_text())) == {"cell", "error", "hint", "left_out"}  # as earlier versions read it
    out = kvbench("report", "run", cwd=place).out
    note.unlink()
    assert f"failed: {broken.label}: it broke." in out
    assert f"incomplete: {other.label}" in out
    assert f"incomplete: {broken.label}" not in out


@pytest.mark.heavy
def test_what_is_on_disk_is_said_first(place: Path) -> None:
    again = kvbench("run", *ASKED, "--limit", "3", "--out", "run", "--json", cwd=place)
    assert again.code == 0, again.err
    assert "4 of 6 records are on disk, 2 are measured now." in said(again)
    assert again.document["ok"] is True  # and nothing but the document is on standard output
    more = kvbench("run", *ASKED, "--limit", "3", "--out", "run", "--fresh", cwd=place)
    assert "on disk" not in more.err


@pytest.mark.heavy
def test_a_sweep_says_it_for_every_seed(place: Path, tmp_path: Path) -> None:
    write_documents(tmp_path)
    first = kvbench("sweep", *ASKED, "--seed", "0", "--seed", "1", "--limit", "2", "--out", "grid", cwd=tmp_path)
    assert (first.code, "on disk" in first.err) == (0, False)
    again = kvbench("sweep", *ASKED, "--seed", "1", "--seed", "2", "--limit", "3", "--out", "grid", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "kvbench-tiny, seed 1: 4 of 6 records are on disk, 2 are measured now." in said(again)
    assert "seed 2:" not in again.err


@pytest.mark.heavy
def test_what_is_left_out_is_said_once_and_not_counted_beforehand(called: Call) -> None:
    """The window of SnapKV is all that it would keep of the contexts of recall; both seeds would say so."""
    asked = ["sweep", "--method", "snapkv", "--ratio", "0.5", "--ratio", "0.95", "--task", "recall", "--set",
             "question=hidden", "--no-baselines", "--limit", "1", "--seed", "0", "--seed", "1", "--out", "grid"]
    sentence = "left out: snapkv 0.95 on recall: snapkv at ratio 0.95 keeps"
    planned = called([*asked, "--dry-run"])
    assert "4 cells" in planned.out
    assert planned.out.count(sentence) == 1
    cells = called([*asked, "--dry-run", "--json"]).document
    assert [failure["error"].split(":")[0] for failure in cells["left_out"]] == ["snapkv 0.95 on recall"] * 2
    assert {(cell["method"], cell["ratio_asked"]) for cell in cells["cells"]} == {("full", None), ("snapkv", "0.5")}
    found = called(asked)
    assert found.code == 0, found.err
    assert (found.out + found.err).count(sentence) == 1
    assert called(["report", "grid"]).out.count(sentence) == 1
