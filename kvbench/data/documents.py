"""Documents: rows of an embedded file, of a data file or of a Hugging Face data set, cut and hashed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.data.dialogues import SYNTHETIC, read_turns
from kvbench.data.files import read_records
from kvbench.data.rows import TEXT, Row, hub_records, hub_rows, id_of, read_rows
from kvbench.data.samples.sample import Sample
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.data.question_rows import QuestionRowsSpec
    from kvbench.data.tasks import CorpusSpec, Task

_TITLE = re.compile(r"^ = [^=].*[^=] = $")


@dataclass(frozen=True)
class Document:
    """A text that is scored.

    Attributes:
        id: unique within the corpus.
        group: unit of resampling: the book, the article, or the document itself.
        turns: turns of a dialogue, the answer last; empty for running text.
        sample: a context with questions about it, of which ``text`` is the context; None for text alone.
    """

    id: str
    group: str
    text: str
    turns: tuple[str, ...] = ()
    sample: Sample | None = None


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, the hash of the task and of all texts, and the source for messages."""

    documents: tuple[Document, ...]
    hash: str
    source: str


def load_corpus(task: Task, data: Path | None, column: str = TEXT) -> Corpus:
    """Load all documents of a task, or of the user's own file or folder, cut as the task says.

    Args:
        column: name of the column that holds the text, in the file or in the data set on the hub.

    Raises:
        UserError: the source cannot be read or holds no text, or a column was named for a source without columns.
    """
    spec = task.corpus
    columns = {"turns": "turns and an answer", "questions": "the columns that its file names"}
    if column != TEXT and (spec.cut in columns or (data is None and spec.hub is None)):
        what = columns.get(spec.cut, "what is embedded")
        raise UserError(
            f"--column names the text in --data or in a data set on the hub, and task {task.name!r} reads {what}.",
            "Leave it out, or give --data and one --task.",
        )
    if spec.cut == "turns":
        return _load_turns(task, data)
    if task.questions is not None:
        return _load_questions(task, task.questions, data)
    if data is not None:
        rows, source = read_rows(data, column), str(data)
    elif spec.embedded is not None:
        asset = files("kvbench").joinpath("assets", spec.embedded)
        rows, source = read_rows(Path(str(asset))), f"embedded {spec.embedded}"
    else:
        rows, source = hub_rows(spec, column), f"hub {spec.hub}"
    documents = tuple(_CUTS[spec.cut](rows, spec))
    if not documents:
        raise UserError(f"{source} holds no text.", "Give a file with at least one document.")
    return Corpus(documents, _digest(task, documents), source)


def embedded_documents(name: str = "minidocs.jsonl") -> tuple[Document, ...]:
    """The rows of an embedded file as documents, uncut."""
    rows = read_rows(Path(str(files("kvbench").joinpath("assets", name))))
    return tuple(Document(row["id"], row["id"], row["text"]) for row in rows)


def _load_turns(task: Task, data: Path | None) -> Corpus:
    spec = task.corpus
    if data is not None:
        rows, source = read_turns(data), str(data)
    elif spec.synthetic is not None:
        rows, source = SYNTHETIC[spec.synthetic](), f"synthetic {spec.synthetic}"
    else:
        assert spec.embedded is not None, "the task file is checked for this"
        asset = files("kvbench").joinpath("assets", spec.embedded)
        rows, source = read_turns(Path(str(asset))), f"embedded {spec.embedded}"
    documents = tuple(_unique(Document(row["id"], row["id"], "", tuple(row["turns"])) for row in rows))
    if not documents:
        raise UserError(f"{source} holds no turns.", "Give a file with at least one row.")
    return Corpus(documents, _digest(task, documents), source)


