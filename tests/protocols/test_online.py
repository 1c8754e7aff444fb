"""The online protocol: chunks, queries and targets; its data; a run from end to end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kvbench.data.dialogues import demonstrations, profiles, read_turns
from kvbench.data.documents import Document, load_corpus
from kvbench.data.tasks import OnlineSpec, load_task
from kvbench.errors import UserError
from kvbench.models.references import assets
from kvbench.protocols.online import online_trials
from kvbench.protocols.pieces import Tokenizer
from tests.helpers.command import Outcome, kvbench

TALK = Document("d", "d", "", ("one fish", "two birds", "three horses", "four mice", "five cows"))


def trials(document: Document, tokenizer: Any, spec: OnlineSpec, bos: int | None = None) -> list[Any]:
    return [cut.pieces[0] for _, cut in online_trials([document], Tokenizer(tokenizer, bos), spec)]


def test_turns_are_chunks_then_a_query_then_the_target(tiny_tokenizer: Any) -> None:
    pieces = trials(TALK, tiny_tokenizer, OnlineSpec(steps=(1, 2, 3, 4)))
    assert [piece.bin for piece in pieces] == ["step=1", "step=2", "step=3"]  # step 4 has no target
    second = pieces[1]
    decode = tiny_tokenizer.decode
    assert decode(second.ids[: second.chunks[0]]) == "one fish"
    assert decode(second.ids[second.chunks[0] : second.context]) == "\n\ntwo birds"
    assert decode(second.ids[second.context : second.scored]) == "\n\nthree horses\n\n"
    assert decode(second.ids[second.scored :]) == "four mice"
    assert second.n_bytes == len("four mice")
    assert sum(second.chunks) == second.context


def test_the_last_turn_is_asked_at_every_step(tiny_tokenizer: Any) -> None:
    pieces = trials(TALK, tiny_tokenizer, OnlineSpec(steps=(1, 3), query="last", before_answer=" "))
    for piece in pieces:
        assert tiny_tokenizer.decode(piece.ids[piece.context : piece.scored]) == "\n\nfour mice"
        assert tiny_tokenizer.decode(piece.ids[piece.scored :]) == " five cows"
    assert [len(piece.chunks) for piece in pieces] == [1, 3]


def test_a_label_before_the_answer(tiny_tokenizer: Any) -> None:
    piece = trials(TALK, tiny_tokenizer, OnlineSpec(steps=(1,), query="last", before_answer="\nLabel: "))[0]
    assert tiny_tokenizer.decode(piece.ids[piece.context : piece.scored]) == "\n\nfour mice\nLabel:"
    assert tiny_tokenizer.decode(piece.ids[piece.scored :]) == " five cows"
    assert piece.n_bytes == len(" five cows")


def test_text_in_chunks_and_a_bos(tiny_tokenizer: Any) -> None:
    document = Document("t", "t", "The mill by the bridge was old and grey. " * 20)
    pieces = trials(document, tiny_tokenizer, OnlineSpec(steps=(1, 2, 50), query="text", segment=16), bos=1)
    assert [piece.chunks for piece in pieces] == [(16,), (16, 16)]
    assert pieces[1].ids[0] == 1
    assert pieces[1].scored == pieces[1].context == 32
    assert len(pieces[1].ids) == 48


def test_documents_without_turns_are_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="has no turns"):
        trials(Document("x", "x", "text"), tiny_tokenizer, OnlineSpec())


def test_dialogues() -> None:
    rows = [json.loads(line) for line in (assets() / "dialogues.jsonl").read_text(encoding="ascii").splitlines()]
    turns = [len(row["turns"]) + 1 for row in rows]
    assert len(rows) == 40
    assert 8 <= min(turns) <= max(turns) == 14
    assert sum(count == 14 for count in turns) >= 16
    assert len({row["id"] for row in rows}) == len({row["turns"][0].split()[0] for row in rows}) == 40
    assert all(5 <= len(turn.split()) <= 50 for row in rows for turn in (*row["turns"], row["answer"]))


@pytest.mark.parametrize("make", [profiles, demonstrations])
def test_synthetic_sets_are_fixed_and_can_be_answered(make: Callable[[], list[dict[str, Any]]]) -> None:
    rows = make()
    assert rows == make()
    assert len(rows) == 48
    assert len({json.dumps(row["turns"]) for row in rows}) == 48
    for row in rows:
        *shown, query, answer = row["turns"]
        assert len(shown) == 12
        assert query.endswith(" is")
        assert sum(f" is {answer}." in turn for turn in shown) in (6, 12)
        assert not any(turn.startswith(query) for turn in shown)
    assert max(Counter(row["turns"][-1] for row in rows).values()) < 24


@pytest.mark.parametrize(("line", "words"), [
    ('{"turns": ["a", "b"]}', "no \"turns\""), ('{"turns": [], "answer": "a"}', "no \"turns\""),
    ('{"turns": "a", "answer": "a"}', "no \"turns\""), ('{"turns": ["a"], "answer": " "}', "no \"turns\""),
    ("[1]", "no \"turns\""), ('{"turns": ["a"', "malformed JSON"),
])
def test_rows_of_another_kind_are_refused(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"turns": ["a", "b"], "answer": "c"}\n' + line + "\n")
    with pytest.raises(UserError, match=words) as refusal:
        read_turns(path)
    assert "line 2" in refusal.value.message


def test_every_online_task_has_documents() -> None:
    counts = {name: len(load_corpus(load_task(name), None).documents) for name in (
        "online", "online-text", "online-profiles", "online-demonstrations",
    )}
    assert counts == {"online": 40, "online-text": 48, "online-profiles": 48, "online-demonstrations": 48}


@pytest.mark.heavy
def test_a_run_by_time_step(tmp_path: Path) -> None:
    """All methods of the comparison on a few dialogues: entries, rows by step, the figure."""
    found = kvbench(
        "run", "--task", "online", "--method", "ccm-concat", "--method", "ccm-merge", "--method", "gist", "--method",
        "meanpool", "--method", "none", "--method", "full", "--limit", "2", "--out", "run", "--json", cwd=tmp_path,
    )
    assert found.code == 0, found.err
    ppl = [r for r in found.document["rows"] if r["metric"] == "ppl"]
    assert {r["method"] for r in ppl} == {"ccm-concat", "ccm-merge", "gist", "meanpool", "none", "full"}
    assert {r["ratio_asked"] for r in ppl} == {None}
    steps = {r["params"]["step"] for r in ppl}
    assert steps >= {None, 1, 2, 4, 6}
    held = {
        (r["method"], r["params"]["step"]): r["value"] / r["params"]["entry_bytes"]
        for r in found.document["rows"] if r["metric"] == "kv_bytes_logical"
    }
    for step in sorted(s for s in steps if s):
        assert held["ccm-concat", step] == held["gist", step] == held["meanpool", step] == 2 * step
        assert held["ccm-merge", step] == 2
        assert held["none", step] == 0
    curve = [r for r in found.document["rows"] if str(r["params"]["bin"]).startswith("since=")]
    assert {r["method"] for r in curve} == {"ccm-concat", "ccm-merge", "gist", "meanpool"}
    report = kvbench("report", "run", "--wide", cwd=tmp_path)
    assert report.code == 0
    assert "perplexity by time step" in report.out
    assert (tmp_path / "run" / "figures" / "memory-steps.png").stat().st_size > 10_000


def test_your_own_turns(called: Callable[[Sequence[str | Path]], Outcome], tmp_path: Path) -> None:
    rows = [{"turns": [f"turn {i} of {n}" for i in range(4)], "answer": "the end"} for n in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["run", "--task", "online", "--method", "meanpool"]
    found = called([*command, "--data", "mine.jsonl", "--json", "--out", "r"])
    assert found.code == 0, found.err
    assert {r["params"]["step"] for r in found.document["rows"] if r["metric"] == "ppl"} == {None, 1, 2}
    (tmp_path / "text.jsonl").write_text('{"text": "no turns"}\n')
    refused = called([*command, "--data", "text.jsonl", "--out", "s"])
    assert refused.code == 2
    assert '"turns"' in refused.err
