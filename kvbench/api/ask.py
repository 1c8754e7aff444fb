"""Questions about one context, answered from the full cache and from a compressed one: at once, or turn by turn."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor, nn

from kvbench.api.compress import compress
from kvbench.api.compressed_model import CompressedModel
from kvbench.errors import UserError
from kvbench.protocols.pieces import make_tokenizer

_MARK = "\ue000mark\ue000"
"""Characters of private use, in place of what is looked for."""
Turns = Sequence[tuple[str, str]]
"""Questions that were asked before, and their answers."""


@dataclass(frozen=True)
class Side:
    """What one cache has answered.

    Attributes:
        answers: a text for each question.
        context_tokens: that were read, and compressed, before any of the questions was known.
        entries: held of them per layer and head; ``bytes`` they take, of ``full_bytes`` without compression.
        held: entries per layer and head after each answer: those, the question and the answer.
        prefill_s: seconds to read the context, and to compress it; ``answers_s`` for each answer.
    """

    answers: tuple[str, ...]
    context_tokens: int
    entries: float
    bytes: int
    full_bytes: int
    held: tuple[float, ...]
    prefill_s: float
    answers_s: tuple[float, ...]

    @property
    def realised(self) -> float:
        """Share of the context's entries that was removed, by bytes."""
        return 1 - self.bytes / self.full_bytes


@dataclass(frozen=True)
class Asked:
    """The same questions, asked twice."""

    questions: tuple[str, ...]
    full: Side
    compressed: Side

    @property
    def context_tokens(self) -> int:
        """Of the context, which is compressed before any question is known."""
        return self.compressed.context_tokens

    @property
    def realised(self) -> float:
        """Share of the context's entries that was removed, by bytes."""
        return self.compressed.realised


