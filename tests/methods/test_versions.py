"""Versions of methods: what an earlier rule measured is measured again and marked, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from kvbench.analysis.comparison import compare, parse_side
from kvbench.cache.shape import CacheShape
from kvbench.errors import UserError
from kvbench.methods import METHODS, make_method
from kvbench.profiling.clock import Timeline
from kvbench.reporting.tables.comparison import comparison_tables
from kvbench.reporting.tables.side_by_side import side_by_side
from kvbench.store import faults
from kvbench.store.faults import FAULTS, ONLY_WITH, fault_of, remarks_of
from kvbench.store.folder import CELL, RECORDS, RUN, RunFolder
from kvbench.store.profile_records import Rates, TimingRecord
from kvbench.store.records import Cell, GenerationRecord, Output
from tests.helpers.command import Call

COMMAND = ("--ratio", "0.25", "--task", "minidocs", "--set", "block=128", "--limit", "1")
OLD = {
    "full": "905329bc3f74", "none": "577da9d2edc3", "window": "6c0b7d15eb94", "sinks": "d2c6d5d375d7",
    "local": "f6bb0536a8dc", "scattered": "9e418d8c6a6c", "streaming-llm": "4c91709d0498", "random": "56b34cd277ae",
    "knorm": "3886f13744e0", "keydiff": "43e37bbca6b1", "lagkv": "75ae1187b5ee", "tova": "66c3ea514733",
    "h2o": "4e8385f7aa12", "snapkv": "b25c189ee335", "pyramidkv": "2814d26df997", "chunkkv": "76d033dcae84",
    "adakv": "6e503d943edd", "expected-attention": "53125594f25b", "cascading": "2b689f1eee4f", "cam": "68f1c403b95a",
    "d2o": "2611a39d2975", "kivi": "df6494ffc986", "fp8": "539ba3146738", "think": "6c0022be47bc",
    "refreshkv": "7f6ff928d97f", "lorc": "20938a104283",
}
"""The keys of ``kvbench sweep --method ...`` with that command, as kvbench 0.1 had them."""

CHANGED = {"cam", "d2o", "lorc", "refreshkv"}
WITH_NEW_DEFAULTS = {"random", "snapkv", "pyramidkv", "chunkkv"}


def keys_of(called: Call, *words: str) -> dict[str, str]:
    methods = [word for name in OLD if name not in ("full", "none") for word in ("--method", name)]
    found = called(["sweep", *methods, *COMMAND, *words, "--dry-run", "--json"])
    assert found.code == 0, found.err
    left_out = found.document.get("left_out", ())  # a text of 52 tokens is too short for think
    return {cell["method"]: cell["key"] for cell in (*found.document["cells"], *left_out)}


def test_keys_are_those_of_old_folders_but_for_what_has_changed(called: Call) -> None:
    keys = keys_of(called)
    assert keys.keys() == OLD.keys()
    assert {name for name in OLD if keys[name] != OLD[name]} == CHANGED | WITH_NEW_DEFAULTS


def test_old_settings_have_old_keys(called: Call) -> None:
    """Pooling as it was is found again; the draws of ``random`` are others, even without sinks."""
    words = [w for name in ("snapkv", "pyramidkv", "chunkkv") for w in ("--method", name)]
    found = called(["sweep", *words, *COMMAND, "--set", "pool=mean", "--set", "kernel=5", "--dry-run", "--json"])
    keys = {cell["method"]: cell["key"] for cell in found.document["cells"]}
    assert all(keys[name] == OLD[name] for name in ("snapkv", "pyramidkv", "chunkkv"))
    plain = called(["sweep", "--method", "random", *COMMAND, "--set", "sinks=0", "--dry-run", "--json"])
    assert OLD["random"] not in {cell["key"] for cell in plain.document["cells"]}


SHORT = (
    "run", "--method", "knorm", "--method", "cam", "--method", "refreshkv", "--method", "lorc", "--ratio", "0.25",
    "--task", "minidocs", "--set", "block=128", "--limit", "1", "--no-baselines", "--out", "old",
)


@pytest.fixture
def old(called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as 0.1 left it: methods without versions, cells that do not know the word."""
    with monkeypatch.context() as before:
        for name in CHANGED:
            before.setattr(METHODS[name], "version", 1)
        assert called(SHORT).code == 0
    folder = tmp_path / "old"
    manifest = json.loads((folder / RUN).read_text())
    for raw in manifest["cells"]:
        del raw["version"], raw["note"]
    (folder / RUN).write_text(json.dumps(manifest))
    for path in folder.glob(f"cells/*/{CELL}"):
        raw = json.loads(path.read_text())
        del raw["version"], raw["note"]
        path.write_text(json.dumps(raw))
    assert {path.name for path in (folder / "cells").iterdir()} == {
        OLD[name] for name in ("full", "knorm", "cam", "refreshkv", "lorc")
    }
    return folder


