"""The command line from end to end: the JSON contract, run folders, continuing, reporting."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import ROW_KEYS, Outcome, kvbench

TASKS = ("--task", "minidocs", "--task", "recall")
LM = {"ppl", "nll", "bits_per_byte", "recovery", "kl", "kl_p99", "top1_agreement"}
BYTES = {"kv_bytes_logical", "kv_bytes_physical", "kv_bytes_full"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def finished(work: Path) -> Outcome:
    """Sentinel and a window at two ratios on a few documents, both tasks."""
    return kvbench(
        "run", *TASKS, "--method", "sentinel", "--method", "window", "--ratio", "0.5", "--ratio", "0.9",
        "--limit", "6", "--out", "run", "--json", cwd=work,
    )


def rows(outcome: Outcome, **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in outcome.document["rows"] if all(r[k] == v for k, v in wanted.items())]


def test_the_json_document_is_that_of_the_contract(finished: Outcome) -> None:
    assert finished.code == 0, finished.err
    document = finished.document
    assert list(document) == ["schema", "run", "ok", "failures", "rows"]
    assert (document["schema"], document["ok"], document["failures"]) == (1, True, [])
    assert "NaN" not in finished.out
    for row in document["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["params"]) >= {"seq_len", "batch_size", "new_tokens", "step", "bin"}
        assert row["removal"] == "real"
        assert row["signature"].startswith(row["metric"] + ":")
        over_ratios = row["metric"] == "largest_ratio"  # of a method over its ratios
        assert (row["ratio_asked"] is None) == (row["method"] in ("full", "none") or over_ratios)
        if row["ci_low"] is not None:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]


def test_every_method_has_its_rows(finished: Outcome) -> None:
    whole = [r for r in finished.document["rows"] if r["params"]["bin"] is None]
    cells = {(r["method"], r["ratio_asked"]) for r in whole}
    taking = ("local", "scattered", "sinks", "sentinel", "window")
    assert cells == {("full", None), ("none", None)} | {(m, r) for m in taking for r in (0.5, 0.9)}
    for method, ratio in cells:
        mine = [r for r in whole if (r["method"], r["ratio_asked"]) == (method, ratio)]
        lm = {r["metric"] for r in mine if r["task"] == "minidocs"}
        without = {"full": {"recovery", "kl", "kl_p99", "top1_agreement"}, "none": {"recovery"}}
        assert lm == (LM | BYTES) - without.get(method, set())
        recall = {r["metric"] for r in mine if r["task"] == "recall"}
        assert recall == {"accuracy", "answer_nll"} | BYTES


def test_bytes_follow_the_realised_ratio(finished: Outcome) -> None:
    for first in rows(finished, metric="kv_bytes_logical"):
        same = {name: first[name] for name in ("task", "method", "ratio_asked", "params")}
        physical = rows(finished, metric="kv_bytes_physical", **same)[0]["value"]
        full = rows(finished, metric="kv_bytes_full", **same)[0]["value"]
        assert physical == pytest.approx(first["value"])
        assert physical / full == pytest.approx(1 - first["ratio_realised"], abs=1e-9)


def test_differences_are_paired_and_adjusted(finished: Outcome) -> None:
    full = rows(finished, task="minidocs", metric="ppl", method="full")[0]
    assert (full["delta"], full["p_value"], full["baseline"]) == (None, None, None)
    for row in rows(finished, task="minidocs", metric="ppl"):
        if row["method"] != "full":
            assert row["delta"] == pytest.approx(row["value"] - full["value"])
            assert row["delta_ci_low"] <= row["delta"] <= row["delta_ci_high"]
            assert row["baseline"] == "full"
            assert 2 / 2**6 <= row["p_value"] <= 1
            assert row["params"]["block"] == "auto"


def test_perplexity_and_nll_agree(finished: Outcome) -> None:
    for ppl in rows(finished, task="minidocs", metric="ppl"):
        nll = rows(finished, task="minidocs", metric="nll", method=ppl["method"], ratio_asked=ppl["ratio_asked"])
        assert math.exp(nll[0]["value"]) == pytest.approx(ppl["value"])


def test_recall_full_finds_and_none_does_not(finished: Outcome) -> None:
    whole = [r for r in rows(finished, task="recall", metric="accuracy") if r["params"]["bin"] is None]
    accuracy = {(r["method"], r["params"]["question"]): r["value"] for r in whole if r["ratio_asked"] in (None, 0.9)}
    for question in ("hidden", "known"):
        assert accuracy["full", question] >= 0.8
        assert accuracy["none", question] <= 0.1
    bins = {r["params"]["bin"] for r in rows(finished, task="recall", metric="accuracy")}
    assert bins == {None, *(f"distance={d}" for d in (30, 60, 120, 240, 400, 600))}


def test_the_run_folder_holds_everything(finished: Outcome, work: Path) -> None:
    manifest = json.loads((work / "run" / "run.json").read_text())
    assert manifest["finished"] is not None
    assert manifest["environment"]["packages"]["torch"].startswith("2.")
    assert len(manifest["cells"]) == 3 * 12
    assert json.loads((work / "run" / "results.json").read_text()) == finished.document
    for cell in manifest["cells"]:
        folders = [f for f in (work / "run" / "cells").iterdir() if json.loads((f / "cell.json").read_text()) == cell]
        assert len(folders) == 1
        lines = (folders[0] / "records.jsonl").read_text().splitlines()
        assert len({json.loads(line)["document"] for line in lines}) == len(lines) == 6


def test_a_finished_run_is_printed_again_and_a_larger_limit_only_adds(finished: Outcome, work: Path) -> None:
    command = ["run", *TASKS, "--method", "sentinel", "--method", "window", "--ratio", "0.5", "--ratio", "0.9",
               "--out", "run", "--json", "--limit"]
    again = kvbench(*command, "6", cwd=work)
    assert again.code == 0
    assert "Already measured" in again.err
    assert again.document == finished.document
    shutil.copytree(work / "run", work / "grown")
    before = {p: p.read_text() for p in (work / "grown" / "cells").glob("*/records.jsonl")}
    command[command.index("run", 1)] = "grown"
    more = kvbench(*command, "7", cwd=work)
    assert more.code == 0, more.err
    assert {r["n"] for r in more.document["rows"] if r["unit"] == "document" and r["params"]["bin"] is None} == {7}
    for path, text in before.items():
        assert path.read_text().startswith(text)
        assert len(path.read_text().splitlines()) == 7


def test_report_needs_neither_torch_nor_model(finished: Outcome, work: Path) -> None:
    code = (
        "import sys; sys.argv = ['kvbench', 'report', 'run', '--json']\n"
        "from kvbench.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == finished.document
    for name in ("ppl-removal", "accuracy-removal"):
        assert (work / "run" / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (work / "run" / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    table = (work / "run" / "table.txt").read_text()
    for word in ("sentinel", "scattered", "recovery", "realised", "real", "[95 % CI]", "Holm"):
        assert word in table


def said_and_imported(work: Path, *asked: list[str]) -> list[tuple[list[str], list[str], int, str]]:
    """Commands one after another in a process that begins cold: each with what has been imported by its end, with its
    code, and with what it printed. What one imports is there for those after it, so that it is seen all the more."""
    code = (
        "import json, sys\n"
        "from kvbench.cli.app import main\n"
        "for arguments in json.loads(sys.argv[1]):\n"
        "    sys.argv, code = ['kvbench', *arguments], 0\n"
        "    try:\n        main()\n"
        "    except SystemExit as end:\n        code = end.code or 0\n"
        "    print('\\0', json.dumps([list(sys.modules), code]), end='\\0', flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)], cwd=work, capture_output=True, text=True, check=False,
    )
    assert done.returncode == 0, done.stderr
    said, told = done.stdout.split("\0")[:-1:2], [json.loads(part) for part in done.stdout.split("\0")[1::2]]
    return [(words, *two, text) for words, two, text in zip(asked, told, said, strict=True)]


def test_help_and_version_are_instant(work: Path) -> None:
    asked = ["--help"], ["--version"], ["run", "--help"], ["train", "--help"], ["report", "--help"]
    for arguments, modules, code, said in said_and_imported(work, *asked):
        assert code == 0, arguments
        assert not {"torch", "pandas", "transformers", "matplotlib", "scipy", "numpy"} & set(modules), arguments
        assert "kvbench" in said


def test_what_is_planned_needs_no_transformers(work: Path) -> None:
    """Three seconds that only those who load a model have to wait."""
    asked = ["run", "--dry-run"], ["profile", "--dry-run"], ["run", "--method", "nope"]
    codes = []
    for arguments, modules, code, _ in said_and_imported(work, *asked):
        assert "transformers" not in modules, arguments
        codes.append(code)
    assert codes == [0, 0, 2]


def test_dry_run_prints_the_cells_and_writes_nothing(
    called: Callable[[Sequence[str | Path]], Outcome], tmp_path: Path
) -> None:
    found = called(["run", "--method", "sinks", "--ratio", "0.50", "--dry-run"])
    assert found.code == 0
    assert "sinks-0.5-" in found.out
    assert len(called(["run", "--method", "sinks", "--ratio", "0.5", "--dry-run", "--json"]).document["cells"]) == 21
    assert "21 cells" in found.out
    assert list(tmp_path.iterdir()) == []


def test_settings_file_and_environment(
    called: Callable[[Sequence[str | Path]], Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kvbench.toml").write_text('[run]\nmethod = ["window"]\nratio = [0.25]\ntask = ["recall"]\n')
    found = called(["run", "--dry-run"])
    assert "window-0.25-" in found.out
    assert "minidocs" not in found.out
    monkeypatch.setenv("KVBENCH_MODEL", "nowhere/at/all")
    assert "nowhere/at/all" in called(["run", "--dry-run"]).err
    assert called(["run", "--dry-run", "--model", "kvbench-tiny"]).code == 0


@pytest.mark.heavy
@pytest.mark.parametrize("arguments", [
    ["--protocol", "stream", "--set", "tokens=256", "--set", "chunk=1"],
    ["--protocol", "prefix", "--execution", "onepass"], ["--set", "preset=paper", "--set", "sampler=published"],
])
def test_protocols_and_executions(work: Path, arguments: list[str]) -> None:
    text = "The mill by the old bridge had nine flat stones, and an otter kept them. " * 50
    (work / "long.jsonl").write_text("".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(3)))
    found = kvbench("run", "--method", "sentinel", "--ratio", "0.7", "--task", "books", "--data", "long.jsonl",
                    *arguments, "--limit", "1", "--json", "--out", "-".join(arguments).strip("-"), cwd=work)
    assert found.code == 0, found.err
    for row in rows(found, metric="ppl"):
        assert row["removal"] == ("masked" if "onepass" in arguments else "real")
        if row["ratio_asked"] is not None and "sampler=published" not in arguments:
            assert row["ratio_realised"] == pytest.approx(0.7, abs=0.005)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["gpt2"])
def test_other_families_run(work: Path, model_folder: Callable[..., Path], name: str) -> None:
    found = kvbench("run", "--model", model_folder(name), "--method", "sinks", "--ratio", "0.5", "--limit", "3",
                    "--task", "minidocs", "--json", "--out", name, cwd=work)
    assert found.code == 0, found.err
    assert {r["method"] for r in found.document["rows"]} == {"full", "none", "local", "scattered", "sinks"}
