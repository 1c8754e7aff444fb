"""Documents: loaded from the package, from a file, or from the Hugging Face hub; cut; hashed."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from kvbench.corpora.turns import SYNTHETIC, read_turns
from kvbench.errors import UserError

if TYPE_CHECKING:
    from kvbench.corpora.tasks import CorpusSpec, Task

_TITLE = re.compile(r"^ = [^=].*[^=] = $")


@dataclass(frozen=True)
class Document:
    """What is scored and stored.

    Attributes:
        id: unique within the corpus.
        group: the unit of resampling: the book, the article, or the document itself.
        turns: the turns of a dialogue, the answer last; empty for running text.
    """

    id: str
    group: str
    text: str
    turns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Documents in their fixed order, with the hash of the task and of all their texts."""

    documents: tuple[Document, ...]
    hash: str
    source: str


def load_corpus(task: Task, data: Path | None) -> Corpus:
    """All documents of a task, or of the user's own file cut in the task's way.

    Raises:
        UserError: the file or the hub cannot be read, or holds no text.
    """
    spec = task.corpus
    if spec.cut == "turns":
        return _load_turns(task, data)
    if data is not None:
        rows, source = read_rows(data), str(data)
    elif spec.embedded is not None:
        asset = files("kvbench").joinpath("assets", spec.embedded)
        rows, source = read_rows(Path(str(asset))), f"embedded {spec.embedded}"
    else:
        rows, source = hub_rows(spec), f"hub {spec.hub}"
    documents = tuple(_CUTS[spec.cut](rows, spec))
    if not documents:
        raise UserError(f"{source} holds no text.", "Give a file with at least one document.")
    return Corpus(documents, _digest(task, documents), source)


def embedded_documents(name: str = "minidocs.jsonl") -> tuple[Document, ...]:
    """The rows of an embedded file as documents, without a task to cut them by."""
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


def _digest(task: Task, documents: tuple[Document, ...]) -> str:
    digest = hashlib.sha256(task.model_dump_json(exclude_defaults=True).encode())
    for document in documents:
        digest.update(f"{document.id}\0{document.text}\0".encode())
        digest.update("".join(f"{turn}\0" for turn in document.turns).encode())
    return digest.hexdigest()[:16]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows with ``text`` (and ``id``) of a .jsonl or .txt file, plain or .gz.

    Raises:
        UserError: missing, empty, binary, not UTF-8, malformed JSON, or rows without text.
    """
    text = read_text(path)
    if not text.strip():
        raise UserError(f"The data file {path} is empty.", "Give a .jsonl or .txt file with text.")
    if ".jsonl" not in path.suffixes:
        return [{"id": path.name, "text": text}]
    rows: list[dict[str, str]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: malformed JSON ({error.msg}, column {error.colno}).",
                "Every line must be one JSON object.",
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(
                f'{path}, line {number}: the row has no "text" of type string.',
                'Every row must look like {"text": "..."}.',
            )
        rows.append({"id": str(row.get("id", f"{len(rows):05d}")), "text": row["text"]})
    return rows


def read_text(path: Path) -> str:
    if not {".jsonl", ".txt"} & set(path.suffixes):
        raise UserError(
            f"The data file {path} has no known ending.", "Known: .jsonl, .txt, and both with .gz."
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no data file {path}.", "Check the path given to --data.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"The data file {path} cannot be read: {error}.") from error
    if b"\0" in raw:
        raise UserError(f"The data file {path} is binary, not text (byte {raw.index(0)} is 0).")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"The data file {path} is not UTF-8 (byte {error.start}).", "Convert it to UTF-8."
        ) from None


def hub_rows(spec: CorpusSpec) -> list[dict[str, str]]:
    """The rows of a data set on the hub, as ``id`` and ``text``.

    Raises:
        UserError: it cannot be reached, or has no texts.
    """
    from datasets import load_dataset
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the sentence below says it once
    try:
        some = {spec.split: spec.files} if spec.files else None
        dataset = load_dataset(spec.hub, spec.config, split=spec.split, data_files=some)
    except Exception as error:  # the library raises a different type for each way to be offline
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"Cannot load {spec.hub} from the Hugging Face hub ({type(error).__name__}: {reason}).",
            "Check the network, or give a local copy with --data.",
        ) from error
    if "text" not in dataset.column_names:
        raise UserError(f"{spec.hub} has no column \"text\" (it has: {', '.join(dataset.column_names)}).")
    return [{"id": f"{i:05d}", "text": row["text"]} for i, row in enumerate(dataset)]


def _documents(rows: list[dict[str, str]], spec: CorpusSpec) -> Iterable[Document]:
    """Every row is a document and its own group."""
    return _unique(Document(row["id"], row["id"], row["text"]) for row in rows if row["text"].strip())


def _articles(rows: list[dict[str, str]], spec: CorpusSpec) -> Iterable[Document]:
    """WikiText rows joined into articles at `` = Title = `` rows; without titles, each row is one."""
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


def _passages(rows: list[dict[str, str]], spec: CorpusSpec) -> Iterable[Document]:
    """Books cut at paragraph ends into passages, taken round-robin over the books."""
    books = [
        [
            Document(f"{book.id}:{i:04d}", book.id, text)
            for i, text in enumerate(_paragraph_runs(book.text, spec.passage_chars))
        ]
        for book in _documents(rows, spec)
    ]
    return [p for turn in zip_longest(*books) for p in turn if p is not None]


def _paragraph_runs(text: str, size: int) -> Iterable[str]:
    """Consecutive pieces of at least ``size`` characters, ending with a paragraph if one ends near."""
    start = 0
    while start < len(text):
        end = text.find("\n\n", start + size)
        end = end + 2 if 0 <= end < start + 2 * size else start + size
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end


def _unique(documents: Iterable[Document]) -> Iterable[Document]:
    """Documents with ids made unique, so that no record can stand for two of them."""
    seen: dict[str, int] = {}
    for document in documents:
        count = seen[document.id] = seen.get(document.id, -1) + 1
        name = f"{document.id}~{count}" if count else document.id
        yield Document(name, name if count else document.group, document.text, document.turns)


_CUTS = {"document": _documents, "wikitext-articles": _articles, "passages": _passages}