@pytest.mark.heavy
def test_an_old_folder_is_marked_and_measured_again_where_it_was_wrong(old: Path, called: Call) -> None:
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in old.glob(f"cells/*/{RECORDS}")}
    _check_marks(old, called)
    again = called([*SHORT, "--json"])
    assert again.code == 0, again.err
    assert "Already measured" not in again.err
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept} == kept
    cells = {cell.method: cell for cell in RunFolder(old).cells()}
    assert {name for name, cell in cells.items() if cell.key != OLD[name]} == {"cam", "lorc", "refreshkv"}
    assert len(list(old.glob(f"cells/*/{RECORDS}"))) == len(kept) + 3
    params = {row["method"]: row["params"] for row in again.document["rows"]}
    assert {name: p.get("version") for name, p in params.items()} == {
        "full": None, "knorm": None, "lorc": 2, "cam": 2, "refreshkv": 2,
    }
    assert not any("outdated" in p for p in params.values())
    assert "Already measured" in called(SHORT).err
    table = called(["report", old]).out
    assert "outdated" not in table


def _check_marks(old: Path, called: Call) -> None:
    found = called(["report", old])
    assert found.code == 0, found.err
    assert "cam (outdated)" in found.out
    assert "knorm (outdated)" not in found.out
    assert "cam was measured by version 1 of its rule, and is wrong (merged twice" in found.out.replace("\n", " ")
    rows = json.loads((old / "results.json").read_text())["rows"]
    assert {row["method"] for row in rows if "outdated" in row["params"]} == {"cam", "lorc", "refreshkv"}
    for page in ("report.html", "table.txt", "tables/minidocs.md", "tables/minidocs.csv", "tables/minidocs.tex"):
        assert "cam (outdated)" in (old / page).read_text(), page
    for page in ("report.html", "tables/minidocs.md"):
        assert "refreshkv was measured by version 1" in (old / page).read_text(), page
    pairs = compare(parse_side(f"{old}:cam"), parse_side(f"{old}:knorm"))
    assert "cam (outdated) 0.25" in pairs[0].names[0]
    assert any("cam was measured by version 1" in str(part) for part in comparison_tables(pairs))


def cell_of(method: str, version: int = 1, **more: Any) -> Cell:
    return Cell("m", None, "h", "float32", "cpu", method, "0.5", "method", "minidocs", 1, "d", "block", "streamed",
                {}, None, None, 0, version=version, **more)


def test_texts_of_an_outdated_method_are_marked_side_by_side() -> None:
    record = GenerationRecord("d", "d", (Output("nucleus", 0, (1,), "words", False),), 8, 4, 1.0, 1, 8, 1.0, 1.0, 2.0)
    written: Any = SimpleNamespace(cells=lambda: [cell_of("d2o"), cell_of("h2o")], texts=lambda _: {"d": record})
    console = Console(file=StringIO(), width=140)
    console.print(side_by_side(written, cell_of("d2o").setting, "d"))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "d2o (outdated) 0.5" in shown
    assert "h2o 0.5" in shown
    assert "d2o was measured by version 1" in shown


def test_every_version_before_the_present_one_is_a_known_fault() -> None:
    older = {(name, version) for name, kind in METHODS.items() for version in range(1, kind.version)}
    assert set(FAULTS) == older | {(name, 1) for name in ONLY_WITH}
    for name, version in older:
        assert fault_of(cell_of(name, version)) == FAULTS[name, version]
        assert fault_of(cell_of(name, version + 1)) is None


def test_a_fault_of_budgets_is_one_of_budgets_only() -> None:
    """ThinK by a ratio is what it was, under the key that it had."""
    by_ratio, by_bytes = (make_method("think", Fraction(ratio), given)
                          for ratio, given in (("0.2", {}), ("0", {"budget_bytes": "100000"})))
    assert (by_ratio.rule_version, by_bytes.rule_version) == (1, 2)
    old = dataclasses.replace(cell_of("think"), options={"budget_bytes": "100000"})
    assert fault_of(old) == FAULTS["think", 1]
    assert fault_of(dataclasses.replace(old, version=2)) is None
    assert fault_of(dataclasses.replace(old, options={"recent": "32"})) is None


