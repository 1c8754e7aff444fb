"""Questions about long contexts: answers, evidence and losses are those of a loop written here."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.api.compress import compress
from kvbench.data.documents import load_corpus
from kvbench.data.samples.needles import Needles
from kvbench.data.samples.scoring import contains_all
from kvbench.data.tasks import load_task
from kvbench.methods import kept
from kvbench.models.loading import load_model
from kvbench.models.references import assets, resolve_model
from kvbench.protocols.answer import AnswerProtocol
from kvbench.protocols.pieces import Piece, make_tokenizer
from kvbench.store.answer_records import AnswerRecord
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell
from tests.helpers.command import Call, refused

METHODS = ["full", "knorm", "snapkv:window=8", "sinks", "refreshkv", "kivi", "local-tuned"]
RUN = ["run", "--task", "kv-retrieval", "--limit", "2", "--set", "length=560", "--set", "stop=line", "--no-baselines",
       "--threads", "1", "--ratio", "0.5"]
OPTIONS = {"length": "560", "samples": "20", "template": "auto", "stop": "line", "chunk": "64", "bos": "auto"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of a task with four questions per context, hidden and known."""
    from tests.helpers.command import kvbench

    folder = tmp_path_factory.mktemp("answers")
    methods = [part for method in METHODS[1:] for part in ("--method", method)]
    found = kvbench(*RUN, *methods, "--out", folder / "run", "--json", cwd=folder)
    assert found.code == 0, found.err
    (folder / "rows.json").write_text(found.out)
    return RunFolder(folder / "run")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_model(resolve_model("kvbench-tiny"), "cpu", "float32")


def pieces_of(loaded: Any, known: bool) -> dict[str, tuple[Piece, ...]]:
    options = {**OPTIONS, **({"question": "known"} if known else {})}
    task = load_task("kv-retrieval")
    protocol = AnswerProtocol.resolve(task, options, 1024, "kvbench-tiny")
    found = protocol.pieces(load_corpus(task, None).documents, make_tokenizer(loaded.tokenizer, "auto"), 0, False)
    return {document.id: cut.pieces for document, cut in (next(found), next(found))}


def in_block(loaded: Any, cell: Cell) -> Any:
    adapter = None if cell.adapter is None else assets() / "adapters" / f"kvbench-tiny-{cell.method}"
    own = {"window": 8} if "window" in cell.variant else {}
    return compress(loaded.model, cell.method, cell.ratio_asked, adapter=adapter, **own)


def test_answers_are_those_of_a_compressed_context_that_is_asked(measured: RunFolder, loaded: Any) -> None:
    pieces = {known: pieces_of(loaded, known) for known in (False, True)}
    for cell in measured.cells():
        known = cell.options.get("question") == "known"
        for name, record in measured.answers(cell).items():
            asked = list(zip(pieces[known][name], record.answers, strict=True))
            with in_block(loaded, cell) as run:
                for piece, answer in asked[:: 3 if known else 1]:  # each has a context of its own there
                    assert piece.asked is not None
                    ids = torch.tensor([piece.ids])
                    context = run.prefill(ids[:, : piece.context], new_tokens=80)
                    out = run.ask(
                        context, ids[:, piece.context :], max_new_tokens=piece.asked.new_tokens, do_sample=False,
                        eos_token_id=1 << 30, pad_token_id=0,
                    )[0].tolist()
                    assert out[: len(answer.ids)] == list(answer.ids), (cell.label, name)
                    text = loaded.tokenizer.decode(out).lstrip("\n").split("\n")[0]
                    assert answer.text == text
                    assert answer.score == contains_all(text, piece.asked.references)
            lengths = [piece.context for piece in pieces[known][name]]
            assert record.contexts == (4 if known else 1)
            assert record.raw == (sum(lengths) if known else lengths[0])
            if cell.method in ("knorm", "sinks"):
                assert record.held == sum(kept(n, Fraction(1, 2)) for n in (lengths if known else lengths[:1]))


