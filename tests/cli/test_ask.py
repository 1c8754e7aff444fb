"""``kvbench ask``: answers with the full cache and with a compressed one, side by side."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from kvbench.api.ask import split_ids
from kvbench.errors import UserError
from kvbench.methods import kept
from tests.helpers.command import Call, refused

TEXT = "The mill by the old bridge had nine flat stones, and an otter kept them. " * 12


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context.txt"
    path.write_text(TEXT)
    return path


def test_both_sides_are_answered_and_entries_are_removed(called: Call, context: Path) -> None:
    asked = ["ask", "--context", context, "--question", "Who kept them?", "--question", "How many stones?",
             "--new-tokens", "5", "--threads", "1"]
    found = called([*asked, "--ratio", "0.5", "--json"])
    assert found.code == 0, found.err
    document = found.document
    n = document["context_tokens"]
    assert document["full"]["entries"] == n
    assert document["compressed"]["entries"] == kept(n, Fraction(1, 2))
    assert document["realised"] == pytest.approx(1 - kept(n, Fraction(1, 2)) / n)
    assert len(document["full"]["answers"]) == len(document["compressed"]["answers"]) == 2
    nothing = called([*asked, "--ratio", "0", "--json"]).document
    assert nothing["compressed"]["answers"] == nothing["full"]["answers"] == document["full"]["answers"]
    shown = called([*asked, "--method", "sentinel"])
    assert "entries per layer and head" in shown.out
    assert "sentinel, 0.70 removed" in shown.out


def test_a_chat_compresses_all_that_was_said(
    called: Call, context: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    asked = ["ask", "--context", context, "--chat", "--new-tokens", "5", "--threads", "1", "--method", "knorm"]

    def said(*more: str) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("How many stones?\nAnd then?\n\nnever read\n"))
        return called([*asked, *more])

    turns = said("--ratio", "0.5", "--question", "Who kept them?", "--json").document["turns"]
    assert [turn["questions"] for turn in turns] == [["Who kept them?"], ["How many stones?"], ["And then?"]]
    for side in ("full", "compressed"):
        text = TEXT.strip()
        for turn in turns:
            before = tiny_tokenizer(text, add_special_tokens=False).input_ids
            found = turn[side]
            assert found["context_tokens"] == pytest.approx(len(before), abs=2)  # a token may cross the border
            n = found["context_tokens"]
            assert found["entries"] == (n if side == "full" else kept(n, Fraction(1, 2)))
            assert found["held"][0] > found["entries"]
            text += f"\n\n{turn['questions'][0]}\n{found['answers'][0]}"
    same = said("--ratio", "0", "--json").document["turns"]
    assert [turn["full"]["answers"] for turn in same] == [turn["compressed"]["answers"] for turn in same]
    shown = said("--ratio", "0.5").out
    assert shown.count("entries after the answer") == 2


def test_bad_requests_are_sentences(called: Call, context: Path, tmp_path: Path) -> None:
    asked = ["ask", "--context", context, "--question", "Who?"]
    refused(called, ["ask", "--context", tmp_path / "none.txt", "--question", "Who?"], "none.txt cannot be read")
    (tmp_path / "empty.txt").write_text(" \n")
    refused(called, ["ask", "--context", tmp_path / "empty.txt", "--question", "Who?"], "at least one token")
    refused(called, ["ask", "--context", context], "--question, or --chat")
    refused(called, [*asked, "--method", "snapvk"], "snapkv")
    refused(called, [*asked, "--method", "snapkv:widow=3"], "widow")
    refused(called, [*asked, "--ratio", "0.5", "--budget-tokens", "9"], "Leave one of them out")
    refused(called, [*asked, "--ratio", "1.5"], "outside")
    refused(called, [*asked, "--method", "sentinel", "--adapter", tmp_path], "adapter folder")


def test_a_chat_template_is_cut_behind_the_context(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    before, after = split_ids(tiny_tokenizer, TEXT, (), "Who?")
    whole = f"<|user|>{TEXT}\n\nWho?<|assistant|>"
    assert [*before, *after] == tiny_tokenizer(whole, add_special_tokens=False).input_ids
    assert tiny_tokenizer.decode(before) == f"<|user|>{TEXT}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0].content | upper }}")
    with pytest.raises(UserError, match="changes the context"):
        split_ids(tiny_tokenizer, TEXT, (), "Who?")


CHATML = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.mark.parametrize("question", ["a", "assistant", "user", "end", "Who kept it?"])
def test_a_question_that_is_also_in_the_template_is_found(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, question: str
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", CHATML)
    before, after = split_ids(tiny_tokenizer, "helpful", [("Who?", "an otter")], question)
    assert tiny_tokenizer.decode(before).endswith("an otter<|im_end|>\n<|im_start|>user\n")
    assert tiny_tokenizer.decode(after).strip() == f"{question}<|im_end|>\n<|im_start|>assistant"
    before, after = split_ids(tiny_tokenizer, "helpful", (), question)
    assert tiny_tokenizer.decode(before).endswith("<|im_start|>user\nhelpful")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="template of the tokenizer fails"):
        split_ids(tiny_tokenizer, "helpful", (), question)


def test_what_was_said_before_a_turn_fails_is_printed(
    called: Call, context: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["ask", "--context", context, "--chat", "--new-tokens", "2", "--json", "--threads", "1"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\n\xff\n"), "utf-8"))
    found = called(asked)
    assert (found.code, len(found.document["turns"])) == (2, 1)
    assert "cannot be read" in found.err
    refused(called, [*asked, "--question", " "], "empty")
