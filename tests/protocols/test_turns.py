"""Questions in turns: one session goes on from answer to answer, as a loop over transformers' own cache does."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kvbench.data.documents import load_corpus
from kvbench.data.tasks import load_task
from kvbench.methods import kept
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.protocols.answer import AnswerProtocol
from kvbench.protocols.pieces import make_tokenizer
from kvbench.store.folder import RunFolder
from tests.helpers.command import Call, kvbench, refused

RUN = [
    "run", "--task", "kv-retrieval", "--limit", "1", "--set", "length=1000", "--set", "turns=together",
    "--no-baselines", "--threads", "1", "--set", "question=hidden", "--method", "knorm", "--ratio", "0.5",
]
OPTIONS = {
    "length": "1000", "samples": "1", "template": "auto", "stop": "end", "turns": "together", "chunk": "64",
    "bos": "auto",
}


@torch.inference_mode()
def in_turns(model: Any, pieces: Any, ratio: Fraction | None) -> list[list[int]]:
    """Greedy answers of the model to all questions in one conversation, the context compressed by the norm of keys."""
    cache, first = DynamicCache(), pieces[0]
    model(torch.tensor([first.ids[: first.context]]), past_key_values=cache)
    if ratio is not None:
        keep = kept(first.context, ratio)
        for layer in cache.layers:
            lowest = layer.keys.norm(dim=-1).topk(keep, largest=False).indices.sort(-1).values[..., None]
            layer.keys = layer.keys.gather(-2, lowest.expand(-1, -1, -1, layer.keys.shape[-1]))
            layer.values = layer.values.gather(-2, lowest.expand(-1, -1, -1, layer.values.shape[-1]))
    place, answers = first.context, []
    end = model.generation_config.eos_token_id or model.config.eos_token_id
    unread: list[int] = []
    for number, piece in enumerate(pieces):
        question = list(piece.ids[piece.context :] if number == 0 else piece.asked.follow)
        ids, answer = [*unread, *question], []
        while len(answer) < piece.asked.new_tokens and (not answer or answer[-1] != end):
            out = model(
                torch.tensor([ids]), past_key_values=cache,
                position_ids=torch.arange(place, place + len(ids))[None],
            )
            place += len(ids)
            answer.append(int(out.logits[0, -1].argmax()))
            ids = answer[-1:]
        unread = [] if answer[-1] == end else answer[-1:]
        answers.append(answer[:-1] if answer[-1] == end else answer)
    return answers


def test_one_session_goes_on_from_answer_to_answer(tmp_path: Path) -> None:
    found = kvbench(*RUN, "--out", tmp_path / "run", cwd=tmp_path)
    assert found.code == 0, found.err
    folder = RunFolder(tmp_path / "run")
    loaded = load_model(resolve_model("kvbench-tiny"), "cpu", "float32")
    task = load_task("kv-retrieval")
    protocol = AnswerProtocol.resolve(task, OPTIONS, 1024, "kvbench-tiny")
    tokenizer = make_tokenizer(loaded.tokenizer, "auto")
    for document, cut in protocol.pieces(load_corpus(task, None).documents, tokenizer, 0, False):
        said = [loaded.tokenizer.decode(piece.asked.follow) for piece in cut.pieces if piece.asked is not None]
        assert all(piece.asked.references[0] not in text for piece, text in zip(cut.pieces, said, strict=True))  # type: ignore[union-attr]
        whole = len(cut.pieces[0].ids) + sum(len(p.asked.follow) for p in cut.pieces[1:])  # type: ignore[union-attr, arg-type]
        assert whole + 4 * 50 <= 1000
        for cell in folder.cells():
            record = folder.answers(cell)[document.id]
            ratio = Fraction(1, 2) if cell.method == "knorm" else None
            assert [list(answer.ids) for answer in record.answers] == in_turns(loaded.model, cut.pieces, ratio)


def test_a_question_follows_in_a_turn_of_the_chat(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{{ '<|assistant|>' }}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    protocol = AnswerProtocol.resolve(load_task("kv-retrieval"), OPTIONS, 1024, "kvbench-tiny")
    documents = load_corpus(load_task("kv-retrieval"), None).documents
    _, cut = next(protocol.pieces(documents, make_tokenizer(tiny_tokenizer, "auto"), 0, False))
    for piece in cut.pieces:
        assert piece.asked is not None
        assert piece.asked.follow is not None
        question = tiny_tokenizer.decode(piece.ids[piece.asked.asked_at :]).strip()
        said, end, prefix = question.partition("<|end|><|assistant|>")
        assert tiny_tokenizer.decode(piece.asked.follow) == f"<|end|><|user|>{said.strip()}{end}{prefix}"


def test_turns_are_one_session_though_a_question_shares_a_token_with_the_context(tmp_path: Path, called: Call) -> None:
    turns = [{"q": "re was a dog?", "a": "dog"}, {"q": " cat, was it?", "a": "cat"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"t": "It was dark in the forest, and the" * 9, "turns": turns}))
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\nversion = 1\nsummary = "x"\nkind = "questions"\nprotocols = ["answer"]\n[corpus]\nhub = "a/b"\n'
        'cut = "questions"\n[questions]\ncontext = "{t}"\nquestion = "{q}"\nreferences = "a"\nturns = "turns"\n'
        'scoring = "contains_any"\nnew_tokens = 4\n'
    )
    found = called([
        "run", "--task", tmp_path / "mine.toml", "--data", tmp_path / "rows.jsonl", "--method", "knorm", "--ratio",
        "0.5", "--set", "turns=together", "--no-baselines", "--out", tmp_path / "run",
    ])
    assert found.code == 0, found.err
    folder = RunFolder(tmp_path / "run")
    for cell in folder.cells():  # questions in turns are hidden
        [record] = folder.answers(cell).values()
        assert record.contexts == 1
        assert len(record.answers) == 2


def test_runs_in_turns_and_apart_are_not_mixed(tmp_path: Path, called: Call) -> None:
    for turns in ("apart", "together"):
        asked = [part if part != "turns=together" else f"turns={turns}" for part in RUN]
        assert called([*asked, "--set", "stop=line", "--out", tmp_path / turns]).code == 0
    asked = ["report", str(tmp_path / "apart"), str(tmp_path / "together"), "--out", str(tmp_path / "report")]
    refused(called, asked, "taken in different ways", "turns:together")


def test_known_questions_cannot_follow_answers(called: Call) -> None:
    asked = [part for part in RUN if part != "question=hidden"]
    asked.insert(asked.index("--method"), "question=both")
    refused(called, asked, "Add --set question=hidden")
