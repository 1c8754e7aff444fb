"""A model whose cache is compressed: what stands in for its ``generate`` and ``forward``, and what it can be asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench.api.checks import check_ids, check_inputs, check_length, check_settings, new_tokens
from kvbench.api.scores import NO_TARGET, Scores, score_alone
from kvbench.api.snapshot import Snapshot, load_snapshot
from kvbench.api.wording import in_python
from kvbench.errors import UserError
from kvbench.inference.compressed_cache import PREFILL, CompressedCache, Compression
from kvbench.inference.opening import prepared

OTHER_BLOCK = "The cache that is given was not made inside this block, under this method."
_READING: ContextVar[bool] = ContextVar("reading", default=False)
"""Whether a session is reading, so that the model's own forward pass is wanted."""


@dataclass(frozen=True)
class Report:
    """What one call of ``generate`` has kept.

    Attributes:
        tokens: read and generated, over all rows, padding left out.
        entries: held at the end per row, the mean over layers and heads; packed ones count as their bytes.
        entries_by_head: the same by layer and KV head.
        evictions: how often entries were removed.
        bytes, physical_bytes: of the cache at the end, by shapes and by storages; ``full_bytes`` without compression.
        realised: share of entries that are not held: 1 - entries / tokens per row.
        seconds: of the whole call.
    """

    tokens: int
    entries: float
    entries_by_head: tuple[tuple[float, ...], ...]
    evictions: int
    bytes: int
    physical_bytes: int
    full_bytes: int
    realised: float
    seconds: float

    @classmethod
    def of(cls, cache: CompressedCache, seconds: float) -> Report:
        held, rows = cache.usage(), cache.rows
        return cls(
            held.tokens, held.entries / rows, held.by_head, held.removals, held.logical, held.physical, held.full,
            1 - held.entries / held.tokens, seconds,
        )


