"""Writes the answers to a question, greedily, behind the same context in the caches of one or several cells."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from kvbench.data.samples.scoring import SCORING
from kvbench.inference.opening import joined
from kvbench.inference.session import Session
from kvbench.models.loading import Loaded, end_tokens
from kvbench.protocols.pieces import Piece
from kvbench.store.answer_records import Answer


class Ends:
    """Where answers end: at an end token, and with the first line if so asked."""

    def __init__(self, loaded: Loaded, with_line: bool) -> None:
        self.loaded, self.with_line, self.ends = loaded, with_line, set(end_tokens(loaded))

    @cached_property
    def line_tokens(self) -> set[int]:
        """Tokens that contain the end of a line."""
        hf = self.loaded.tokenizer
        texts = hf.batch_decode([[number] for number in range(self.loaded.vocabulary)])
        return {number for number, text in enumerate(texts) if "\n" in text}

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer; its first line if answers end there."""
        whole: str = self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
        return whole.lstrip("\n").split("\n", 1)[0] if self.with_line else whole

    def are_reached(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with its last token."""
        if ids[-1] in self.ends:
            return True
        return self.with_line and ids[-1] in self.line_tokens and bool(self.text(ids).strip())


def write_answers(model: nn.Module, sessions: Sequence[Session], piece: Piece, ends: Ends) -> list[Answer]:
    """Read the question behind every context, and answer it; the caches grow by what is read and written."""
    assert piece.asked is not None, "pieces of this protocol ask"
    logits = _extended(model, sessions, [list(piece.ids[piece.context :])] * len(sessions))
    written: list[list[int]] = [[] for _ in sessions]
    going = list(range(len(sessions)))
    while going:
        for row, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            written[row].append(token)
        going = [
            row for row in going
            if not ends.are_reached(written[row]) and len(written[row]) < piece.asked.new_tokens
        ]
        if going:
            logits = _extended(model, [sessions[row] for row in going], [written[row][-1:] for row in going])
    score = SCORING[piece.asked.scoring]
    answers = []
    for ids in written:
        kept = ids[:-1] if ids[-1] in ends.ends else ids
        text = ends.text(kept)
        answers.append(Answer(tuple(kept), text, score(text, piece.asked.references), ends.are_reached(ids)))
    return answers


def _extended(model: nn.Module, sessions: Sequence[Session], ids: Sequence[list[int]]) -> Tensor:
    """Logits ``[sessions, vocabulary]`` after more text in each of them."""
    tokens = torch.tensor(ids, device=sessions[0].device)
    together = joined([(torch.tensor([row]), session) for row, session in enumerate(sessions)])
    if together is not None:
        return together.extend(model, tokens)[:, -1]
    parts = []
    for session, row in zip(sessions, tokens, strict=True):
        *_, part = session.extend(row[None])
        parts.append(part.logits[:, -1])
    return torch.cat(parts)
