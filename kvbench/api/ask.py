"""Questions about one context, answered from the full cache and from a compressed one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.api.compress import compress
from kvbench.api.compressed_model import CompressedModel
from kvbench.errors import UserError
from kvbench.protocols.pieces import make_tokenizer


@dataclass(frozen=True)
class Side:
    """What one cache has answered.

    Attributes:
        answers: a text for each question.
        entries: held per layer and head once the context was read; ``bytes`` they take.
        prefill_s: seconds to read the context, and to compress it; ``answers_s`` for each answer.
    """

    answers: tuple[str, ...]
    entries: float
    bytes: int
    prefill_s: float
    answers_s: tuple[float, ...]


@dataclass(frozen=True)
class Asked:
    """The same questions, asked twice.

    Attributes:
        context_tokens: of the context, which is compressed before any question is known.
    """

    questions: tuple[str, ...]
    context_tokens: int
    full: Side
    compressed: Side

    @property
    def realised(self) -> float:
        """Share of the context's entries that was removed, by bytes."""
        return 1 - self.compressed.bytes / self.full.bytes


def ask(
    model: nn.Module, tokenizer: Any, method: str, context: str, questions: Sequence[str], *,
    ratio: float | str | None = None, budget_tokens: int | None = None, adapter: str | Path | None = None,
    new_tokens: int = 64, options: Mapping[str, Any] | None = None,
) -> Asked:
    """Compress a context once and ask questions about it, beside the full cache; answers are greedy.

    Where the tokenizer has a chat template, context and question are one message of the user, and the context with all
    that stands before it is what is compressed.

    Raises:
        UserError: the context has no token, or the request cannot be carried out on this model.
    """
    context = context.strip()  # as chat templates do
    parts = [_parts(tokenizer, context, question) for question in questions]
    if not context or not parts or any(not before or not after for before, after in parts):
        raise UserError("A context and at least one question are needed, each with at least one token.")
    if any(before != parts[0][0] for before, _ in parts):
        raise UserError("The tokens of the context depend on the question.", "Ask the questions one by one.")
    device = next(model.parameters()).device
    texts = [(torch.tensor([before], device=device), torch.tensor([after], device=device)) for before, after in parts]
    with compress(model, "full") as run:
        full = _side(run, tokenizer, texts, new_tokens)
    with compress(
        model, method, ratio, budget_tokens=budget_tokens, adapter=adapter, **(options or {})
    ) as run:
        compressed = _side(run, tokenizer, texts, new_tokens)
    return Asked(tuple(questions), len(parts[0][0]), full, compressed)


def _parts(tokenizer: Any, context: str, question: str) -> tuple[list[int], list[int]]:
    """Token ids of all up to the end of the context, and of what follows it."""
    whole, cutter = f"{context}\n\n{question}", make_tokenizer(tokenizer, "auto")
    lead = cutter.lead()
    if getattr(tokenizer, "chat_template", None):
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": whole}], tokenize=False, add_generation_prompt=True
        )
        lead = ()  # the template has written it, if there is one
    else:
        whole += "\n"
    if context not in whole:
        raise UserError("The chat template of the tokenizer changes the context.", "Remove the template.")
    end = whole.index(context) + len(context)
    before, after = cutter.split((whole[:end], whole[end:]))
    return [*lead, *before.ids], [*after.ids]


def _side(run: CompressedModel, tokenizer: Any, texts: Sequence[tuple[Tensor, Tensor]], new_tokens: int) -> Side:
    started = time.perf_counter()
    snapshot = run.prefill(texts[0][0])
    prefill = time.perf_counter() - started
    usage = snapshot.cache.usage()
    answers, seconds = [], []
    for _, question in texts:
        started = time.perf_counter()
        ids = run.ask(snapshot, question, max_new_tokens=new_tokens, do_sample=False)
        seconds.append(time.perf_counter() - started)
        answers.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    return Side(tuple(answers), usage.entries, usage.logical, prefill, tuple(seconds))