def test_a_version_is_in_the_key_above_one_and_a_note_never() -> None:
    one, two = cell_of("cam"), cell_of("cam", 2)
    assert one.key != two.key
    assert one.key == one.request == two.request
    assert cell_of("cam", note="some").key == one.key
    assert dataclasses.replace(two, version=3).key not in (one.key, two.key)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Makes ``ends`` a method of another package, with what its entry point loads."""
    def install(load: Callable[[], Any]) -> None:
        faults.loaded_elsewhere.cache_clear()
        monkeypatch.setattr(faults, "entry_points", lambda group, name: [SimpleNamespace(load=load)]
                            if (group, name) == (faults.GROUP, "ends") else [])
    yield install
    faults.loaded_elsewhere.cache_clear()


def test_a_method_of_another_package_has_versions_too(elsewhere: Callable[[Callable[[], Any]], None]) -> None:
    elsewhere(lambda: SimpleNamespace(version=3))
    assert fault_of(cell_of("ends", 2)) is not None
    assert remarks_of(cell_of("ends", 2))["version"] == 2
    assert fault_of(cell_of("ends", 3)) is None
    assert fault_of(cell_of("knorm")) is None


def test_a_package_that_cannot_be_loaded_hinders_no_report(elsewhere: Callable[[Callable[[], Any]], None]) -> None:
    def broken() -> None:
        raise ImportError("not today")

    elsewhere(broken)
    assert fault_of(cell_of("ends")) is None


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv", "chunkkv"])
def test_a_window_that_fills_what_is_kept_is_refused(name: str) -> None:
    """At the end of the text: 32 entries of 320, where the window alone is as many; 33 are enough."""
    shape = CacheShape.uniform(1, 1, 8, 4)
    with pytest.raises(UserError, match=f"{name} at ratio 0.9 keeps 32 of 320 entries, below the 33 that") as refusal:
        make_method(name, Fraction(9, 10)).with_budget_for(320, shape)
    assert "--set window=31" in refusal.value.hint
    for ratio, options, length in (("0.9", {}, 321), ("0.9", {"window": "31"}, 320), ("0", {}, 5)):
        method = make_method(name, Fraction(ratio), options)
        assert method.with_budget_for(length, shape) is method


def test_nothing_is_written_for_a_plain_window(called: Call) -> None:
    found = called(["run", "--method", "chunkkv", "--ratio", "0.9", "--task", "minidocs", "--set", "block=120",
                    "--limit", "1", "--no-baselines", "--out", "run"])
    assert found.code == 2
    assert "chunkkv at ratio 0.9 keeps 12 of 120 entries" in found.err
    assert not Path("run").exists()


@pytest.mark.heavy
def test_a_window_that_fills_what_is_kept_is_left_out_of_a_sweep(called: Call) -> None:
    words = ["--method", "snapkv", "--task", "minidocs", "--set", "block=120", "--limit", "1", "--no-baselines",
             "--out", "grid"]
    found = called(["sweep", "--ratio", "0.25", "--ratio", "0.9", *words, "--json"])
    assert found.code == 0, found.err
    assert "left out: snapkv 0.9 on minidocs: snapkv at ratio 0.9 keeps 12 of 120" in found.err.replace("\n", " ")
    assert found.document["ok"] is True
    assert [(f["left_out"], f["error"].split()[1]) for f in found.document["failures"]] == [(True, "0.9")]
    assert {r["ratio_asked"] for r in found.document["rows"] if r["method"] == "snapkv"} == {0.25}
    report = called(["report", "grid"])
    assert report.code == 0
    assert "left out: snapkv 0.9" in report.out
    alone = called(["sweep", "--ratio", "0.9", *words[:-1], "other"])
    assert alone.code == 2
    assert "keeps 12 of 120" in alone.err


def test_a_profile_of_a_plain_window_is_refused(called: Call) -> None:
    found = called(["profile", "--method", "snapkv", "--ratio", "0.9", "--seq-len", "4096", "--seq-len", "256"])
    assert found.code == 2
    assert "keeps 26 of 256 entries" in found.err


@pytest.mark.parametrize("name", ["tpot_s", "decode_tok_s", "prefill_tok_s"])
def test_rates_are_defined_once(name: str) -> None:
    """What is tested on a fake clock is what reports print."""
    assert getattr(Timeline, name) is getattr(TimingRecord, name) is getattr(Rates, name)
