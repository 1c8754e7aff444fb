"""``kvbench profile`` from end to end: rows, continuing, children that die, budgets, bad requests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kvbench.planning.profile import doubts
from kvbench.profiling.worker import prompt_seed
from kvbench.reporting.tables.profile import break_even, profile_tables
from kvbench.store.folder import RunFolder
from kvbench.store.rows import Row
from tests.helpers.command import ROW_KEYS, Call, Outcome, kvbench, refused
from tests.helpers.profiles import SMALL, rows

TIME = {"ttft_s", "prefill_s", "compress_s", "prefill_tok_s", "tpot_s", "itl_s", "decode_tok_s", "bandwidth_share"}
BYTES = {
    "weights_bytes", "prefill_peak_bytes", "decode_peak_bytes", "kv_bytes_logical", "kv_bytes_physical",
    "kv_bytes_full", "rss_peak_bytes",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def finished(work: Path) -> Outcome:
    return kvbench(
        "profile", "--method", "sinks", "--seq-len", "64", "--seq-len", "128", "--seq-len", "192", *SMALL,
        "--repeats", "1", "--rounds", "6", "--out", "run", "--json", cwd=work,
    )


def test_the_json_document_is_that_of_the_contract(finished: Outcome) -> None:
    assert finished.code == 0, finished.err
    document = finished.document
    assert list(document) == ["schema", "run", "ok", "failures", "rows"]
    assert document["ok"] is True
    for row in document["rows"]:
        assert set(row) == ROW_KEYS
        assert set(row["params"]) >= {"seq_len", "batch_size", "new_tokens", "step", "bin"}
        assert (row["task"], row["protocol"], row["removal"]) == ("profile", "profile", "real")
        assert row["signature"].startswith(row["metric"] + ":profile|real|float32|cpu|threads:1|")
        if row["ci_low"] is not None:
            assert row["ci_low"] <= row["value"] <= row["ci_high"]
    assert {r["method"] for r in document["rows"]} == {"full", "full-again", "full-dynamic", "sinks"}


@pytest.mark.parametrize("method", ["full", "sinks"])
def test_every_number_of_the_contract_is_there(finished: Outcome, method: str) -> None:
    mine = rows(finished, method=method, seq_len=128)
    assert {r["metric"] for r in mine} >= TIME | BYTES
    assert all(r["n"] == 6 and r["groups"] == 1 and r["unit"] == "repeat" for r in mine)
    value = {r["metric"]: r["value"] for r in mine}
    assert value["tpot_s"] > 0
    assert value["decode_tok_s"] == pytest.approx(1 / value["tpot_s"], rel=0.3)
    assert value["ttft_s"] >= value["prefill_s"]
    assert value["kv_bytes_full"] == 128 * 6 * 2 * 2 * 64 * 4  # tokens, layers, keys and values, heads, width, bytes
    assert 1 <= value["kv_bytes_physical"] / value["kv_bytes_logical"] <= 1.05
    first = mine[0]
    if method != "full":
        assert first["ratio_realised"] == pytest.approx(0.7, abs=0.01)
        assert value["kv_bytes_logical"] == pytest.approx(0.3 * value["kv_bytes_full"], rel=0.03)
        speed = next(r for r in mine if r["metric"] == "decode_speedup")
        assert speed["baseline"] in ("full", "full-dynamic")
        assert speed["ci_low"] is not None
        assert next(r for r in mine if r["metric"] == "decode_speedup_predicted")["value"] > 1


def test_the_twin_of_the_full_cache_shows_the_noise(finished: Outcome) -> None:
    gaps = rows(finished, metric="aa_gap")
    assert [r["params"]["seq_len"] for r in gaps] == [64, 128, 192]
    assert all(r["method"] == "full-again" and r["value"] >= 0 for r in gaps)
    twin = rows(finished, metric="decode_speedup", method="full-again", seq_len=64)[0]
    assert gaps[0]["value"] == pytest.approx(abs(twin["value"] - 1))
    assert twin["baseline"] == "full"


def test_cost_per_entry_is_fitted_where_there_are_three_lengths(finished: Outcome) -> None:
    kept, raw = (rows(finished, metric=name, method="sinks")[0] for name in ("tpot_per_entry_s", "tpot_per_raw_s"))
    assert kept["params"]["seq_len"] is None
    assert kept["ci_low"] < kept["value"] < kept["ci_high"]
    assert kept["n"] == raw["n"] == 18


def test_warmups_are_recorded_apart(finished: Outcome, work: Path) -> None:
    folder = RunFolder(work / "run")
    cell = next(c for c in folder.cells() if c.method == "sinks")
    records = folder.measurements(cell)
    assert sum("warm" in key for key in records) == 1
    assert sum("round" in key for key in records) == 6
    assert "memory" in records


def test_prompts_are_fresh_but_shared_by_the_cells_of_a_round() -> None:
    seeds = [prompt_seed(0, repeat, n, w) for repeat in range(3) for n in range(5) for w in (False, True)]
    assert len(set(seeds)) == len(seeds)
    assert prompt_seed(1, 0, 0, False) not in seeds


def test_what_is_not_as_usual_is_remarked(finished: Outcome) -> None:
    rows = [Row(**row) for row in finished.document["rows"]]
    odd = [
        replace(r, params={**r.params, "adapter": "random", "fill": "synthetic", "notes": ["random weights"],
                           "warnings": ["unstable: the standard deviation is 12 % of the mean"]})
        for r in rows
    ]
    said = " ".join(str(part) for part in profile_tables(odd)[-2:])
    for words in ("random weights; trained methods have random adapters", "(synthetic)", "unstable", "--rounds"):
        assert words in said
    assert "random" not in " ".join(str(part) for part in profile_tables(rows)[-2:])


def test_a_finished_profile_is_printed_again_and_reported(finished: Outcome, work: Path) -> None:
    before = (work / "run" / "results.json").read_text()
    again = kvbench(
        "profile", "--method", "sinks", "--seq-len", "64", "--seq-len", "128", "--seq-len", "192", *SMALL,
        "--repeats", "1", "--rounds", "6", "--out", "run", cwd=work,
    )
    assert again.code == 0
    assert "Already measured" in again.err
    assert "A/A gap of decoding (64 x 1:" in again.out
    assert max(map(len, again.out.splitlines()[:8])) <= 100
    assert "1000 more entries" not in again.out
    assert "--wide" in again.out
    report = kvbench("report", "run", cwd=work)
    assert report.code == 0, report.err
    assert "1000 more entries" in (work / "run" / "table.txt").read_text()
    assert json.loads((work / "run" / "results.json").read_text()) == json.loads(before)
    figures = {p.name for p in (work / "run" / "figures").glob("*.png")}
    assert figures == {
        "decode_tok_s-length.png", "decode_peak-length.png", "speedup-predicted.png", "decode-cost-kept.png",
        "decode-cost-read.png",
    }


def test_a_report_needs_no_torch(finished: Outcome, work: Path) -> None:
    code = (
        "import sys; from kvbench.cli.app import app\n"
        "app(['report', 'run'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_writes_nothing(called: Call, tmp_path: Path) -> None:
    found = called(["profile", "--seq-len", "4096", "--batch-size", "8", "--dry-run"])
    assert found.code == 0
    assert "1229" in found.out  # kept(4096, 0.7)
    assert not list(tmp_path.iterdir())
    cells = called(["profile", "--seq-len", "4096", "--dry-run", "--json"]).document["cells"]
    assert [c["method"] for c in cells] == ["full", "full-again", "full-dynamic", "sinks", "sentinel"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["--seq-len", "0"], ["--seq-len 0 is below 32"]),
    (["--seq-len", "-4096"], ["--seq-len -4096 is below 32"]),
    (["--batch-size", "0"], ["--batch-size 0 is below 1"]),
    (["--new-tokens", "1"], ["--new-tokens 1 is below 2"]),
    (["--new-tokens", "-3"], ["--new-tokens -3"]),
    (["--chunk", "0"], ["--chunk 0"]),
    (["--repeats", "0"], ["--repeats 0"]),
    (["--rounds", "-1"], ["--rounds -1"]),
    (["--seq-len", "many"], ["--seq-len"]),
    (["--fill", "zeros"], ["Unknown --fill", "synthetic"]),
    (["--model", "shape:gtp2"], ["Unknown shape 'gtp2'", "Did you mean 'gpt2'"]),
    (["--model", "shape:"], ["Unknown shape"]),
    (["--model", "shape:gpt2", "--adapter", "kvbench-tiny-sentinel-long"], ["its weights are random"]),
    (["--model", "shape:gpt2", "--revision", "main"], ["is a shape"]),
    (["--model", "./nowhere"], ["no model folder"]),
    (["--method", "sink"], ["Unknown method 'sink'", "Did you mean 'sinks'"]),
    (["--method", "full-again"], ["Unknown method"]),
    (["--ratio", "1.5"], ["outside [0, 1)"]),
    (["--set", "sampler=published", "--method", "sentinel"], ["random tokens"]),
    (["--set", "nonsense=1"], ["Unknown --set key"]),
    (["--memory-budget", "lots"], ["not a size in bytes"]),
    (["--memory-budget", "0"], ["not a size in bytes"]),
    (["--memory-budget", "card"], ["is for GPUs"]),
    (["--device", "cuda:77"], ["not available"]),
    (["--threads", "0"], ["--threads"]),
    (["--method", "ccm-concat", "--ratio", "0.7", "--seq-len", "64"], ["needs chunks of 7"]),
    (["--method", "sentinel", "--ratio", "0.99"], ["sentinel cannot remove 0.99 of 4096", "at most 0.96"]),
    (["--device", "mps"], ["not available", "cuda"]),
])
def test_a_bad_request_is_a_sentence(called: Call, arguments: list[str], words: list[str]) -> None:
    refused(called, ["profile", *arguments], *words)


def test_a_budget_below_the_weights_is_refused(called: Call) -> None:
    refused(
        called, ["profile", "--memory-budget", "1MiB", "--seq-len", "64", *SMALL],
        "less than the weights of kvbench-tiny take (20.9 MiB)",
    )


def test_a_sliding_window_is_no_full_cache(called: Call, tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    folder = tmp_path / "windowed"
    shutil.copytree(model_folder("mistral"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 64}))
    found = called(["profile", "--model", folder, "--seq-len", "128", "--method", "sinks", "--out", "run"])
    assert found.code == 2
    assert "sliding_window 64" in found.err
    assert not (tmp_path / "run").exists()


def test_learnt_positions_end_somewhere(called: Call, model_folder: Callable[..., Path]) -> None:
    refused(
        called, ["profile", "--model", model_folder("gpt2", context=128), "--seq-len", "256", "--method", "sinks"],
        "learnt 128 positions", "shape:gpt2",
    )


def test_doubts_about_the_machine_are_said() -> None:
    assert doubts(1, 0.0) == []
    assert "cores" in doubts(10_000, 0.0)[0]
    assert "73 %" in doubts(1, 73.0)[0]


def test_break_even_is_the_smallest_size_beyond_the_noise(finished: Outcome) -> None:
    results = [r for r in finished.document["rows"] if r["metric"] in ("decode_speedup", "aa_gap")]
    made = []
    for row in results:
        low = {64: 1.01, 128: 1.2, 192: 1.4}[row["params"]["seq_len"]]
        known = {"value": 0.05} if row["metric"] == "aa_gap" else {"value": low + 0.1, "ci_low": low}
        made.append(Row(**{**row, **known}))
    assert break_even(made, "sinks", 0.7) == "sinks 0.7: gains from 128 x 1 on, of what was measured."
    assert "no gain" in break_even([r for r in made if r.params["seq_len"] == 64], "sinks", 0.7)
    lost = [replace(r, ci_low=0.9) if r.params["seq_len"] == 192 and r.method == "sinks" else r for r in made]
    assert break_even(lost, "sinks", 0.7) == "sinks 0.7: gains at 128 x 1 only, of what was measured."