def test_evidence_is_where_it_was_put(measured: RunFolder, loaded: Any) -> None:
    pieces = pieces_of(loaded, False)
    for cell in (cell for cell in measured.cells() if "question" not in cell.options):
        for name, record in measured.answers(cell).items():
            first = pieces[name][0]
            assert first.asked is not None
            assert first.asked.spans is not None
            evidence = sorted({
                place for kind, start, stop in first.asked.spans if kind == "evidence" for place in range(start, stop)
            })
            said = loaded.tokenizer.decode([first.ids[place] for place in evidence])
            assert all(piece.asked is not None and piece.asked.references[0] in said for piece in pieces[name])
            if cell.method == "kivi":
                assert record.survival is None
                continue
            assert record.survival is not None
            assert len(record.survival) == 6
            assert {len(layer) for layer in record.survival} == {2}
            if cell.method in ("full", "refreshkv"):
                assert {share for layer in record.survival for share in layer} == {1.0}
            if cell.method == "sinks":  # the first four, and the last of what is kept
                n, keep = first.context, record.held
                held = [place for place in evidence if place < 4 or place >= n - keep + 4]
                assert record.survival[0][0] == pytest.approx(len(held) / len(evidence), abs=1e-4)
            if cell.method == "knorm":
                with torch.no_grad():
                    cache = loaded.model(torch.tensor([first.ids[: first.context]]), use_cache=True).past_key_values
                norms = cache.layers[2].keys[0, 1].norm(dim=-1)
                lowest = set(norms.topk(record.held, largest=False).indices.tolist())
                assert record.survival[2][1] == pytest.approx(len(lowest & set(evidence)) / len(evidence), abs=1e-4)
            assert record.spans is not None
            assert record.spans["evidence"][0] == len(evidence)
            assert sum(count for count, _ in record.spans.values()) == first.context


def test_rows_are_means_over_samples_and_losses_against_full(measured: RunFolder) -> None:
    rows = json.loads((measured.path.parent / "rows.json").read_text())["rows"]
    cells = [cell for cell in measured.cells() if "question" not in cell.options]
    full = next(measured.answers(cell) for cell in cells if cell.method == "full")
    for cell in cells:
        records: dict[str, AnswerRecord] = measured.answers(cell)
        mine = {
            row["metric"]: row for row in rows
            if row["method"] == cell.method and row["params"].get("question", "hidden") == "hidden"
        }
        scores = [sum(answer.score for answer in record.answers) / 4 for record in records.values()]
        assert mine["answer_accuracy"]["value"] == pytest.approx(sum(scores) / 2)
        assert mine["answer_accuracy"]["n"] == 2
        if cell.method != "full":
            written, theirs = (
                sum(len(answer.ids) for record in some.values() for answer in record.answers)
                for some in (records, full)
            )
            assert mine["answer_length"]["value"] == pytest.approx(written / theirs)
        assert mine["answer_accuracy"]["params"]["under_floor"] is True  # this model solves none of it


def test_more_samples_only_add(measured: RunFolder, called: Call) -> None:
    before = {cell.key: measured.answers(cell) for cell in measured.cells()}
    methods = [part for method in METHODS[1:] for part in ("--method", method)]
    found = called([*[part if part != "2" else "3" for part in RUN], *methods, "--wide", "--out", measured.path])
    assert found.code == 0, found.err
    after = RunFolder(measured.path)
    for cell in after.cells():
        records = after.answers(cell)
        assert len(records) == 3
        assert {name: records[name] for name in before[cell.key]} == before[cell.key]
    assert "question known: accuracy of the answers" in found.out
    assert "does not solve the task" in found.out


def test_runs_are_reported_and_compared(measured: RunFolder, called: Call, tmp_path: Path) -> None:
    found = called(["report", measured.path, "--out", tmp_path / "report"])
    assert found.code == 0, found.err
    assert (tmp_path / "report" / "figures" / "evidence_survival-removal.png").is_file()
    table = (tmp_path / "report" / "tables" / "kv-retrieval.md").read_text()
    assert "accuracy" in table
    assert "evidence" in table
    pair = called(["compare", f"{measured.path}:knorm", f"{measured.path}:sinks", "--json"])
    assert pair.code == 0, pair.err
    rows = [row for row in pair.document["rows"] if row["metric"] == "answer_accuracy" and not row["params"]["bin"]]
    cells = {cell.method: cell for cell in measured.cells() if "question" not in cell.options}
    mean = {
        name: sum(sum(answer.score for answer in record.answers) / 4 for record in records.values()) / len(records)
        for name in ("knorm", "sinks") for records in [measured.answers(cells[name])]
    }
    [hidden] = [row["delta"] for row in rows if row["params"].get("question") != "known"]
    assert hidden == pytest.approx(mean["sinks"] - mean["knorm"])


