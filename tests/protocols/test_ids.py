"""No two documents are called the same, so that no record stands for two of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.helpers.corpora import corpus, lines_of, written

NAMES = st.sampled_from(["a", "a~1", "a~2", "a~1~1", "", "00001", "00001~1", "a:0000\n"])


def first_try(names: list[str]) -> list[str]:
    """Numbered by how often an id was there before, as ids were once made."""
    seen = [names[:i].count(name) for i, name in enumerate(names)]
    return [f"{name}~{count}" if count else name for name, count in zip(names, seen, strict=True)]


@given(st.lists(st.one_of(NAMES, st.none()), min_size=1, max_size=9))
@example(["a", "a", "a~1"])
@example(["00001", None, "00001~1"])
@example(["a", "a", "a~1", "a~1", "a~2", "a"])
def test_ids_are_unique_whatever_they_are_called(
    tmp_path_factory: pytest.TempPathFactory, ids: list[str | None]
) -> None:
    path = tmp_path_factory.getbasetemp() / "ids.jsonl"
    rows = [{"text": "x y " * 300} | ({} if name is None else {"id": name}) for name in ids]
    named = [f"{i:05d}" if name is None else name for i, name in enumerate(ids)]
    path.write_text(lines_of(rows))
    found = [document.id for document in corpus(path).documents]
    assert len(set(found)) == len(ids)
    for name, given_name in zip(found, named, strict=True):
        assert name == given_name or named.count(given_name) > 1, "a row whose id nobody else has keeps it"
    if len(set(first_try(named))) == len(ids):
        assert found == first_try(named), "where ids were unique they stay"
    passages = [document.id for document in corpus(path, "books").documents]
    assert len(set(passages)) == len(passages) >= len(ids)
    path.write_text(lines_of([{"turns": ["x"], "answer": "y", **row} for row in rows]))
    assert [document.id for document in corpus(path, "online").documents] == found


def test_the_three_rows_that_were_mixed(tmp_path: Path) -> None:
    rows = [{"id": name, "text": text} for name, text in (("a", "one"), ("a", "two"), ("a~1", "three"))]
    found = corpus(written(tmp_path / "d.jsonl", lines_of(rows)))
    assert {document.id: document.text for document in found.documents} == {"a": "one", "a~2": "two", "a~1": "three"}