def _load_questions(task: Task, rules: QuestionRowsSpec, data: Path | None) -> Corpus:
    spec = task.corpus
    path = Path(str(files("kvbench").joinpath("assets", spec.embedded))) if spec.embedded and data is None else data
    if path is not None and (path.is_dir() or ".txt" in path.suffixes):
        raise UserError(
            f"{path} is plain text, and task {task.name!r} needs rows with columns "
            f"({', '.join(sorted(rules.columns))}).", "Give a .jsonl, .json, .csv or .parquet.",
        )
    records = hub_records(spec) if path is None else read_records(path, rules.columns)
    found = ((record, rules.sample(record)) for record in records)
    samples = [
        (id_of(record, number), sample) for number, (record, sample) in enumerate(found) if sample is not None
    ]
    source = f"hub {spec.hub}" if path is None else str(data or f"embedded {spec.embedded}")
    first: dict[str, str] = {}  # rows about one context are resampled together
    documents = tuple(_unique(
        Document(name, first.setdefault(sample.context, name), sample.context, sample=sample)
        for name, sample in samples
    ))
    if not documents:
        raise UserError(f"{source} holds no question for task {task.name!r}.", "Give a file with at least one row.")
    return Corpus(documents, _digest(task, documents), source)


def _digest(task: Task, documents: tuple[Document, ...]) -> str:
    digest = hashlib.sha256(task.model_dump_json(exclude_defaults=True).encode())
    for document in documents:
        questions = document.sample.questions if document.sample is not None else ()
        parts = (document.id, document.text, *document.turns, *map(repr, questions))
        digest.update("".join(f"{part}\0" for part in parts).encode())
        if any("\0" in part for part in parts):  # a part contains the separator, so hash lengths as well
            digest.update(f"{[len(part) for part in parts]}\0".encode())
    return digest.hexdigest()[:16]


def _documents(rows: list[Row], spec: CorpusSpec) -> Iterable[Document]:
    """Each row is a document and a group of its own."""
    return _unique(Document(row["id"], row["id"], row["text"]) for row in rows if row["text"].strip())


def _articles(rows: list[Row], spec: CorpusSpec) -> Iterable[Document]:
    """WikiText rows joined into articles at `` = Title = `` rows; without titles, each row is a document."""
    lines = list(chain.from_iterable(row["text"].rstrip("\n").split("\n") for row in rows))
    if not any(_TITLE.match(line) for line in lines):
        return _documents(rows, spec)
    articles: list[list[str]] = [[]]
    for line in lines:
        if _TITLE.match(line):
            articles.append([])
        articles[-1].append(line)
    texts = ["\n".join(part) + "\n" for part in articles if any(line.strip() for line in part)]
    return [Document(f"article-{i:03d}", f"article-{i:03d}", text) for i, text in enumerate(texts)]


def _passages(rows: list[Row], spec: CorpusSpec) -> Iterable[Document]:
    """Books cut into passages at paragraph ends, in round-robin order over the books."""
    books = [
        [
            Document(f"{book.id}:{i:04d}", book.id, text)
            for i, text in enumerate(_paragraph_runs(book.text, spec.passage_chars))
        ]
        for book in _documents(rows, spec)
    ]
    return [p for turn in zip_longest(*books) for p in turn if p is not None]


def _paragraph_runs(text: str, size: int) -> Iterable[str]:
    """Consecutive pieces of ``size`` to 2 ``size`` characters, cut at the next paragraph end if there is one."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + size)
        end = end + 2 if 0 <= end < start + 2 * size else start + size
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end


def _unique(documents: Iterable[Document]) -> Iterable[Document]:
    """The documents with unique ids, so that no record can belong to two of them.

    The first document with an id keeps it; later ones get ``x~1``, ``x~2``, skipping ids that are in use.
    """
    documents = list(documents)
    taken = {document.id for document in documents}
    numbers: dict[str, Iterator[int]] = {}
    for document in documents:
        if document.id not in numbers:
            numbers[document.id] = count(1)
            yield document
            continue
        name = next(name for n in numbers[document.id] if (name := f"{document.id}~{n}") not in taken)
        yield replace(document, id=name, group=name if document.group == document.id else document.group)


_CUTS = {"document": _documents, "wikitext-articles": _articles, "passages": _passages}