CHATML = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}{{ '<|assistant|>\\n' }}"


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_are_the_parts_of_the_sample(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str | None, known: bool
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    protocol = AnswerProtocol(
        64, "auto", "needles", known, 700, True, "end", "apart", recipe=Needles("noise"), samples=3
    )
    document, cut = next(protocol.pieces([load_document()], make_tokenizer(tiny_tokenizer, "auto"), 5, False))
    [piece] = cut.pieces
    assert piece.asked is not None
    text = tiny_tokenizer.decode(piece.ids)
    begins, ends = ("<|user|>\n", "\n<|assistant|>\n") if template else ("", " ")
    assert text.startswith(f"{begins}A special magic number is hidden")
    assert f"mentioned in the provided text?{ends}The special magic number for" in text
    assert text.endswith("mentioned in the provided text is")
    assert 700 - 40 < len(piece.ids) + piece.asked.new_tokens <= 700
    before = tiny_tokenizer.decode(piece.ids[: piece.context])
    if known:
        assert piece.context == len(piece.ids) - 1
    else:
        assert before.rstrip().endswith((".", "There and back again."))
        assert "What is the special" not in before
    assert document.id == "needles-5-000"


def load_document() -> Any:
    from kvbench.data.documents import embedded_documents

    return embedded_documents()[0]


def test_every_task_is_made_for_a_model(loaded: Any) -> None:
    tokenizer = make_tokenizer(loaded.tokenizer, "auto")
    for path in sorted((Path(__file__).parents[2] / "tasks").glob("*.toml")):
        task = load_task(path.stem)
        if task.kind != "answer" or task.corpus.hub is not None:
            continue
        protocol = AnswerProtocol.resolve(task, {**OPTIONS, "length": "1024"}, 1024, "kvbench-tiny")
        _, cut = next(protocol.pieces(load_corpus(task, None).documents, tokenizer, 0, False))
        assert all(len(piece.ids) <= 1024 for piece in cut.pieces)
        assert protocol.made.partition(",")[0] == task.answer.recipe  # type: ignore[union-attr]


def test_bad_requests_are_sentences(called: Call, tmp_path: Path) -> None:
    asked = ["run", "--method", "knorm", "--ratio", "0.5", "--limit", "1", "--task", "passkey"]
    refused(called, [*asked, "--set", "length=9000"], "do not fit kvbench-tiny")
    refused(called, [*asked, "--set", "length=100"], "at least 256")
    refused(called, [*asked, "--set", "question=maybe"], "question")
    refused(called, [*asked, "--set", "stop=soon"], "stop")
    own = (Path(__file__).parents[2] / "tasks" / "passkey.toml").read_text()
    (tmp_path / "own.toml").write_text(own.replace('recipe = "passkey"', 'recipe = "passkeys"'))
    refused(called, [*asked[:-1], tmp_path / "own.toml"], "no recipe 'passkeys'")
    (tmp_path / "own.toml").write_text(own + 'options = { depth = 3 }\n')
    refused(called, [*asked[:-1], tmp_path / "own.toml"], "no option 'depth'")
    refused(called, [*asked[:-1], "ruler-cwe", "--set", "length=300"], "too few for a sample")


def test_masked_reading_answers_as_removal_does(tmp_path: Path, called: Call) -> None:
    texts = []
    for execution in ("streamed", "onepass"):
        found = called([
            "run", "--task", "passkey", "--limit", "1", "--set", "length=300", "--set", "question=hidden",
            "--no-baselines", "--method", "local", "--ratio", "0.5", "--execution", execution, "--out",
            tmp_path / execution,
        ])
        assert found.code == 0, found.err
        folder = RunFolder(tmp_path / execution)
        texts.append([[r.answers[0].ids for r in folder.answers(cell).values()] for cell in folder.cells()])
    assert texts[0] == texts[1]
