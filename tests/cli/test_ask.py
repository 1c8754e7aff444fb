"""``kvbench ask``: answers with the full cache and with a compressed one, side by side."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from kvbench.api.ask import _parts
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


def test_bad_requests_are_sentences(called: Call, context: Path, tmp_path: Path) -> None:
    asked = ["ask", "--context", context, "--question", "Who?"]
    refused(called, ["ask", "--context", tmp_path / "none.txt", "--question", "Who?"], "none.txt cannot be read")
    (tmp_path / "empty.txt").write_text(" \n")
    refused(called, ["ask", "--context", tmp_path / "empty.txt", "--question", "Who?"], "at least one token")
    refused(called, [*asked, "--method", "snapvk"], "snapkv")
    refused(called, [*asked, "--method", "snapkv:widow=3"], "widow")
    refused(called, [*asked, "--ratio", "0.5", "--budget-tokens", "9"], "Leave one of them out")
    refused(called, [*asked, "--ratio", "1.5"], "outside")
    refused(called, [*asked, "--method", "sentinel", "--adapter", tmp_path], "adapter folder")


def test_a_chat_template_is_cut_behind_the_context(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", template)
    before, after = _parts(tiny_tokenizer, TEXT, "Who?")
    whole = f"<|user|>{TEXT}\n\nWho?<|assistant|>"
    assert [*before, *after] == tiny_tokenizer(whole, add_special_tokens=False).input_ids
    assert tiny_tokenizer.decode(before) == f"<|user|>{TEXT}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0].content | upper }}")
    with pytest.raises(UserError, match="changes the context"):
        _parts(tiny_tokenizer, TEXT, "Who?")
