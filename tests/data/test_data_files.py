"""Text that people have: every kind of file is read as its plain twin, or refused with a sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pytest

from kvbench.data.dialogues import read_turns
from kvbench.data.documents import Corpus, load_corpus
from kvbench.data.tasks import load_task
from kvbench.errors import UserError
from kvbench.execution.job import Job
from kvbench.store.folder import RunFolder
from kvbench.store.records import Cell
from kvbench.training.data import load_stream
from kvbench.training.held_out import HeldOut
from tests.helpers.command import RUN, Call, refused
from tests.helpers.corpora import corpus, lines_of, written

ROWS = [{"id": f"r{i}", "text": f'The {i}th "mill",\nby the bridge; caf\u00e9.\n\n\tAn otter.\n'} for i in range(5)]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return written(tmp_path / "plain.jsonl", lines_of(ROWS))


# --- line ends ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("end", ["\r\n", "\r"])
@pytest.mark.parametrize("task", ["minidocs", "books", "online-text"])
def test_every_line_end_gives_the_documents_of_the_plain_one(tmp_path: Path, end: str, task: str) -> None:
    book = "".join(f"Paragraph {i} of a book\nin two lines.\n\n" for i in range(2000))
    rows = [{"id": "a", "text": book}, {"id": "b", "text": " = Not a title\n"}]
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("id", "text"), *(row.values() for row in rows)])
    for name, content in {"t.txt": book, "t.jsonl": lines_of(rows), "t.csv": table.getvalue()}.items():
        ended = content.replace("\n", end)
        if name == "t.jsonl":
            ended = ended.replace("\\n", json.dumps(end)[1:-1])
        found = corpus(written(tmp_path / "ended" / name, ended), task)
        assert found.hash == corpus(written(tmp_path / "plain" / name, content), task).hash
        assert found.documents[0].text.startswith("Paragraph 0 of a book\nin two lines.\n\n")
        if task == "books":
            assert all(document.text.endswith("\n\n") for document in found.documents if document.group != "b")


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_line_ends_in_turns_and_in_training(tmp_path: Path, end: str, tiny_tokenizer: Any) -> None:
    rows = [{"turns": [f"One\nline {i}", "two"], "answer": "three\nand four"} for i in range(3)]
    ended = lines_of(rows).replace("\\n", json.dumps(end)[1:-1]).replace("\n", end)
    found, plain = written(tmp_path / "e.jsonl", ended), written(tmp_path / "p.jsonl", lines_of(rows))
    assert read_turns(found) == read_turns(plain)
    text = "A line.\nAnother.\n\n" * 50
    streams = [
        load_stream([written(tmp_path / name, content)], tokenizer=tiny_tokenizer, least=10).ids.tolist()
        for name, content in (("e.txt", text.replace("\n", end)), ("p.txt", text))
    ]
    assert streams[0] == streams[1] == tiny_tokenizer(text, add_special_tokens=False).input_ids


# --- kinds of files ----------------------------------------------------------------------------------------------

def zst(raw: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(raw, asbytes=True))


def made_by_others(path: Path) -> None:
    """The rows as pandas writes them."""
    frame = pd.DataFrame(ROWS)
    match path.name.lower().split(".")[1]:
        case "csv":
            frame.to_csv(path, index=False, compression=None)
        case "tsv":
            frame.to_csv(path, index=False, sep="\t", compression=None)
        case "parquet":
            frame.to_parquet(path, index=False)
        case "json":
            frame.to_json(path, orient="records", compression=None)
        case _:
            frame.to_json(path, orient="records", lines=True, compression=None)
    packs = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}
    path.write_bytes(packs.get(path.suffix.lower(), bytes)(path.read_bytes()))


FILES = [
    "d.jsonl", "d.ndjson", "d.json", "d.csv", "d.tsv", "d.parquet", "d.jsonl.gz", "d.jsonl.bz2", "d.jsonl.xz",
    "d.jsonl.zst", "d.csv.zst", "d.json.gz", "d.parquet.xz", "D.JSONL.GZ",
]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, plain: Path, name: str) -> None:
    made_by_others(tmp_path / name)
    assert corpus(tmp_path / name) == Corpus(corpus(plain).documents, corpus(plain).hash, str(tmp_path / name))


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("d.jsonl", "d.ndjson", "d.csv", "d.tsv")])
def test_a_torn_file_is_refused(called: Call, tmp_path: Path, name: str) -> None:
    made_by_others(tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    for size in (len(whole) - 3, len(whole) // 2, 6):
        (tmp_path / name).write_bytes(whole[:size])
        refused(called, [*RUN, "--task", "books", "--data", name], name)


@pytest.mark.parametrize(("name", "words"), [
    ("d.zip", "(.zip)"), ("d.jsonl.lz4", "(.jsonl.lz4)"), ("d.arrow", "(.arrow)"), ("d.gz", "(.gz)"),
    ("d", "ending."), ("d.pdf", ".parquet"),
])
def test_other_kinds_are_named(called: Call, tmp_path: Path, name: str, words: str) -> None:
    written(tmp_path / name, b"x")
    refused(called, [*RUN, "--task", "books", "--data", name], "no known ending", words, ".zst", "folder of .txt")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("d.csv", "id,text\na,fine\nb,torn, by a comma\n", ["line 3", "3 fields"]),
    ("d.csv", 'id,text\na,"two\nlines"\nb,"never closed\n', ["line 4", "malformed .csv"]),
    ("d.csv", "text,text\na,b\n", ['2 columns "text"']),
    ("d.tsv", "id\tbody\na\tb\n", ["line 2", 'no "text"', "it has: id, body"]),
    ("d.csv", "id;text\na;b\n", ["separated by semicolons", "would be: id, text", "Save it with commas"]),
    ("d.csv", "id;text\na;One, and two, and three.\n", ["separated by semicolons", "would be: id, text"]),
    ("d.csv", '"id";"text"\n"a";"b"\n', ["separated by semicolons", "would be: id, text"]),
    ("d.csv", "id;title\na;b\n", ["separated by semicolons", "would be: id, title"]),
    ("d.csv", "id\ttext, if any\ttext\na\tb\tc\n", ["separated by tabs", "Let its name end with .tsv."]),
    ("d.tsv", "id,text\na,b\n", ["read as separated by tabs", "separated by commas", "end with .csv."]),
    ("d.csv", "id|text\na|b\n", ["separated by vertical bars"]),
    ("d.csv", "id,note; text\na,b\n", ["line 2", 'no "text"', "it has: id, note; text"]),
    ("d.csv", "id,Text\na,b\n", ["line 2", 'no "text"', "Did you mean 'Text'?", "--column"]),
    ("d.jsonl", '{"id": 1, "texts": "a"}\n', ["line 1", "Did you mean 'texts'?"]),
    ("d.json", '[{"text": "a"},\n {"text": }]', ["line 2", "malformed JSON"]),
    ("d.json", '[{"text": "a"}, ["text"]]', ["row 2", 'no "text"']),
    ("d.json", "[" * 200_000, ["d.json", "nested too deeply"]),
    ("d.txt", "caf\u00e9".encode("utf-16"), ["binary", "UTF-16"]),
    ("d.txt", b"\xef\xbb\xbffine\nnot \xff", ["not UTF-8 (line 2, byte 12 of all)"]),
    ("d.parquet", b"PAR1 and no more PAR1", ["cannot be read"]),
    ("d.parquet", b"", ["is empty"]),
])
def test_damaged_files_of_other_kinds(
    called: Call, tmp_path: Path, name: str, content: str | bytes, words: list[str]
) -> None:
    refused(called, [*RUN, "--task", "books", "--data", written(tmp_path / name, content)], name, *words)


@pytest.mark.parametrize(("values", "words"), [
    ({"text": ["a", None]}, ["row 2", "null"]), ({"text": [b"a", b"b"]}, ["row 1", "bytes"]),
    ({"text": [1.5, 2.0]}, ["row 1", "a number"]), ({"id": [1.0, None], "text": ["a", "b"]}, []),
    ({"id": [[1], [2]], "text": ["a", "b"]}, ["row 1", '"id" is a list']), ({"body": ["a"]}, ["it has: body"]),
])
def test_rows_of_a_parquet_file(tmp_path: Path, values: dict[str, Any], words: list[str]) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(values), tmp_path / "d.parquet")
    if not words:
        assert [document.id for document in corpus(tmp_path / "d.parquet").documents] == ["1.0", "None"]
        return
    with pytest.raises(UserError) as refusal:
        corpus(tmp_path / "d.parquet")
    assert all(word in refusal.value.message for word in words), refusal.value.message


def test_a_folder_of_plain_texts(called: Call, tmp_path: Path) -> None:
    shelf = tmp_path / "shelf"
    texts = {"b.txt": "Second.", "a/z.txt": "First.", "c.TXT": "\n", "._b.txt": "\0", ".git/x.txt": "no"}
    for name, text in texts.items():
        written(shelf / name, text)
    written(shelf / "d.txt.gz", gzip.compress(b"Third.\r\n"))
    written(shelf / "notes.md", b"\xff")
    found = corpus(shelf).documents
    assert [(d.id, d.group, d.text) for d in found] == [
        ("a/z.txt", "a/z.txt", "First."), ("b.txt", "b.txt", "Second."), ("d.txt.gz", "d.txt.gz", "Third.\n"),
    ]
    written(shelf / "e.txt", b"\xff")
    refused(called, [*RUN, "--task", "books", "--data", "shelf"], "e.txt", "not UTF-8")
    written(tmp_path / "other" / "notes.md", "x")
    refused(called, [*RUN, "--task", "books", "--data", "other"], "folder other cannot be read", "no .txt")


@pytest.mark.parametrize(("ending", "pack"), [
    (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zst),
])
def test_packed_streams_are_read_to_the_end_or_refused(
    tmp_path: Path, ending: str, pack: Callable[[bytes], bytes]
) -> None:
    first, second = (pack(lines_of(rows).encode()) for rows in (ROWS[:2], ROWS[2:]))
    plain = corpus(written(tmp_path / "plain.jsonl", lines_of(ROWS)))
    path = tmp_path / f"d.jsonl{ending}"
    assert corpus(written(path, first + second)).hash == plain.hash
    bad = bytes([second[0] ^ 1]) + second[1:]  # one bit of what says that a stream begins
    for more in (bad, second[:-1], b"junk"):
        written(path, first + more)
        with pytest.raises(UserError, match="cannot be read"):
            corpus(path)


@pytest.mark.parametrize(("zeros", "is_legal"), [(4, True), (8, True), (3, False)])
def test_padding_between_xz_streams(tmp_path: Path, zeros: int, is_legal: bool) -> None:
    parts = [lzma.compress(lines_of(rows).encode()) + b"\0" * zeros for rows in (ROWS[:2], ROWS[2:])]
    path = written(tmp_path / "d.jsonl.xz", b"".join(parts))
    if is_legal:
        assert len(corpus(path).documents) == len(ROWS)
        return
    with pytest.raises(UserError, match="cannot be read"):
        corpus(path)


def test_a_folder_that_cannot_be_read_is_not_left_out(
    called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "shelf" / "a.txt", "First.")
    written(tmp_path / "shelf" / "locked" / "b.txt", "Second.")
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="shelf/locked cannot be read: Permission denied"):
        corpus(tmp_path / "shelf")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere" / "a.txt", "First.")
    written(tmp_path / "shelf" / "b.txt", "Second.")
    (tmp_path / "shelf" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "shelf" / "same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "shelf")
    assert [document.id for document in corpus(tmp_path / "shelf").documents] == ["b.txt", "link/a.txt"]


def test_what_is_no_file_is_refused_and_not_waited_for(called: Call, tmp_path: Path) -> None:
    (tmp_path / "shelf").mkdir()
    for name in ("d.jsonl", "d.txt", "d", "shelf/d.txt"):
        os.mkfifo(tmp_path / name)
    for name in ("d.jsonl", "d.txt", "d", "shelf"):
        refused(called, [*RUN, "--task", "books", "--data", name], "no regular file", "to a file first")
    train = ["train", "--method", "sentinel", "--out", "out", "--data"]
    refused(called, [*train, "d.jsonl"], "no regular file")


@pytest.mark.parametrize("name", ["d.txt", "shelf"])
def test_a_column_called_id_of_plain_text_is_the_text(tmp_path: Path, name: str) -> None:
    written(tmp_path / name / "d.txt" if name == "shelf" else tmp_path / name, "A mill by the bridge.")
    assert [document.text for document in corpus(tmp_path / name, column="id").documents] == ["A mill by the bridge."]


def test_turns_come_from_other_kinds_too(tmp_path: Path) -> None:
    rows = [{"id": "a", "turns": ["x", "y"], "answer": "z"}]
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    plain = read_turns(written(tmp_path / "t.jsonl", lines_of(rows)))
    assert plain == read_turns(tmp_path / "t.parquet") == [{"id": "a", "turns": ["x", "y", "z"]}]
    with pytest.raises(UserError, match='line 2: the row has no "turns"'):
        read_turns(written(tmp_path / "t.csv", "turns,answer\nx,y\n"))


# --- what JSON can do --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("row", "words"), [
    ('{"text": "half \\ud83d of it"}', ["surrogate", "\\ud83d"]),
    ('{"id": "\\udfff", "text": "a"}', ['"id"', "surrogate"]),
    ('{"text": "a", "n": %s}' % ("7" * 5000), ["4300 digits"]),
    ('{"text": "a", "n": %s}' % ("[" * 200_000), ["nested too deeply"]),
    ('{"text": "a", "n": %s}' % ('{"a":' * 200_000), ["nested too deeply"]),
    ("[" * 200_000 + "]" * 200_000, ["nested too deeply"]),
    ('{"id": NaN, "text": "a"}', ['"id" is nan']), ('{"id": 1e999, "text": "a"}', ['"id" is inf']),
    ('{"id": ["a"], "text": "a"}', ['"id" is a list']), ('{"id": {}, "text": "a"}', ['"id" is an object']),
    ('["text", "a"]', ['no "text"']), ('"text"', ['no "text"']), ("null", ['no "text"']), ("NaN", ['no "text"']),
    ('{"text": null}', ["null"]), ('{"text": ["a"]}', ["a list"]), ('{"body": "a", "id": 1}', ["it has: body, id"]),
    ('{"text": "a"} {"text": "b"}', ["malformed JSON"]), ('{"text": "a\tb"}', ["malformed JSON"]),
    ("{'text': 'a'}", ["malformed JSON"]),
])
def test_rows_that_json_allows_or_not(called: Call, tmp_path: Path, row: str, words: list[str]) -> None:
    path = written(tmp_path / "d.jsonl", '{"text": "fine"}\n' + row + "\n")
    error = refused(called, [*RUN, "--task", "books", "--data", path], f"{path}, line 2", *words)
    assert len(error) < 600


@pytest.mark.parametrize("turn", ["half \\ud83d", "\\ud83d\\ude00"])
def test_surrogates_in_turns(tmp_path: Path, turn: str) -> None:
    path = written(tmp_path / "t.jsonl", f'{{"turns": ["a", "{turn}"], "answer": "c"}}\n')
    if turn.startswith("half"):
        with pytest.raises(UserError, match="line 1: a turn holds half"):
            read_turns(path)
    else:
        assert read_turns(path)[0]["turns"][1] == "\U0001f600"


def test_a_separator_in_a_text_is_hashed(tmp_path: Path) -> None:
    """Two different corpora whose ids and texts are the same, end to end."""
    one = written(tmp_path / "1.jsonl", lines_of([{"id": "a", "text": "b\0c\0d"}]))
    two = written(tmp_path / "2.jsonl", lines_of([{"id": "a", "text": "b"}, {"id": "c", "text": "d"}]))
    assert corpus(one).hash != corpus(two).hash


def test_what_in_a_run_folder_cannot_be_read_is_said(
    called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell(
        method="sinks", ratio_asked="0.5", role="method", options={}, adapter=None, adapter_hash=None, model="m",
        revision=None, model_hash="h", dtype="float32", device="cpu", task="t", task_version=1, data_hash="d",
        protocol="block", execution="streamed", seed=0, position_rule="absolute",
    )
    folder = RunFolder(tmp_path / "run")
    folder.open_cell(cell, "one")
    written(folder.cell_folder(cell) / "signature.txt", b"\xff")
    written(folder.cell_folder(cell) / "records.jsonl", b"")
    folder.open_cell(cell, "one")  # another signature than it can read: laid aside
    assert not (folder.cell_folder(cell) / "records.jsonl").exists()
    (folder.cell_folder(cell) / "records.jsonl").mkdir()
    with pytest.raises(UserError, match=r"records.jsonl cannot be read: Is a directory"):
        folder.records(cell)
    (tmp_path / "run" / "run.json").mkdir()
    refused(called, ["report", "run"], "run.json cannot be read: Is a directory")


@pytest.mark.parametrize("value", ["[" * 200_000, "7" * 5000])
def test_damaged_folders_of_our_own(called: Call, tmp_path: Path, value: str) -> None:
    content = f'{{"cells": {value}}}'
    written(tmp_path / "run" / "run.json", content)
    refused(called, ["report", "run"], "run.json is damaged")
    refused(called, [*RUN, "--out", "run"], "run.json is damaged")
    written(tmp_path / "adapter" / "card.json", content)
    refused(called, ["run", "--method", "sentinel", "--adapter", "adapter"], "card.json is damaged")
    for name in ("kvbench.toml", "own.toml"):
        written(tmp_path / name, f"x = {value}")
    refused(called, [*RUN, "--config", "kvbench.toml"], "kvbench.toml is not valid TOML")
    (tmp_path / "kvbench.toml").unlink()
    refused(called, [*RUN, "--task", "own.toml"], "own.toml is not valid TOML")


# --- columns -----------------------------------------------------------------------------------------------------

def test_a_column_of_another_name_is_no_part_of_a_key(called: Call, tmp_path: Path) -> None:
    rows = [{"id": row["id"], "text": 9 * row["text"]} for row in ROWS]  # long enough to be measured
    plain = written(tmp_path / "plain.jsonl", lines_of(rows))
    frame = pd.DataFrame([{"id": row["id"], "text": "wrong", "body": row["text"]} for row in rows])
    frame.to_csv("o.csv", index=False)
    frame.to_parquet("o.parquet")
    frame.to_json("o.jsonl", orient="records", lines=True)
    keys = []
    for name, column in ((plain.name, "text"), ("o.jsonl", "body"), ("o.csv", "body"), ("o.parquet", "body")):
        for command in ("run", "sweep"):
            data = ["--task", "books", "--data", name, "--column", column]
            found = called([command, *RUN[1:], *data, "--dry-run", "--json"])
            assert found.code == 0, found.err
            keys.append({(cell["method"], cell["key"]) for cell in found.document["cells"]})
    assert all(found == keys[0] for found in keys)


def test_the_child_reads_the_same_column(tmp_path: Path) -> None:
    job = Job((), "", {}, "pages.csv", 1, 1, column="body")
    assert Job.from_json(job.to_json()) == job


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "--task", "books", "--data", "plain.jsonl"], ["line 1", 'no "body"', "it has: id, text", "--column"]),
    (["sweep", "--task", "books", "--data", "plain.jsonl"], ["line 1", 'no "body"']),
    (["run", "--task", "minidocs"], ["--column", "embedded"]),
    (["run", "--task", "online"], ["--column", "turns and an answer"]),
    (["run", "--task", "online", "--data", "plain.jsonl"], ["--column", "turns and an answer"]),
    (["train", "--method", "sentinel", "--out", "x", "--data", "plain.jsonl"], ["line 1", 'no "body"']),
    (["train", "base", "--out", "x", "--data", "plain.jsonl"], ["line 1", 'no "body"']),
])
@pytest.mark.usefixtures("plain")
def test_a_missing_column(called: Call, arguments: list[str], words: list[str]) -> None:
    refused(called, [*arguments, "--column", "body"], *words)
    if "plain.jsonl" in arguments and "online" not in arguments:
        refused(called, [*arguments, "--column", "TXT"], words[0], "Did you mean 'text'?")


def test_columns_of_training_texts(tmp_path: Path, tiny_tokenizer: Any) -> None:
    text = "The mill by the bridge had nine stones. " * 20
    rows = written(tmp_path / "d.jsonl", lines_of([{"body": text, "text": "no"}] * 2))
    plain = written(tmp_path / "d.txt", text)
    found = load_stream([rows, plain], tiny_tokenizer, 10, "body")
    assert found.ids.tolist() == tiny_tokenizer(text, add_special_tokens=False).input_ids * 3
    assert [source.get("column") for source in found.sources] == ["body", "body"]
    assert found.hash != load_stream([rows, plain], tiny_tokenizer, 10).hash
    blocks = HeldOut.from_file(rows, tiny_tokenizer, 64, column="body").blocks
    assert len(blocks) == 2


def test_training_on_a_folder(tmp_path: Path, tiny_tokenizer: Any) -> None:
    for name in ("b.txt", "a.txt"):
        written(tmp_path / "shelf" / name, f"The {name} of the mill. " * 20)
    found = load_stream([tmp_path / "shelf"], tiny_tokenizer, 10)
    assert tiny_tokenizer.decode(found.ids[:5]).startswith("The a.")
    (tmp_path / "shelf" / "b.txt").rename(tmp_path / "shelf" / "c.txt")
    assert load_stream([tmp_path / "shelf"], tiny_tokenizer, 10).hash != found.hash


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def loaded(*_: object, **__: object) -> Any:
        return datasets.Dataset.from_dict({"content": ["One\r\ntwo.", "Three."], "n": [1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    task = load_task("c4-gen")
    assert [(d.id, d.text) for d in load_corpus(task, None, "content").documents] == [
        ("00000", "One\ntwo."), ("00001", "Three."),
    ]
    with pytest.raises(UserError, match=r'no column "text" \(it has: content, n\)'):
        load_corpus(task, None)
    with pytest.raises(UserError, match="Did you mean 'content'"):
        load_corpus(task, None, "contents")
    with pytest.raises(UserError, match=r"row 0: .*a number"):
        load_corpus(task, None, "n")
