"""A bundle has the numbers of its run, and no text, token, path or name of it."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvbench.analysis.comparison import compare, parse_side
from kvbench.analysis.results import compute_results
from kvbench.errors import UserError
from kvbench.reporting.bundle import bundle_notes, write_bundle
from kvbench.store.answer_records import Answer, AnswerRecord
from kvbench.store.folder import FAILURE, RUN, RunFolder
from kvbench.store.nameless import named_anew, without_paths
from kvbench.store.records import Failure, GenerationRecord, Output
from kvbench.store.rows import Row
from tests.frozen.measure import OLD_RUN
from tests.helpers.command import kvbench
from tests.helpers.records import ASKED, CELL, DOCUMENTS, FULL_ASKED, LOCAL, SINKS, asked, made, sample

PIECE = 16
"""Characters in a row that no text and the archive have in common."""


def vector(seed: int) -> str:
    return base64.b64encode(np.random.default_rng(seed).normal(size=24).astype(np.float16).tobytes()).decode()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A run that scores and writes texts, whose texts have embeddings, too."""
    run = Path(shutil.copytree(OLD_RUN, tmp_path / "Läufe" / "Maß für Maß"))
    folder = RunFolder(run)
    for number, cell in enumerate(cell for cell in folder.cells() if cell.writes):
        records = folder.texts(cell).values()
        lines = [
            json.dumps(dataclasses.asdict(replace(
                record, prefix_vector=record.prefix and vector(i),
                outputs=tuple(replace(o, vector=vector(31 * number + i + j)) for j, o in enumerate(record.outputs)),
            ))) for i, record in enumerate(records)
        ]
        (folder.cell_folder(cell) / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return run


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """A run of questions, whose records have the questions and what counts as right."""
    def told(scores: dict[str, float]) -> list[Any]:
        return [
            replace(record, answers=tuple(replace(
                answer, ids=(71, 503, 9), text=f"It is said that {record.document} is in the northern tower.",
                question=f"Where, then, did they put {record.document}?", references=(f"the loft above {n}",),
            ) for n, answer in enumerate(record.answers)))
            for name, score in scores.items()
            for record in [sample(name, [score, 1 - score], [[score, 0.5]])]
        ]

    scores = {f"d{i}": i / 20 for i in range(20)}
    return asked(tmp_path / "asked", [(FULL_ASKED, told(dict.fromkeys(scores, 1.0))), (ASKED, told(scores))])


def unpacked(run: Path) -> Path:
    bundle = write_bundle(run, run.parent / "given")
    zipfile.ZipFile(bundle.path).extractall(run.parent / "there")
    return run.parent / "there" / run.name


def content(path: Path) -> str:
    archive = zipfile.ZipFile(path)
    return "\n".join([*archive.namelist(), *(archive.read(name).decode() for name in archive.namelist())])


def rows(run: Path) -> list[Row]:
    found = compute_results(RunFolder(run))
    assert found.ok
    return list(found.rows)


def texts_of(run: Path) -> set[str]:
    """All that was read, written, asked and answered, and all embeddings."""
    folder, found = RunFolder(run), set()
    for cell in folder.cells():
        for record in folder.texts(cell).values() if cell.writes else ():
            found |= {text for o in record.outputs for text in (o.text, o.vector)}
            found |= {record.prefix, record.prefix_vector}
        for answers in folder.answers(cell).values() if cell.answers else ():
            found |= {text for a in answers.answers for text in (a.text, a.question, *a.references)}
    return {text for text in found if text}


@pytest.mark.parametrize("kind", ["written", "answered"])
def test_numbers_are_the_same_and_no_text_is_there(kind: str, request: pytest.FixtureRequest) -> None:
    run: Path = request.getfixturevalue(kind)
    mine, there = rows(run), unpacked(run)
    assert mine == rows(there)
    names = {row.metric for row in mine}
    wanted = {"bleu", "rougeL", "chrf", "semantic", "prefix_coherence", "distinct", "prefix_match", "rep4", "gen_ppl"}
    assert names >= (wanted if kind == "written" else {"answer_accuracy", "answer_length", "negative_share"})
    texts, archive = texts_of(run), content(run.parent / "given" / f"{run.name}.zip")
    assert len(texts) > 20
    pieces = {archive[i:i + PIECE] for i in range(len(archive))}
    shared = [text for text in texts for i in range(len(text) - PIECE + 1) if text[i:i + PIECE] in pieces]
    assert not shared
    assert not any(text in archive for text in texts if len(text) > 3)
    for cell in RunFolder(there).cells():
        if cell.writes:
            assert all(not r.outputs and not r.prefix_ids for r in RunFolder(there).texts(cell).values())
        if cell.answers:
            assert {a.ids for r in RunFolder(there).answers(cell).values() for a in r.answers} == {(0, 0, 0)}


def test_every_field_of_a_record_was_thought_of() -> None:
    """A field that is added to a record goes into bundles; it must be added here, or be taken out of them."""
    kept = {
        Output: set(), GenerationRecord: {"columns", "visible", "queries", "peak"}, Answer: {"score", "ended"},
        AnswerRecord: {"answers", "contexts", "survival", "spans", "bin", "peak"},
    }
    both = {"document", "group", "raw", "held", "kv_logical", "kv_physical", "kv_full", "seconds", "schema"}
    texts = {
        Output: {"decode", "draw", "ids", "text", "ended", "nll", "nll_tokens", "vector", "features"},
        GenerationRecord: {"outputs", "prefix", "prefix_ids", "prefix_vector", "prefix_ends", "kept"},
        Answer: {"ids", "text", "question", "references"}, AnswerRecord: set(),
    }
    for kind, names in kept.items():
        found = {field.name for field in dataclasses.fields(kind)}
        assert found == names | texts[kind] | (both if kind in (GenerationRecord, AnswerRecord) else set())
    told = GenerationRecord(
        "d", "g", (Output("greedy", 0, (1,), "t", True),), 1, 1, 1.0, 1, 1, 1.0, 1.0, 1.0, 0.0,
        "p", (1,), "v", (1,), "9",
    ).without_texts({})
    assert not any(getattr(told, name) for name in texts[GenerationRecord])


def test_a_bundle_is_compared_as_its_run_is(written: Path) -> None:
    there = unpacked(written)
    whole = compare(parse_side(f"{written}:sentinel"), parse_side(f"{written}:snapkv"))
    for first, second in ((written, there), (there, written), (there, there)):
        found = compare(parse_side(f"{first}:sentinel"), parse_side(f"{second}:snapkv"))
        assert [pair.rows for pair in found] == [
            tuple(row for row in pair.rows if row.metric != "prefix_match") for pair in whole
        ]
    assert {row.metric for pair in found for row in pair.rows} >= {"ppl", "bleu", "semantic", "distinct"}


def test_paths_and_names_are_left_out(tmp_path: Path) -> None:
    home = "/home/anna"
    data = f"{home}/my files/b.txt"
    cells = [
        replace(cell, model=f"{home}/models/m", adapter=f"{home}/adapters/x", options={"scorer": "org/judge@0a1b"})
        for cell in (replace(CELL, method="full", ratio_asked=None, role="control"), SINKS)
    ]
    left_out, failed = (replace(cells[1], ratio_asked=ratio) for ratio in ("0.7", "0.9"))
    run = made(tmp_path / "run", [(cell, 0.1 * i) for i, cell in enumerate(cells)])
    folder = RunFolder(run)
    manifest = folder.manifest()
    folder.describe(replace(
        manifest, cells=(*cells, left_out, failed), finished="2026-01-01", sources={"minidocs": data},
        command=("kvbench", "run", "--model", f"{home}/models/m", f"--data={data}", "--scorer", "org/judge", "--out",
                 r"C:\anna\runs", "--set", "chunk=1"),
        probes={f"{home}/models/m": {"kind": "Llama", "policy_refusal": f"{home}/models/m is odd (see {home}/x.py)"}},
    ))
    folder.fail(left_out, Failure(left_out.key, f"A window of {home}/models/m is too long.", left_out=True))
    folder.fail(failed, Failure(failed.key, f"OSError: {home}/secret: disk of anna-laptop is full"))
    there = unpacked(run)
    archive = content(tmp_path / "given" / "run.zip")
    for word in ("anna", "/home", "my files", "secret"):
        assert word not in archive
    found = RunFolder(there).manifest()
    assert found.command == ("kvbench", "run", "--model", "m", "--data=b.txt", "--scorer", "org/judge", "--out", "runs",
                             "--set", "chunk=1")
    assert found.sources == {"minidocs": "b.txt"}
    assert found.probes == {"m": {"kind": "Llama", "policy_refusal": "m is odd (see x.py)"}}
    assert [cell.adapter for cell in found.cells] == ["x"] * 4
    before, after = (compute_results(RunFolder(path)) for path in (run, there))
    assert [replace(row, model="m") for row in before.rows] == list(after.rows)
    assert [failure.error for failure in after.failures] == [
        "A window of m is too long.", "sinks 0.9 on minidocs: failed; the message is not part of the bundle.",
    ]
    assert {failure.cell for failure in after.failures} <= {cell.key for cell in found.cells}


def test_models_are_told_apart_and_hub_ids_stay(tmp_path: Path) -> None:
    models = {"/a/m": ("h", None), "/b/m": ("h2", None), "org/m": ("0" * 40, "0" * 40), "./m": ("h3", None)}
    cells = [replace(CELL, model=name, model_hash=h, revision=r) for name, (h, r) in models.items()]
    manifest = RunFolder(made(tmp_path / "run", [(cell, 0.0) for cell in cells])).manifest()
    anew = named_anew(manifest)
    assert [cell.model for cell in anew.values()] == ["m", "m #2", "org/m", "m #3"]
    assert set(without_paths(manifest, anew).tasks) == {cell.setting for cell in anew.values()}


def test_equal_runs_make_equal_archives_whole_or_not_at_all(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write_bundle(written, tmp_path / "a").path
    os.utime(written / RUN, (1, 1))
    assert first.name == "Maß für Maß.zip"
    assert write_bundle(written, tmp_path / "b").path.read_bytes() == first.read_bytes()
    again = unpacked(written)  # a bundle of a bundle is the same
    assert write_bundle(again, tmp_path / "c").path.read_bytes() == first.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write_bundle(written, tmp_path / "d")
    assert not list((tmp_path / "d").iterdir())


def test_an_unfinished_run_says_what_is_missing(written: Path) -> None:
    folder = RunFolder(written)
    folder.describe(replace(folder.manifest(), finished=None))
    snapkv = next(cell for cell in folder.cells() if cell.writes and cell.method == "snapkv")
    records = folder.cell_folder(snapkv) / "records.jsonl"
    records.write_text(records.read_text(encoding="utf-8").splitlines(keepends=True)[0], encoding="utf-8")
    assert not write_bundle(written, written.parent).is_finished
    mine, theirs = (compute_results(RunFolder(path)) for path in (written, unpacked(written)))
    assert mine.rows == theirs.rows
    assert [f.error for f in theirs.failures] == ["snapkv 0.7 on minidocs-gen: 1 of 2 documents are done."]


def test_a_bundle_is_not_continued(tmp_path: Path) -> None:
    there = unpacked(made(tmp_path / "run", [(SINKS, 0.0), (LOCAL, 0.1)]))
    for shared in (False, True):  # a sweep may share its folder, but not with a bundle
        with pytest.raises(UserError, match="not continued"):
            RunFolder(there).check("c", shared=shared)
    RunFolder(there).check("c", fresh=True)
    assert len(RunFolder(there).records(RunFolder(there).cells()[0])) == len(DOCUMENTS)
    assert not list(there.rglob(FAILURE))


def test_the_command(written: Path, tmp_path: Path) -> None:
    done = kvbench("report", written, "--bundle", "--out", "given", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "Maß für Maß.zip" in done.out
    assert "Left out: texts" in done.out
    assert [path.name for path in (tmp_path / "given").iterdir()] == ["Maß für Maß.zip"]
    zipfile.ZipFile(tmp_path / "given" / "Maß für Maß.zip").extractall(tmp_path)
    [note] = bundle_notes([written, tmp_path / "Maß für Maß"])
    assert "is a bundle of a run that was measured elsewhere" in note
    for arguments, said in (
        (["show", "Maß für Maß"], "texts were taken out"), (["report", ".", "--bundle"], "is not a run folder"),
        (["report", written, written, "--bundle"], "A bundle is of one run"),
    ):
        found = kvbench(*arguments, cwd=tmp_path)
        assert (found.code, found.out) == (2, ""), found
        assert said in found.err
    assert not list(tmp_path.glob("*.zip"))
