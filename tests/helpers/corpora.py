"""Files of text, written by hand and read as a task reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvbench.data.documents import Corpus, load_corpus
from kvbench.data.tasks import load_task


def corpus(path: Path, task: str = "minidocs", column: str = "text") -> Corpus:
    return load_corpus(load_task(task), path, column)


def written(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
