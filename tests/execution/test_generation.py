"""Document generation from end to end: rows, resuming, order, bad requests, and looking at texts."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvbench.analysis.results import compute_results
from kvbench.execution.generation import _output
from kvbench.metrics import GENERATION_NAMES
from kvbench.store.folder import MAUVE, RunFolder
from kvbench.store.records import HUMAN, Cell, GenerationRecord
from tests.helpers.command import Call, Outcome, kvbench, refused

SHORT = ["--set", "prefix=48", "--set", "new_tokens=12"]
COMMAND = ["run", "--task", "minidocs-gen", "--data", "docs.jsonl", "--method", "sentinel", "--ratio", "0.5", *SHORT]

QUICK = ["--metric", "rep4"]
"""Without the judges, which take longer to load than the small model takes to write."""


def write_documents(path: Path, order: Sequence[int], named: bool = True) -> None:
    rows = []
    for i in order:
        text = " ".join(
            f"The {w} of house {i} told {(i * 7 + j) % 13} others."
            for j, w in enumerate(["miller", "otter", "hare"] * 8)
        )
        rows.append({**({"id": f"d{i}"} if named else {}), "text": text})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generation")
    write_documents(folder / "docs.jsonl", range(12))
    return folder


@pytest.fixture(scope="module")
def finished(work: Path) -> Outcome:
    found = kvbench(*COMMAND, "--out", "run", "--json", cwd=work)
    assert found.code == 0, found.err
    return found


def texts(folder: Path, by: str = "document") -> dict[tuple[str, str], Any]:
    """The ids of every output, by cell and document (or by the text of its prefix)."""
    run = RunFolder(folder)
    people = {d: r.prefix for c in run.cells() if c.method == HUMAN for d, r in run.texts(c).items()}
    return {
        (f"{cell.method} {cell.ratio_asked}", name if by == "document" else str(people[name])): [
            o.ids for o in record.outputs
        ]
        for cell in run.cells() for name, record in run.texts(cell).items()
    }


def rows(outcome: Outcome, **wanted: Any) -> list[dict[str, Any]]:
    return [r for r in outcome.document["rows"] if all(r[k] == v for k, v in wanted.items())]


def test_every_metric_of_every_method_has_a_row(finished: Outcome) -> None:
    everything = set(GENERATION_NAMES) - {"mauve"}
    kept = {"kv_bytes_logical", "kv_bytes_physical", "kv_bytes_full"}
    whole = [r for r in finished.document["rows"] if r["params"]["bin"] is None]
    for method, ratio in [("full", None), ("none", None), ("human", None), *(
        (m, 0.5) for m in ("local", "scattered", "sinks", "sentinel")
    )]:
        mine = {r["metric"]: r for r in whole if (r["method"], r["ratio_asked"]) == (method, ratio)}
        assert set(mine) == (everything - {"prefix_match"} if method == "human" else everything | kept), method
        for row in mine.values():
            assert row["params"]["new_tokens"] == 12
            assert row["signature"].startswith(row["metric"] + ":generate|P:48|G:12 tokens")
            if row["ci_low"] is not None and row["metric"] != "distinct":
                assert row["ci_low"] - 1e-9 <= row["value"] <= row["ci_high"] + 1e-9
            compared = method != "full" and row["metric"] not in kept
            assert (row["delta"] is not None) == compared == (row["p_value"] is not None)
    greedy = rows(finished, metric="rep4")
    assert {r["params"]["bin"] for r in greedy} == {None, "decode=greedy"}


def test_the_full_caches_greedy_text_is_what_generate_writes_after_the_stored_prefix(
    work: Path, finished: Outcome
) -> None:
    from transformers import AutoModelForCausalLM

    from kvbench.models.references import assets

    model = AutoModelForCausalLM.from_pretrained(assets() / "kvbench-tiny", dtype=torch.float32)
    run = RunFolder(work / "run")
    cells = {cell.method: cell for cell in run.cells()}
    people, full = run.texts(cells[HUMAN]), run.texts(cells["full"])
    for name, record in full.items():
        ids = torch.tensor([people[name].prefix_ids])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, 48:]
        ours, = record.of("greedy")
        assert list(ours.ids) == [i for i in theirs.tolist() if i != model.config.eos_token_id]


def test_the_ratio_is_realised_when_the_prefix_has_been_read(finished: Outcome) -> None:
    for method in ("local", "scattered", "sinks", "sentinel"):
        row, = rows(finished, method=method, metric="kv_bytes_physical")
        assert row["ratio_realised"] == pytest.approx(0.5)
        assert row["removal"] == "real"
        full, = rows(finished, method=method, metric="kv_bytes_full")
        assert row["value"] == pytest.approx(full["value"] / 2)
    assert rows(finished, method="full", metric="prefix_match")[0]["value"] == 1


def test_records_say_which_tokens_of_the_prefix_are_held(work: Path, finished: Outcome) -> None:
    """Of 48, sinks keep the first 4 tokens and the last 20, a window the last 24; summaries stand for several."""
    run = RunFolder(work / "run")
    cells = {cell.method: cell for cell in run.cells()}
    wanted = {"full": "9" * 48, "sinks": "9999" + 24 * "0" + 20 * "9", "local": 24 * "0" + 24 * "9", "sentinel": None}
    for method, kept in wanted.items():
        assert {record.kept for record in run.texts(cells[method]).values()} == {kept}, method
    for method in ("scattered", "none"):
        assert all((r.kept or "").count("9") == r.held for r in run.texts(cells[method]).values()), method


def test_the_ends_of_tokens_cut_the_prefix_into_its_tokens(work: Path, finished: Outcome, tiny_tokenizer: Any) -> None:
    run = RunFolder(work / "run")
    people = next(cell for cell in run.cells() if cell.method == HUMAN)
    for record in run.texts(people).values():
        starts = (0, *record.prefix_ends[:-1])
        cut = [(record.prefix or "")[a:b] for a, b in zip(starts, record.prefix_ends, strict=True)]
        assert cut == [tiny_tokenizer.decode([i]) for i in record.prefix_ids]  # plain ASCII: one token, one piece
        assert "".join(cut) == record.prefix


def test_values_follow_from_the_texts_on_disk(work: Path, finished: Outcome) -> None:
    """Recomputed with the libraries from the records, not with our columns."""
    from sacrebleu.metrics.chrf import CHRF

    run = RunFolder(work / "run")
    cells = {cell.method: cell for cell in run.cells()}
    people = run.texts(cells[HUMAN])
    found = run.texts(cells["local"])
    names = list(run.manifest().tasks[cells[HUMAN].setting].documents)
    written = [found[n].of("nucleus")[0].text for n in names]
    references = [people[n].of("human")[0].text for n in names]
    row = next(r for r in rows(finished, method="local", metric="chrf") if r["params"]["bin"] is None)
    assert row["value"] == pytest.approx(CHRF().corpus_score(written, [references]).score)
    outputs = [found[n].of("nucleus")[0] for n in names]
    ppl = np.exp(sum(o.nll or 0 for o in outputs) / sum(o.nll_tokens for o in outputs))
    row = next(r for r in rows(finished, method="local", metric="gen_ppl") if r["params"]["bin"] is None)
    assert row["value"] == pytest.approx(ppl)
    assert "scorer" in row["params"]
    assert row["params"]["scorer"] == "itself"


@pytest.mark.heavy
@pytest.mark.parametrize(("batch", "threads"), [("1", "1"), ("8", "2")])
def test_the_batch_does_not_change_a_text(work: Path, finished: Outcome, batch: str, threads: str) -> None:
    again = kvbench(
        *COMMAND, *QUICK, "--set", f"batch={batch}", "--threads", threads, "--out", f"b{batch}", cwd=work
    )
    assert again.code == 0, again.err
    assert texts(work / f"b{batch}") == texts(work / "run")


@pytest.mark.heavy
def test_the_order_and_the_names_of_documents_do_not_change_a_text(work: Path, finished: Outcome) -> None:
    order = list(range(12))
    random.Random(0).shuffle(order)
    write_documents(work / "shuffled.jsonl", order, named=False)
    command = [a if a != "docs.jsonl" else "shuffled.jsonl" for a in COMMAND]
    again = kvbench(*command, *QUICK, "--out", "shuffled", cwd=work)
    assert again.code == 0, again.err
    assert texts(work / "shuffled", "prefix") == texts(work / "run", "prefix")


@pytest.mark.heavy
def test_killed_and_continued_writes_the_same_texts(work: Path, finished: Outcome) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    victim = subprocess.Popen(
        [sys.executable, "-m", "kvbench", *COMMAND, "--out", "killed"], cwd=work, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not any(p.stat().st_size for p in (work / "killed").glob("cells/*/records.jsonl")):
        assert time.monotonic() < deadline
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    before = len(texts(work / "killed"))
    assert 0 < before < len(texts(work / "run"))
    again = kvbench(*COMMAND, "--out", "killed", "--json", cwd=work)
    assert again.code == 0, again.err
    assert texts(work / "killed") == texts(work / "run")
    assert again.document["rows"] == finished.document["rows"]


def test_a_finished_run_and_its_report_print_the_same(work: Path, finished: Outcome) -> None:
    again = kvbench(*COMMAND, "--out", "run", "--json", cwd=work)
    assert "Already measured" in again.err
    assert again.document["rows"] == finished.document["rows"]
    report = kvbench("report", "run", "--wide", cwd=work)
    assert report.code == 0, report.err
    for words in ("fluency and overlap", "meaning and diversity", "length and degeneration", "greedy texts",
                  "under the uncompressed model itself"):
        assert words in report.out
    assert (work / "run" / "figures" / "gen_ppl-removal.png").exists()


def test_show_prints_the_texts_side_by_side(work: Path, finished: Outcome) -> None:
    shown = kvbench("show", "run", "--document", "d3", cwd=work)
    assert shown.code == 0, shown.err
    for words in ("house 3", "human", "full", "sentinel 0.5", "nucleus", "greedy"):
        assert words in shown.out
    assert kvbench("show", "run", "--document", "d99", cwd=work).code == 2
    assert "Unknown document" in kvbench("show", "run", "--document", "d99", cwd=work).err


@pytest.mark.heavy
def test_draws_greedy_only_and_chosen_metrics(work: Path) -> None:
    few = ["--limit", "4", "--no-baselines", "--json"]
    drawn = kvbench(*COMMAND, "--set", "draws=3", "--set", "decode=nucleus", *few, "--out", "draws", cwd=work)
    assert drawn.code == 0, drawn.err
    assert {r["method"] for r in drawn.document["rows"]} == {"full", "sentinel"}
    assert not rows(drawn, metric="prefix_match")
    assert len(next(v for k, v in texts(work / "draws").items() if k[0] == "full None")) == 3
    greedy = kvbench(*COMMAND, "--set", "decode=greedy", "--metric", "rep4", "--metric", "prefix_match", *few,
                     "--out", "greedy", cwd=work)
    assert {r["metric"] for r in greedy.document["rows"]} == {
        "rep4", "prefix_match", "kv_bytes_logical", "kv_bytes_physical", "kv_bytes_full"}
    assert all(r["params"]["bin"] is None for r in greedy.document["rows"])
    record = json.loads(next((work / "greedy").glob("cells/*/records.jsonl")).read_text().splitlines()[0])
    assert record["outputs"][0]["vector"] is None
    assert record["outputs"][0]["nll"] is None


@pytest.mark.heavy
def test_another_scorer_and_other_features_for_mauve(
    work: Path, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    write_documents(tmp_path / "many.jsonl", range(200))
    judge = model_folder("gpt2")
    found = kvbench(
        "run", "--task", "minidocs-gen", "--data", "many.jsonl", "--model", model_folder("llama"), "--method", "local",
        "--no-baselines", *SHORT, "--set", "decode=nucleus", "--set", "draws=2", "--scorer", judge,
        "--mauve-features", judge, "--metric", "gen_ppl", "--metric", "mauve", "--out", "run", "--json", cwd=tmp_path,
    )
    assert found.code == 0, found.err
    ppl = rows(found, metric="gen_ppl", method="full")[0]
    assert ppl["params"]["scorer"].startswith(judge.name + "@")
    assert ppl["value"] > 1000, "a random scorer knows nothing"
    for method in ("full", "local"):
        row, = rows(found, metric="mauve", method=method)
        assert 0 <= row["value"] <= 1
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert (row["delta"] is None) == (method == "full")
        assert "few texts" in row["signature"]
        assert judge.name in row["signature"]
    files = list((tmp_path / "run").glob(f"cells/*/{MAUVE}"))
    assert len(files) == 3, "the people's texts are the ceiling"


@pytest.mark.parametrize("lost", ["full", HUMAN])
def test_what_can_be_said_without_a_cell_is_still_said(
    work: Path, finished: Outcome, tmp_path: Path, lost: str
) -> None:
    shutil.copytree(work / "run", tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    cell, = (c for c in run.cells() if c.method == lost)
    (run.cell_folder(cell) / "records.jsonl").unlink()
    found = compute_results(run)
    assert not found.ok
    assert "0 of 12 documents" in found.failures[0].error
    said = {row.metric for row in found.rows if row.method == "sentinel" and row.params["bin"] is None}
    missing = {"prefix_match"} if lost == "full" else {
        "bleu", "chrf", "rouge1", "rouge2", "rougeL", "semantic", "prefix_coherence"}
    assert said & set(GENERATION_NAMES) == set(GENERATION_NAMES) - {"mauve"} - missing
    assert all(row.delta is None for row in found.rows if lost == "full")


def test_one_document_has_no_stranger_to_be_compared_with(work: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "docs.jsonl", range(1))
    found = kvbench(*COMMAND, "--metric", "bleu", "--metric", "rep4", "--out", "run", "--json", cwd=tmp_path)
    assert found.code == 0, found.err
    assert {r["metric"] for r in rows(found, method="human")} == {"rep4"}
    assert rows(found, method="full", metric="bleu")[0]["ci_low"] is None


def test_a_text_reads_as_it_does_after_its_prefix(tiny_tokenizer: Any) -> None:
    """A decoder that drops a leading space must not glue a word to the prefix; half a letter belongs to the text."""
    class Stripping:
        def decode(self, ids: list[int], **rest: Any) -> str:
            return str(tiny_tokenizer.decode(ids)).removeprefix(" ")

    ids = tiny_tokenizer("The old mill stood by the river").input_ids
    assert _output(Stripping(), ids[:3], "nucleus", 0, ids[3:], False).text == tiny_tokenizer.decode(ids[3:])
    letter = tiny_tokenizer("caf\u00e9 \u2603").input_ids
    cut = next(i for i in range(1, len(letter)) if tiny_tokenizer.decode(letter[:i]).endswith("\ufffd"))
    assert "\ufffd" not in _output(tiny_tokenizer, letter[:cut], "nucleus", 0, letter[cut:], False).text


@pytest.mark.parametrize(("arguments", "words"), [
    ([*SHORT, "--set", "prefix=2000"], ["2000 tokens and 12 to write do not fit", "--set prefix=1012"]),
    (["--set", "preset=long"], ["1024 tokens and 256", "--set prefix=768"]),
    (["--set", "preset=papr"], ["preset", "Did you mean 'paper'"]),
    (["--set", "prefix=12"], ["prefix=12", "at least 32"]),
    (["--set", "new_tokens=0"], ["new_tokens=0", "at least 1"]),
    (["--set", "draws=0"], ["draws=0"]),
    (["--set", "decode=beam"], ["decode", "'beam'"]),
    (["--set", "top_p=1.5"], ["top_p=1.5", "above 0"]),
    (["--set", "top_p=0"], ["top_p=0"]),
    (["--set", "temperature=hot"], ["temperature=hot"]),
    (["--set", "temperature=nan"], ["temperature=nan"]),
    (["--set", "batch=none"], ["batch=none"]),
    (["--protocol", "block"], ["not measured with protocol 'block'", "generate"]),
    (["--metric", "blue"], ["Unknown metric", "Did you mean 'bleu'"]),
    (["--metric", "ppl"], ["'ppl' is none of them", "--metric gen_ppl"]),
    (["--metric", "mauve"], ["at least 200 documents", "has 48"]),
    (["--mauve-features", "kvbench-tiny"], ["at least 200 documents"]),
    (["--scorer", "./nowhere"], ["no model folder ./nowhere"]),
    (["--scorer", "someone/unreachable"], ["--scorer someone/unreachable", "cannot be had from the Hugging"]),
    (["--scorer", "kvbench-tiny", "--metric", "bleu"], ["--scorer is for gen_ppl"]),
    (["--mauve-features", "kvbench-tiny", "--metric", "bleu"], ["--mauve-features is for mauve"]),
    (["--method", "sentinel", "--set", "sampler=published"], ["sampler=published", "words"]),
    (["--method", "sentinel", "--ratio", "0.97"], ["cannot remove 0.97 of 256"]),
    (["--task", "minidocs", "--data", "x.jsonl"], ["one task"]),
])
def test_bad_requests(called: Call, arguments: list[str], words: list[str]) -> None:
    refused(called, ["run", "--method", "sinks", "--task", "minidocs-gen", *arguments], *words)


def test_a_prefix_longer_than_every_document(called: Call, tmp_path: Path) -> None:
    write_documents(tmp_path / "docs.jsonl", range(3))
    command = ["run", "--method", "sinks", "--task", "minidocs-gen", "--data", "docs.jsonl"]
    refused(called, [*command, "--set", "prefix=600"], "no document is long enough", "664 tokens", "3 documents")
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "word " * 191}) + "\n")
    refused(called, [*command, "--set", "preset=paper"], "no document is long enough", "192 words")


def test_judges_are_for_written_text(called: Call) -> None:
    for option in (["--scorer", "kvbench-tiny"], ["--metric", "chrf"], ["--mauve-features", "kvbench-tiny"]):
        refused(called, ["run", "--method", "sinks", "--task", "recall", *option], option[0], "write text")


def test_c4_is_said_to_be_out_of_reach(called: Call) -> None:
    refused(called, ["run", "--task", "c4-gen", "--method", "sinks"], "allenai/c4", "--data")


def test_show_needs_a_run_that_writes(called: Call, tmp_path: Path) -> None:
    assert "not a run folder" in refused(called, ["show", "nowhere"])


def test_records_round_trip(tmp_path: Path) -> None:
    import dataclasses

    from kvbench.store.records import Output

    record = GenerationRecord(
        "d", "g", (Output("nucleus", 0, (1, 2), "x \u2028 \ufffd", False, 1.5, 2, "v"),), 48, 24, 3.5, 7, 60, 1.0,
        2.0, 3.0,
    )
    cell = Cell("m", None, "h", "auto", "cpu", "sinks", "0.5", "method", "minidocs-gen", 1, "d", "generate",
                "streamed", {}, None, None, 0)
    folder = RunFolder(tmp_path)
    folder.open_cell(cell)
    folder.append(cell, [record])
    assert folder.texts(cell) == {"d": record}
    assert GenerationRecord.load(json.loads(json.dumps(dataclasses.asdict(record)))) == record
