"""A tokenizer read from its file alone, for plans, which do without transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Encoded(NamedTuple):
    """Token ids of a text, and where each token begins and ends in it, in characters."""

    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]


class FileTokenizer:
    """What cutting needs of a Hugging Face tokenizer; see :func:`kvbench.protocols.pieces.make_tokenizer`."""

    is_fast = True
    chat_template = None

    def __init__(self, backend: Any, bos_token: str | None) -> None:
        self.backend_tokenizer = backend
        self.bos_token_id: int | None = None if bos_token is None else backend.token_to_id(bos_token)

    def __call__(self, text: str, add_special_tokens: bool = True, **_: bool) -> Encoded:
        found = self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return Encoded(found.ids, found.offsets)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.backend_tokenizer.id_to_token(number) for number in ids]


def tokenizer_in(folder: Path) -> FileTokenizer | None:
    """The tokenizer of a model folder; None if it has none in a single file, or that cannot be read."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception:  # the library raises bare exceptions; what is wrong is said when the model is loaded
        return None
    backend.no_truncation()
    backend.no_padding()
    return FileTokenizer(backend, _bos_token(folder))


def _bos_token(folder: Path) -> str | None:
    try:
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["bos_token"]
        return str(named["content"] if isinstance(named, dict) else named)
    except (OSError, ValueError, KeyError, TypeError):
        return None