@dataclass
class Answerer:
    """A model with its tokenizer, and what is done to its cache on the compressed side; answers are greedy.

    Args:
        ratio: share of entries to remove; or ``budget_tokens``, the entries to keep.
        new_tokens: of an answer, at most.
    """

    model: nn.Module
    tokenizer: Any
    method: str
    ratio: float | str | None = None
    budget_tokens: int | None = None
    adapter: str | Path | None = None
    new_tokens: int = 64
    options: Mapping[str, Any] = field(default_factory=dict)

    def full(self, context: str, turns: Turns, questions: Sequence[str]) -> Side:
        """Answers from the full cache; see :meth:`compressed`."""
        parts = self._parts(context, turns, questions)
        with compress(self.model, "full") as run:
            return self._side(run, parts)

    def compressed(self, context: str, turns: Turns, questions: Sequence[str]) -> Side:
        """Answers from a compressed cache: context and earlier turns are compressed, each question is read behind them.

        Raises:
            UserError: the context has no token, or the request cannot be carried out on this model.
        """
        parts = self._parts(context, turns, questions)
        with compress(
            self.model, self.method, self.ratio, budget_tokens=self.budget_tokens, adapter=self.adapter, **self.options
        ) as run:
            return self._side(run, parts)

    def _parts(self, context: str, turns: Turns, questions: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        """For each question the ids of what is compressed, and of what follows, ``[1, n]`` and ``[1, m]``."""
        context = context.strip()  # as chat templates do
        parts = [split_ids(self.tokenizer, context, turns, question.strip()) for question in questions]
        is_asked = parts and all(question.strip() for question in questions)
        if not context or not is_asked or any(not before or not after for before, after in parts):
            raise UserError("A context and at least one question are needed, each with at least one token.")
        if any(before != parts[0][0] for before, _ in parts):
            raise UserError("The tokens of the context depend on the question.", "Ask the questions one by one.")
        device = next(self.model.parameters()).device
        return [(torch.tensor([one], device=device), torch.tensor([two], device=device)) for one, two in parts]

    def _side(self, run: CompressedModel, parts: Sequence[tuple[Tensor, Tensor]]) -> Side:
        context = parts[0][0]
        started = time.perf_counter()
        snapshot = run.prefill(context, new_tokens=max(part[1].shape[1] for part in parts) + self.new_tokens)
        prefill = time.perf_counter() - started
        usage = snapshot.cache.usage()
        answers, seconds, held = [], [], []
        for _, question in parts:
            ids = run.ask(snapshot, question, max_new_tokens=self.new_tokens, do_sample=False)
            seconds.append(run.report.seconds)
            held.append(run.report.entries)
            answers.append(self.tokenizer.decode(ids[0], skip_special_tokens=True).strip())
        return Side(
            tuple(answers), context.shape[1], usage.entries, usage.logical, usage.full, tuple(held), prefill,
            tuple(seconds),
        )


def ask(answerer: Answerer, context: str, questions: Sequence[str]) -> Asked:
    """Compress a context once and ask questions about it, beside the full cache.

    Where the tokenizer has a chat template, context and question are one message of the user, and the context with all
    that stands before it is what is compressed.

    Raises:
        UserError: the context has no token, or the request cannot be carried out on this model.
    """
    return Asked(tuple(questions), answerer.full(context, (), questions), answerer.compressed(context, (), questions))


@dataclass
class Chat:
    """Two conversations about one context, each with the answers of its own cache.

    Before every turn all that was said so far is read and compressed; the new question is not known then.
    """

    answerer: Answerer
    context: str
    turns: tuple[list[tuple[str, str]], list[tuple[str, str]]] = field(default_factory=lambda: ([], []))

    def say(self, question: str) -> Asked:
        """Ask on both sides, and remember the answers.

        Raises:
            UserError: as in :func:`ask`, or the conversation has become too long.
        """
        sides = [
            answer(self.context, turns, [question])
            for answer, turns in zip((self.answerer.full, self.answerer.compressed), self.turns, strict=True)
        ]
        for turns, side in zip(self.turns, sides, strict=True):
            turns.append((question, side.answers[0]))
        return Asked((question,), sides[0], sides[1])


def split_ids(tokenizer: Any, context: str, turns: Turns, question: str) -> tuple[list[int], list[int]]:
    """Token ids of all that stands before a question, and of what follows.

    Raises:
        UserError: the tokenizer's chat template changes what was said.
    """
    cutter = make_tokenizer(tokenizer, "auto")
    if getattr(tokenizer, "chat_template", None):
        lead: tuple[int, ...] = ()  # the template has written it, if there is one
        before, after = _templated(tokenizer, context, turns, question)
    else:
        lead = cutter.lead()
        before = context + "".join(f"\n\n{asked}\n{answer}" for asked, answer in turns)
        after = f"\n\n{question}\n"
    compressed, read = cutter.split((before, after))
    return [*lead, *compressed.ids], [*read.ids]


def _templated(tokenizer: Any, context: str, turns: Turns, question: str) -> tuple[str, str]:
    """The conversation in the tokenizer's chat template, cut behind the context, or in later turns before the question.

    Where that is, is found out with a mark in its place: question and context may also be part of the template.
    """
    def rendered(context: str, question: str) -> str:
        said = [text for turn in turns for text in turn] + [question]
        said[0] = f"{context}\n\n{said[0]}"
        roles = ("user", "assistant")
        text: str = tokenizer.apply_chat_template(
            [{"role": roles[place % 2], "content": content} for place, content in enumerate(said)], tokenize=False,
            add_generation_prompt=True,
        )
        return text

    try:
        parts = (rendered(context, _MARK) if turns else rendered(_MARK, question)).split(_MARK)
        whole = rendered(context, question)
    except TemplateError as error:
        raise UserError(f"The chat template of the tokenizer fails: {error}.", "Remove the template.") from error
    if len(parts) != 2 or (question if turns else context).join(parts) != whole:
        raise UserError("The chat template of the tokenizer changes the context.", "Remove the template.")
    end = len(parts[0]) if turns else len(parts[0]) + len(context)
    return whole[:end], whole[end:]
