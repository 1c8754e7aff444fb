"""Two variants of one method in one table: asked for, labelled, reported, compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvbench.errors import UserError
from kvbench.planning.methods import Choice, parse_choice
from tests.helpers.command import Call

TWO = ("--method", "snapkv:window=8", "--method", "snapkv:window=24,pool=mean", "--ratio", "0.5")
NAMES = ["full", "snapkv:window=8", "snapkv:window=24,pool=mean"]
SMALL = ("--task", "minidocs", "--limit", "2", "--set", "block=96", "--no-baselines", "--json")


@pytest.mark.parametrize("command", [("run",), ("sweep", "--seed", "0")])
def test_variants_stand_side_by_side(called: Call, tmp_path: Path, command: tuple[str, ...]) -> None:
    found = called([*command, *TWO, *SMALL, "--out", "r"])
    assert found.code == 0, found.err
    ppl = [row for row in found.document["rows"] if row["metric"] == "ppl" and row["seed"] == 0]
    assert [row["method"] for row in ppl] == ["full", "snapkv", "snapkv"]
    assert [row["params"].get("variant") for row in ppl] == [None, "window=8", "window=24,pool=mean"]
    assert [row["params"].get("window") for row in ppl] == [None, "8", "24"]
    assert len({row["value"] for row in ppl}) == 3
    shown = called(["report", "r"])
    assert shown.code == 0, shown.err
    assert all(name in shown.out for name in NAMES)
    assert all(name in (tmp_path / "r" / "report.html").read_text() for name in NAMES)
    assert all(name in (tmp_path / "r" / "tables" / "minidocs.md").read_text() for name in NAMES)
    compared = called(["compare", "r:snapkv:window=8:0.5", "r:snapkv:pool=mean,window=24", "--json"])
    assert compared.code == 0, compared.err
    deltas = [row["delta"] for row in compared.document["rows"] if row["metric"] == "ppl"]
    assert deltas[0] == pytest.approx(ppl[2]["value"] - ppl[1]["value"])
    wrong = called(["compare", "r:snapkv", "r:full"])
    assert (wrong.code, "snapkv:window=8" in wrong.err) == (2, True)


def test_variants_are_profiled_side_by_side(called: Call) -> None:
    found = called(["profile", *TWO, "--seq-len", "64", "--no-baselines", "--json", "--dry-run"])
    assert found.code == 0, found.err
    assert [cell["variant"] for cell in found.document["cells"]] == ["", "window=8", "window=24,pool=mean"]
    assert len({cell["key"] for cell in found.document["cells"]}) == 3


def test_a_variant_is_the_same_measurement_as_with_set(called: Call) -> None:
    """Keys of cells are those of --set; a variant that says nothing new has no label, and is measured once."""
    one = called(["run", "--method", "snapkv:window=8", "--ratio", "0.5", *SMALL, "--dry-run"]).document["cells"]
    other = called(["run", "--method", "snapkv", "--set", "window=8", "--ratio", "0.5", *SMALL, "--dry-run"])
    assert [cell["key"] for cell in one] == [cell["key"] for cell in other.document["cells"]]
    same = called([
        "run", "--method", "snapkv", "--method", "snapkv:window=32", "--ratio", "0.5", *SMALL, "--dry-run",
    ]).document["cells"]
    assert [(cell["method"], cell["variant"]) for cell in same] == [("full", ""), ("snapkv", "")]


def test_what_is_asked_for_is_parsed() -> None:
    assert parse_choice("snapkv") == Choice("snapkv")
    assert parse_choice("snapkv: window = 08 ,pool=mean").options == {"window": "8", "pool": "mean"}
    assert parse_choice("snapkv:window=32,pool=mean").variant({}) == "pool=mean"
    assert parse_choice("snapkv:pool=mean,window=16").variant({}) == "window=16,pool=mean"  # in one order
    assert parse_choice("snapkv:window=32").variant({"window": "16"}) == "window=32"  # --set says otherwise
    assert parse_choice("snapkv:window=16").variant({"window": "016"}) == ""


@pytest.mark.parametrize(("text", "words"), [
    ("snapkb:window=1", "Did you mean 'snapkv'"), ("snapkv:windw=1", "Did you mean 'window'"), ("snapkv:", "key=value"),
    ("snapkv:window", "key=value"), ("snapkv:window=no", "not a whole number"), ("snapkv:pool=min", "pool="),
    ("window:window=3", "window has no options"), ("snapkv:window=" + "9" * 5000, "not a whole number"),
    ("snapkv:window=0", "--method snapkv:window=0"),
])
def test_what_is_no_variant_is_refused(text: str, words: str) -> None:
    with pytest.raises(UserError) as refusal:
        parse_choice(text)
    assert words in f"{refusal.value.message} {refusal.value.hint}"
