"""``kvbench compare`` and ``kvbench list``: on runs written by hand, without a model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvbench.methods import METHODS
from kvbench.store.folder import RUN
from tests.helpers.command import Call, refused
from tests.helpers.records import CELL, DOCUMENTS, LOCAL, SINKS, made


def test_a_difference_is_found_and_none_is_not(called: Call, tmp_path: Path) -> None:
    one = made(tmp_path / "one", [(SINKS, 0.0), (LOCAL, 0.5)])
    found = called(["compare", f"{one}:sinks", f"{one}:local", "--json"])
    assert found.code == 0, found.err
    rows = {row["metric"]: row for row in found.document["rows"]}
    assert rows["nll"]["delta"] == pytest.approx(0.05, abs=0.01)  # half a nat over ten tokens
    assert rows["nll"]["delta_ci_low"] > 0
    assert rows["nll"]["p_value"] < 0.001
    assert rows["nll"]["first"] == "sinks 0.5 (one)"
    same = made(tmp_path / "same", [(SINKS, 0.0), (LOCAL, 0.0)])
    rows = {r["metric"]: r for r in called(["compare", f"{same}:sinks", f"{same}:local", "--json"]).document["rows"]}
    assert rows["nll"]["p_value"] > 0.05
    assert rows["nll"]["delta_ci_low"] < 0 < rows["nll"]["delta_ci_high"]


def test_two_runs_are_compared_cell_by_cell(called: Call, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", [(SINKS, 0.0)]), made(tmp_path / "two", [(SINKS, 1.0)])
    shown = called(["compare", one, two])
    assert shown.code == 0, shown.err
    assert "sinks 0.5 (one) against sinks 0.5 (two)" in shown.out
    assert "yes" in shown.out
    assert called(["compare", two, one]).out.count("-0.1") >= 1


def test_exchanged_sides_change_the_sign_only(called: Call, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", [(SINKS, 0.0)]), made(tmp_path / "two", [(SINKS, 1.0)])
    there, back = (
        next(r for r in called(["compare", a, b, "--json"]).document["rows"] if r["metric"] == "nll")
        for a, b in ((one, two), (two, one))
    )
    assert there["delta"] == pytest.approx(-back["delta"])
    assert there["p_value"] == back["p_value"]


@pytest.mark.parametrize(("change", "info", "words"), [
    ({"data_hash": "other"}, {}, ["texts differ"]),
    ({"task_version": 2}, {}, ["versions of the task differ (1 and 2)"]),
    ({}, {"signature": "block|L:256"}, ["settings differ (block|L:512 and block|L:256)"]),
    ({}, {"documents": DOCUMENTS[:12]}, ["documents differ (20 and 12, 12 in common)"]),
    ({"task": "books"}, {}, ["no task in common (minidocs; books)"]),
    ({"ratio_asked": "0.7", "method": "window"}, {}, []),
])
def test_what_was_not_scored_alike_is_refused(
    called: Call, tmp_path: Path, change: dict[str, Any], info: dict[str, Any], words: list[str]
) -> None:
    one = made(tmp_path / "one", [(SINKS, 0.0)])
    two = made(tmp_path / "two", [(replace(SINKS, **change), 0.0)], **info)
    if words:
        refused(called, ["compare", one, two], *words)
    else:  # the only cell of each
        assert called(["compare", one, two]).code == 0


def test_bad_sides_are_sentences(called: Call, tmp_path: Path) -> None:
    one = made(tmp_path / "one", [(SINKS, 0.0), (LOCAL, 0.5)])
    refused(called, ["compare", "nowhere", one], "not a run folder")
    refused(called, ["compare", f"{one}:sink", one], "Unknown method", "Did you mean 'sinks'")
    refused(called, ["compare", f"{one}:sinks:0.9", one], "Unknown ratio of sinks", "Allowed: 0.5")


def test_profiles_of_different_hours_are_not_compared(called: Call, tmp_path: Path) -> None:
    cell = replace(CELL, task="profile", protocol="profile", options={"seq_len": "64", "batch_size": "1"})
    one = made(tmp_path / "one", [(SINKS, 0.0)])
    (one / RUN).write_text(json.dumps({
        "content": "c", "tasks": {cell.setting: {"kind": "profile", "repeats": 1, "signature": "s"}},
        "cells": [dataclasses.asdict(cell)],
    }))
    refused(called, ["compare", one, one], "not timed in turn")


@pytest.mark.parametrize("what", ["methods", "tasks", "models", "metrics"])
def test_lists_name_everything(called: Call, what: str) -> None:
    shown, rows = called(["list", what]), called(["list", what, "--json"]).document[what]
    assert shown.code == 0
    names = [row["name"] for row in rows]
    assert len(names) == len(set(names))
    if what == "methods":
        assert names == list(METHODS)
        assert all(row["holds"] for row in rows)
    for name in names:
        assert name in shown.out


def test_an_unknown_list_is_refused(called: Call) -> None:
    refused(called, ["list", "method"], "Unknown list 'method'", "methods")
