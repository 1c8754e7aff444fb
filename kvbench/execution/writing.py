"""Writes the answers to a question, greedily, behind the same context in the caches of one or several cells."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvbench.data.samples.scoring import SCORING
from kvbench.inference.opening import joined
from kvbench.inference.session import Session
from kvbench.models.loading import Loaded, end_tokens
from kvbench.protocols.pieces import Asked, Piece
from kvbench.store.answer_records import Answer

_WORD = re.compile(r"\w")


class Ends:
    """Where answers end: at an end token, and if so asked with the first line that has a letter or a digit."""

    def __init__(self, loaded: Loaded, with_line: bool) -> None:
        self.loaded, self.with_line, self.ends = loaded, with_line, set(end_tokens(loaded))

    @cached_property
    def line_tokens(self) -> set[int]:
        """Tokens that contain the end of a line."""
        hf = self.loaded.tokenizer
        texts = hf.batch_decode([[number] for number in range(self.loaded.vocabulary)])
        return {number for number, text in enumerate(texts) if "\n" in text}

    def text(self, ids: Sequence[int]) -> str:
        """The text of an answer; up to its first line, without empty lines before it, if answers end there."""
        whole: str = self.loaded.tokenizer.decode(list(ids), skip_special_tokens=True)
        return _first_line(whole) if self.with_line else whole

    def are_reached(self, ids: Sequence[int]) -> bool:
        """Whether an answer ends with its last token."""
        if ids[-1] in self.ends:
            return True
        return self.with_line and ids[-1] in self.line_tokens and _WORD.search(self.text(ids)) is not None


def _first_line(text: str) -> str:
    """A text up to the end of the first line that has a letter or a digit."""
    found = _WORD.search(text)
    end = -1 if found is None else text.find("\n", found.start())
    return (text if end < 0 else text[:end]).lstrip("\n")


class Written(NamedTuple):
    """An answer, and its last token if the session has not read it; an end token never is."""

    answer: Answer
    unread: tuple[int, ...]


def write_answers(
    model: nn.Module, sessions: Sequence[Session], piece: Piece, ends: Ends, before: Sequence[Written] = ()
) -> list[Written]:
    """Read the question behind every context, and answer it; the caches grow by what is read and written.

    Args:
        before: the answers to the question before, if this one follows them in the same sessions.
    """
    assert piece.asked is not None, "pieces of this protocol ask"
    question = piece.ids[piece.context :]
    asked = [question] * len(sessions)
    if before:
        assert piece.asked.follow is not None, "the protocol asks in turns"
        asked = [(*written.unread, *piece.asked.follow) for written in before]
    logits = _extended(model, sessions, asked)
    ids: list[list[int]] = [[] for _ in sessions]
    going = list(range(len(sessions)))
    while going:
        for row, token in zip(going, logits.argmax(-1).tolist(), strict=True):
            ids[row].append(token)
        going = [row for row in going if not ends.are_reached(ids[row]) and len(ids[row]) < piece.asked.new_tokens]
        if going:
            logits = _extended(model, [sessions[row] for row in going], [ids[row][-1:] for row in going])
    return [_written(tokens, piece.asked, ends) for tokens in ids]


def _written(ids: Sequence[int], asked: Asked, ends: Ends) -> Written:
    is_ended = ids[-1] in ends.ends
    kept = tuple(ids[:-1] if is_ended else ids)
    text = ends.text(kept)
    scored = text.lstrip("\n").split("\n", 1)[0] if asked.first_line else text
    score = SCORING[asked.scoring](scored, asked.references)
    return Written(Answer(kept, text, score, ends.are_reached(ids)), () if is_ended else kept[-1:])


def _extended(model: nn.Module, sessions: Sequence[Session], ids: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``[sessions, vocabulary]`` after more text in each of them."""
    tokens = torch.tensor(ids, device=sessions[0].device)
    together = joined(model, [(torch.tensor([row]), session) for row, session in enumerate(sessions)])
    if together is not None:
        return together.extend(tokens)[:, -1]
    parts = []
    for session, row in zip(sessions, tokens, strict=True):
        *_, part = session.extend(row[None])
        parts.append(part.logits[:, -1])
    return torch.cat(parts)