@dataclass
class CompressedModel:
    """A model inside its ``compress`` block.

    Attributes:
        original: the model's own ``generate`` and ``forward``.
        reports: of every call of ``generate`` so far.
        is_open: whether the block has not been left yet.
    """

    compression: Compression
    original: dict[str, Callable[..., Any]]
    reports: list[Report] = field(default_factory=list)
    is_open: bool = True

    @property
    def report(self) -> Report:
        """Of the last call.

        Raises:
            UserError: nothing has been generated yet.
        """
        if not self.reports:
            raise UserError("Nothing has been generated yet.", "Call model.generate inside the block.")
        return self.reports[-1]

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, new_tokens: int = 0) -> Snapshot:
        """Read a context ``[batch, n]`` and compress it.

        Args:
            new_tokens: that will follow it, at most; models whose rotations depend on the length need to know.

        Raises:
            UserError: it cannot be compressed.
        """
        self._check_open()
        compression, columns = self.compression, check_ids(self.compression.model, input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        check_length(compression.model, int(mask.sum(1).max()) + new_tokens)
        cache = CompressedCache(compression, columns, columns + new_tokens)
        with self._session(columns + new_tokens):
            cache.feed(input_ids, mask, 1)
        return Snapshot(input_ids, mask.bool(), cache)

    def score(
        self, input_ids: Tensor, targets: Tensor | None = None, after: Snapshot | None = None,
        attention_mask: Tensor | None = None,
    ) -> Scores:
        """Score texts ``[batch, n]`` without padding: alone while they are read, or as continuations of a context.

        Alone, a text is read and compressed at the same time, as in the protocol ``block``. After a context, the text
        itself is kept whole; every row continues a copy of its own.

        Args:
            targets: int64 ``[batch, n]``, the token behind each; those of the text itself if left out.
            after: a context for each row, or one for all.
            attention_mask: all ones, where the texts begin with the id that the model pads with.

        Raises:
            UserError: the texts cannot be read, or do not fit the contexts.
        """
        self._check_open()
        model, columns = self.compression.model, check_ids(self.compression.model, input_ids, attention_mask)
        if attention_mask is not None and not bool(attention_mask.all()):
            raise UserError("Texts that are scored are padded.", "Score texts of equal length together.")
        if self.compression.during != PREFILL:
            raise UserError(
                f"Texts are scored without removing what they add, and during is {self.compression.during!r}.",
                "Open the block with during='prefill'.",
            )
        if targets is None:
            targets = torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], NO_TARGET)], 1)
        if targets.shape != input_ids.shape:
            raise UserError("targets are not of the shape of input_ids.", "Give the token behind each token.")
        if after is None:
            check_length(model, columns)
            with self._session(columns):
                return score_alone(self.compression, input_ids, targets)
        if after.cache.compression is not self.compression:
            raise UserError(OTHER_BLOCK, "Read the context inside this block, with run.prefill or run.load.")
        after = after.repeated(len(input_ids) if len(after.ids) == 1 else 1)
        if len(after.ids) != len(input_ids):
            raise UserError(f"{len(input_ids)} texts follow {len(after.ids)} contexts.", "Give one each.")
        cache = after.cache
        check_length(model, int(after.mask.sum(1).max()) + columns)
        mask = torch.cat([after.mask, torch.ones_like(input_ids, dtype=torch.bool)], 1)
        with self._session(max(cache.planned, cache.seen + columns)):
            return Scores.of(cache.feed(input_ids, mask, columns), targets, cache.usage())

    @contextmanager
    def _session(self, length: int) -> Iterator[None]:
        """Let sessions read texts of so many tokens within the block."""
        compression = self.compression
        with torch.inference_mode(False), torch.no_grad(), in_python(), _reading(), prepared(
            compression.model, compression.adapter, length
        ):
            yield

    def load(self, path: str | Path) -> Snapshot:
        """Read a compressed context that ``snapshot.save`` wrote.

        Raises:
            UserError: it is missing or damaged, or of another model or method.
        """
        self._check_open()
        with _reading():
            return load_snapshot(path, self.compression)

    def ask(self, snapshot: Snapshot, question: Tensor, **settings: Any) -> Tensor:
        """Continue a copy of a compressed context with a question, and generate the answer.

        Args:
            question: int64 ``[batch, m]`` without padding; one for all contexts, or one context for all of them.
            settings: of ``generate``, such as ``max_new_tokens``.

        Returns:
            The ids of the answer, ``[batch, new tokens]``.

        Raises:
            UserError: the snapshot is of another block, or the question does not fit it.
        """
        self._check_open()
        check_ids(self.compression.model, question)
        if len(snapshot.ids) == 1 and len(question) > 1:
            snapshot = snapshot.repeated(len(question))
        if len(question) not in (1, len(snapshot.ids)):
            raise UserError(f"{len(question)} questions are asked about {len(snapshot.ids)} contexts.", "Ask one each.")
        taken = {"input_ids", "attention_mask", "past_key_values"} & set(settings)
        if taken:
            raise UserError(f"ask gives generate its own {', '.join(sorted(taken))}.", "Leave it out.")
        question = question.expand(len(snapshot.ids), -1)
        ids = torch.cat([snapshot.ids, question], 1)
        mask = torch.cat([snapshot.mask, torch.ones_like(question, dtype=torch.bool)], 1)
        out = self.generate(
            input_ids=ids, attention_mask=mask.long(), past_key_values=snapshot.cache.copy(),
            **{**settings, "return_dict_in_generate": False},
        )
        answer: Tensor = out[:, ids.shape[1] :]
        return answer

    def generate(
        self, inputs: Tensor | None = None, generation_config: Any = None, *others: Any, **settings: Any
    ) -> Any:
        """Stand in for the model's ``generate``: check the call, give it the cache, and report."""
        self._check_open()
        started, model = time.perf_counter(), self.compression.model
        config = check_settings(model, generation_config, settings)
        ids = settings.get("input_ids") if inputs is None else inputs
        mask = settings.get("attention_mask")
        columns = check_ids(model, ids, mask, is_padded=True)
        cache = settings.pop("past_key_values", None)
        planned = columns + new_tokens(config, columns)
        longest = columns if mask is None else int(mask.sum(1).max())
        check_length(model, longest + planned - columns)
        if cache is None:
            cache = CompressedCache(self.compression, columns, planned, config.prefill_chunk_size)
        elif not isinstance(cache, CompressedCache) or cache.compression is not self.compression:
            raise UserError(
                OTHER_BLOCK, "Leave past_key_values out, or give what an earlier call in the block returned.",
            )
        with in_python(), ExitStack() as stack:
            with _reading():  # rotations may be measured
                stack.enter_context(prepared(model, self.compression.adapter, max(planned, cache.planned)))
            out = self.original["generate"](inputs, generation_config, *others, past_key_values=cache, **settings)
        self.reports.append(Report.of(cache, time.perf_counter() - started))
        return out

    def forward(self, *args: Any, **given: Any) -> Any:
        """Stand in for the model's ``forward``: hand what ``generate`` feeds to the cache's sessions."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache = given.get("past_key_values")
        if _READING.get():
            return self.original["forward"](*args, **given)
        if not isinstance(cache, CompressedCache):
            raise UserError(
                "The model is called inside a compress block without its cache.",
                "Call model.generate, or prefill and ask; call the model itself outside the block.",
            )
        check_inputs(given)
        keep = given.get("logits_to_keep") or 1
        with torch.inference_mode(False), torch.no_grad(), _reading():
            logits = cache.feed(
                given["input_ids"], given.get("attention_mask"), keep if isinstance(keep, int) else len(keep)
            )
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _check_open(self) -> None:
        if not self.is_open:
            raise UserError("The compress block has been left.", "Do this inside the block.")


@contextmanager
def _reading() -> Iterator[None]:
    """Let the model's own forward pass run within the block, in this thread."""
    token = _READING.set(True)
    try:
        yield
    finally:
        _READING.reset(token)
