"""Numbers and keys stay what they were in version 0.1, and its folders are still reported, continued and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.frozen.measure import FOLDER, KEYS_SEEN, NUMBERS_SEEN, OLD_RUN, carried_out, differences, keys, measured
from tests.helpers.command import kvbench

REQUEST = (
    "--task", "minidocs", "--task", "minidocs-gen", "--method", "sentinel", "--method", "snapkv", "--ratio", "0.7",
    "--limit", "2", "--set", "block=128", "--set", "prefix=96", "--set", "new_tokens=12", "--set", "window=8",
    "--metric", "gen_ppl", "--metric", "rep4", "--json",
)
"""What the old folder was asked for."""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def warm(place: Path, *words: str) -> dict[str, Any]:
    """The document that a command prints, in a process that need not import everything first."""
    found = kvbench(*words, cwd=place)
    assert found.code == 0, found.err
    return found.document


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / "old"))


def test_numbers_are_what_they_were() -> None:
    """To 1e-5: float32 on a processor with AVX2 only lies up to 7e-6 from one with AVX-512.

    Two checkouts on one machine are compared to the last digit by hand.
    """
    assert differences(measured(warm), read(NUMBERS_SEEN), relative=1e-5) == []


def test_keys_of_cells_are_what_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVBENCH_THREADS", raising=False)  # in the key of a profile
    assert keys(warm) == read(KEYS_SEEN)


def test_an_old_folder_is_continued(old_run: Path) -> None:
    """What its last records said is measured again, into the same cells, and gives the same rows."""
    cut = 0
    for records in old_run.glob("cells/*/records.jsonl"):
        lines = records.read_text(encoding="utf-8").splitlines(keepends=True)
        records.write_text("".join(lines[:-1]), encoding="utf-8")
        cut += len(lines)
    there = {path.name for path in old_run.glob("cells/*")}
    found = carried_out(old_run.parent, "run", *REQUEST, "--out", "old", say=warm)
    assert set(found["cells"]) == there
    assert sum(len(p.read_text("utf-8").splitlines()) for p in old_run.glob("cells/*/records.jsonl")) == cut
    assert differences({"old": found}, {"old": {**found, **read(FOLDER / "old_run.json")}}, relative=1e-5) == []


def test_an_old_folder_is_reported_and_compared(old_run: Path) -> None:
    reported = kvbench("report", str(old_run), "--json", cwd=old_run.parent)
    assert reported.code == 0, reported.err
    found = {"ppl": 0, "gen_ppl": 0}
    for row in reported.document["rows"]:
        found[row["metric"]] = found.get(row["metric"], 0) + 1
    assert found["ppl"]
    assert found["gen_ppl"]
    compared = kvbench("compare", str(old_run), str(OLD_RUN), "--json", cwd=old_run.parent)
    assert compared.code == 0, compared.err
    assert all(row["delta"] in (0, None) for row in compared.document["rows"])
