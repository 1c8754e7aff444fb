"""As many documents as fit into a time: rounds grow by what documents have taken, and another call adds more."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.execution.time_limit import _on_disk
from kvbench.parsing import parse_duration
from kvbench.planning.quality import Plan, build_plan
from kvbench.store.folder import RunFolder
from kvbench.store.records import Failure
from tests.helpers.command import Call, kvbench, refused

RUN = ["run", "--method", "knorm", "--ratio", "0.5", "--task", "passkey", "--set", "length=300", "--set",
       "question=hidden", "--no-baselines", "--threads", "1", "--limit", "5"]


def documents(path: Path) -> set[int]:
    folder = RunFolder(path)
    return {len(folder.documents(cell)) for cell in folder.cells()}


def test_one_document_more_with_every_call_that_has_no_time(tmp_path: Path) -> None:
    for count in (1, 2):
        found = kvbench(*RUN, "--time-limit", "0.001s", "--out", tmp_path / "run", cwd=tmp_path)
        assert found.code == 0, found.err
        assert f"{count} of 5 documents per task in " in found.err
        assert ("1 of 5 documents per task are on disk; as many more as fit" in found.err) == (count == 2)
        assert "records are on disk" not in found.err
        assert documents(tmp_path / "run") == {count}
    found = kvbench(*RUN, "--time-limit", "2h", "--out", tmp_path / "run", cwd=tmp_path)
    assert "All 5 documents per task fitted" in found.err
    assert documents(tmp_path / "run") == {5}


def test_failed_cells_do_not_hide_what_is_there_and_fresh_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert kvbench(*RUN, "--out", path, cwd=tmp_path).code == 0
    folder = RunFolder(path)
    cell = next(cell for cell in folder.cells() if cell.method == "knorm")
    (folder.cell_folder(cell) / "records.jsonl").unlink()
    folder.fail(cell, Failure(cell.key, "broken"))
    assert _on_disk([build(path)], folder, 5) == 5
    found = kvbench(*RUN, "--time-limit", "0.001s", "--fresh", "--out", path, cwd=tmp_path)
    assert "1 of 5 documents per task" in found.err


def build(path: Path) -> Plan:
    from kvbench.cli.requests import quality_request
    from kvbench.config import load_settings

    settings = load_settings(None).run
    names = (
        "ratio", "task", "data", "column", "protocol", "execution", "limit", "scorer", "mauve_features", "metric",
        "budget_tokens", "budget_bytes", "equal_bytes", "revision", "adapter", "method", "set_", "out", "baselines",
        "device", "dtype", "threads",
    )
    given = dict.fromkeys(names) | {
        "task": ["passkey"], "method": ["knorm"], "ratio": ["0.5"], "set_": ["length=300", "question=hidden"],
        "limit": 5, "out": path, "baselines": False, "threads": 1, "execution": "streamed", "column": "text",
        "equal_bytes": False,
    }
    return build_plan(quality_request(given, settings, "kvbench-tiny", 0))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("7", 7)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text, "--time-limit") == seconds


@pytest.mark.parametrize("text", ["0", "-3m", "5d", "", "h", "1e3s", "9" * 400])
def test_bad_durations_are_sentences(text: str, called: Call) -> None:
    with pytest.raises(UserError, match="not a duration"):
        parse_duration(text, "--time-limit")
    if text == "5d":
        refused(called, [*RUN, "--time-limit", text], "--time-limit 5d: not a duration above 0")
