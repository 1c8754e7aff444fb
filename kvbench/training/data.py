"""Training text: files, concatenated into one stream of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.data.files import KNOWN, files_of
from kvbench.data.rows import TEXT, read_rows
from kvbench.errors import UserError
from kvbench.protocols.pieces import Tokenizer

STREAM_TOKENS = 24_000_000
"""Maximum number of tokens that are read; batches are sampled from anywhere in them."""


@dataclass(frozen=True)
class Stream:
    """Concatenated token ids of all documents, and their sources.

    Attributes:
        sources: name and hash of every file, and the column that was read if it is not ``text``.
    """

    ids: np.ndarray
    sources: tuple[dict[str, str], ...]

    @property
    def hash(self) -> str:
        """Hash of the files and columns, independent of the names of the files."""
        parts = (source["sha256"] + source.get("column", "") for source in self.sources)
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def load_stream(paths: Sequence[Path], tokenizer: Any, least: int, column: str = TEXT) -> Stream:
    """Read and tokenise files in order, up to :data:`STREAM_TOKENS`.

    Args:
        least: number of tokens that training needs at least.
        column: name of the text column in the files.

    Raises:
        UserError: no file, an unreadable one, or too little text.
    """
    if not paths:
        raise UserError("Training needs text.", f"Give --data FILE: {KNOWN}.")
    parts: list[np.ndarray] = []
    count, sources = 0, []
    for path in paths:
        rows = read_rows(path, column)
        read = {"file": path.name, "sha256": hash_of(path)}
        sources.append(read if column == TEXT else {**read, "column": column})
        for row in rows:
            if count >= STREAM_TOKENS:
                break
            ids = tokenizer(row["text"], add_special_tokens=False).input_ids
            parts.append(np.asarray(ids, dtype=np.int64))
            count += len(ids)
    if count < least:
        raise UserError(
            f"The training text has {count} tokens; at least {least} are needed.", "Give more --data."
        )
    return Stream(np.concatenate(parts), tuple(sources))


def encode_in_context(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text within another text, without what some tokenizers prepend to a text."""
    return list(Tokenizer(tokenizer, None).split(("a", text))[1].ids)


def hash_of(path: Path) -> str:
    """SHA-256 of a file; for a folder, of the names and hashes of its text files.

    Raises:
        UserError: it cannot be read.
    """
    if not path.is_dir():
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    found = [(file.relative_to(path).as_posix(), hash_of(file)) for file in files_of(path)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()
