"""Training text: files end to end as one stream of token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvbench.corpora.documents import read_rows
from kvbench.errors import UserError

STREAM_TOKENS = 24_000_000
"""Tokens that are read at most; batches are drawn from anywhere in them."""


@dataclass(frozen=True)
class Stream:
    """Token ids of all documents, end to end, and where they come from."""

    ids: np.ndarray
    sources: tuple[dict[str, str], ...]

    @property
    def hash(self) -> str:
        """Of the contents of all files, in order."""
        return hashlib.sha256("".join(source["sha256"] for source in self.sources).encode()).hexdigest()[:16]


def load_stream(paths: Sequence[Path], tokenizer: Any, least: int) -> Stream:
    """Read and tokenise files in order, up to :data:`STREAM_TOKENS`.

    Args:
        least: tokens that training needs at the very least.

    Raises:
        UserError: no file, an unreadable one, or too little text.
    """
    if not paths:
        raise UserError("Training needs text.", "Give --data FILE (.jsonl or .txt, also .gz).")
    parts: list[np.ndarray] = []
    count, sources = 0, []
    for path in paths:
        rows = read_rows(path)
        sources.append({"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
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
