"""Compression of a model that the user has loaded himself, around its own ``generate``."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.api.checks import check_call, check_model, check_request, checked_adapter, checked_method
from kvbench.api.snapshot import Snapshot, load_snapshot
from kvbench.api.wording import in_python
from kvbench.errors import UserError
from kvbench.inference.compressed_cache import PREFILL, CompressedCache, Compression
from kvbench.inference.opening import prepared
from kvbench.models.attention import register

USUAL_NEW_TOKENS = 20
"""Tokens that transformers generates where nothing says how many."""


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


@dataclass
class CompressedModel:
    """A model inside its ``compress`` block.

    Attributes:
        reports: of every call of ``generate`` so far.
    """

    compression: Compression
    original: dict[str, Callable[..., Any]]
    reports: list[Report] = field(default_factory=list)
    is_reading: bool = False

    @property
    def report(self) -> Report:
        """Of the last call.

        Raises:
            UserError: nothing has been generated yet.
        """
        if not self.reports:
            raise UserError("Nothing has been generated yet.", "Call model.generate inside the block.")
        return self.reports[-1]

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Snapshot:
        """Read a context ``[batch, n]`` and compress it.

        Raises:
            UserError: it cannot be compressed.
        """
        compression, columns = self.compression, input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        cache = CompressedCache(compression, columns, columns)
        with torch.no_grad(), in_python(), self._reading(), prepared(compression.model, compression.adapter, columns):
            cache.feed(input_ids, mask, 1)
        return Snapshot(input_ids, mask.bool(), cache)

    def load(self, path: str | Path) -> Snapshot:
        """Read a compressed context that ``snapshot.save`` wrote.

        Raises:
            UserError: it is missing or damaged, or of another model or method.
        """
        with self._reading():
            return load_snapshot(path, self.compression)

    def ask(self, snapshot: Snapshot, question: Tensor, **settings: Any) -> Tensor:
        """Continue a copy of a compressed context with a question, and generate the answer.

        Args:
            question: int64 ``[batch, m]`` without padding, or ``[1, m]`` for all rows.
            settings: of ``generate``, such as ``max_new_tokens``.

        Returns:
            The ids of the answer, ``[batch, new tokens]``.

        Raises:
            UserError: the snapshot is of another model or method.
        """
        question = question.expand(len(snapshot.ids), -1)
        ids = torch.cat([snapshot.ids, question], 1)
        mask = torch.cat([snapshot.mask, torch.ones_like(question, dtype=torch.bool)], 1)
        model: Any = self.compression.model
        out = model.generate(
            input_ids=ids, attention_mask=mask.long(), past_key_values=snapshot.cache.copy(),
            **{**settings, "return_dict_in_generate": False},
        )
        answer: Tensor = out[:, ids.shape[1] :]
        return answer

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **settings: Any) -> Any:
        """Stand in for the model's ``generate``: check the call, give it the cache, and report."""
        started, model = time.perf_counter(), self.compression.model
        config = generation_config or getattr(model, "generation_config", None)
        check_call(model, config, settings)
        ids = settings.get("input_ids") if inputs is None else inputs
        if ids is None:
            raise UserError("model.generate is called without input_ids.", "Give it the ids of the prompt.")
        cache = settings.pop("past_key_values", None)
        columns = ids.shape[1]
        planned = columns + _new_tokens(config, settings, columns)
        if cache is None:
            chunk = settings.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
            cache = CompressedCache(self.compression, columns, planned, chunk)
        elif not isinstance(cache, CompressedCache) or cache.compression is not self.compression:
            raise UserError(
                "The cache that generate was given was not made inside this block, under this method.",
                "Leave past_key_values out, or give what an earlier call in the block returned.",
            )
        with in_python(), ExitStack() as stack:
            with self._reading():  # rotations may be measured
                stack.enter_context(prepared(model, self.compression.adapter, planned))
            out = self.original["generate"](inputs, generation_config, past_key_values=cache, **settings)
        self.reports.append(_report(cache, time.perf_counter() - started))
        return out

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Let the model's own forward pass run within the block."""
        before, self.is_reading = self.is_reading, True
        try:
            yield
        finally:
            self.is_reading = before

    def forward(self, *args: Any, **given: Any) -> Any:
        """Stand in for the model's ``forward``: hand what ``generate`` feeds to the cache's sessions."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        cache = given.get("past_key_values")
        if self.is_reading:  # called by a session
            return self.original["forward"](*args, **given)
        if not isinstance(cache, CompressedCache):
            raise UserError(
                "The model is called inside a compress block without its cache.",
                "Call model.generate, or prefill and ask; call the model itself outside the block.",
            )
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if ids is None or (mask is not None and mask.dim() != 2):
            raise UserError("generate feeds embeddings or a mask of its own.", "Give it input_ids and a 2-D mask.")
        keep = given.get("logits_to_keep") or 1
        with self._reading():
            logits = cache.feed(ids, mask, keep if isinstance(keep, int) else len(keep))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)


@contextmanager
def compress(
    model: nn.Module, method: str, ratio: float | str | Fraction | None = None, *, budget_tokens: int | None = None,
    adapter: str | Path | None = None, during: str = PREFILL, interval: int | None = None, seed: int = 0,
    **options: Any,
) -> Iterator[CompressedModel]:
    """Compress the cache of a model within the block, around its own ``generate``.

    Entries are really removed. Left-padded rows keep what they would keep alone, ``kept(n, ratio)`` of their own n
    tokens. On leaving, the model is as it was.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        method: name of a method, such as ``snapkv``; ``kvbench list methods`` shows them.
        ratio: share of entries to remove, in [0, 1).
        budget_tokens: entries to keep per layer and head, instead of a ratio.
        adapter: folder of the adapter of a trained method.
        during: remove entries after the prompt has been read (``prefill``), while tokens are generated (``decode``), or
            ``both``.
        interval: tokens between two removals while tokens are generated; the option ``step`` of the method.
        seed: of random layouts and draws.
        options: of the method, such as ``window=64``.

    Raises:
        UserError: the request cannot be carried out on this model; nothing has been changed.
    """
    check_request(model, during)
    made = checked_method(method, ratio, budget_tokens, options if interval is None else {**options, "step": interval})
    own: Any = model
    attention = own.config._attn_implementation
    names = ("generate", "forward")
    before: dict[str, Any] = {name: vars(model)[name] for name in names if name in vars(model)}
    original = {name: getattr(model, name) for name in names}
    own.set_attn_implementation(register())
    try:
        check_model(model, made)
        run = CompressedModel(Compression(model, made, checked_adapter(model, made, adapter), during, seed), original)
        for name, function in original.items():
            vars(model)[name] = _standing_in(function, getattr(run, name))
        yield run
    finally:
        for name in original:
            vars(model).pop(name, None)
        vars(model).update(before)
        own.set_attn_implementation(attention)


def _standing_in(original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Our function under the name and signature of the model's own, which transformers looks at."""
    @functools.wraps(original)
    def call(*args: Any, **given: Any) -> Any:
        return ours(*args, **given)

    return call


def _new_tokens(config: Any, settings: Mapping[str, Any], columns: int) -> int:
    """Tokens that a call generates at most, as transformers works it out."""
    for name, before in (("max_new_tokens", 0), ("max_length", columns)):
        for value in (settings.get(name), getattr(config, name, None)):
            if value is not None and value > before:
                return int(value) - before
    return USUAL_NEW_TOKENS


def _report(cache: CompressedCache, seconds: float) -> Report:
    assert cache.mask is not None
    held = cache.usage()
    return Report(
        held.tokens, held.entries / len(cache.mask), held.by_head, held.removals, held.logical, held.physical,
        held.full, 1 - held.entries / held.tokens, seconds,
    )
