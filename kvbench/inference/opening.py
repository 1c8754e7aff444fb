"""Opens sessions: the only module that asks which mechanism a method has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor, nn

from kvbench.cache.shape import cache_shape
from kvbench.errors import UserError
from kvbench.inference.homer import HomerSession, decoder_layers
from kvbench.inference.layout_session import LayoutSession, MaskedSession
from kvbench.inference.masked_policy import MaskedPolicySession, masked_logits
from kvbench.inference.memory_session import MaskedMemorySession, MemorySession
from kvbench.inference.output_memory import OutputMemorySession
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.reader import Reader
from kvbench.inference.session import Session
from kvbench.inference.together import Together, can_join
from kvbench.methods import RUNNING, Layout, LayoutMethod, Method, TextStructure, make_layout
from kvbench.methods.layouts.output_memory import OutputMemory
from kvbench.methods.memories.memory import Memory
from kvbench.methods.policies.masking import check_maskable
from kvbench.methods.policies.policy import CachePolicy
from kvbench.methods.prefixes.homer import Homer
from kvbench.models.adapter import Adapter
from kvbench.models.configuration import context_of
from kvbench.models.facts import OTHER_METHOD, ModelFacts
from kvbench.models.rope import fixed_rotations, has_rotary, inv_freq_by_layer
from kvbench.models.sharing import sharing_of

ONEPASS = "onepass"
"""The execution in which entries are masked instead of removed."""


@dataclass(frozen=True)
class Text:
    """A batch of texts for which a session is opened; all rows have the same lengths and structure.

    Attributes:
        context: number of tokens that are read first, and compressed.
        planned: number of tokens up to which the method goes on compressing; those after the context are generated.
        row_seeds: for each row a number from 0 to 15 that depends on its text only.
        has_continuation: whether the context is read for text that follows it; otherwise it is scored while it is
            read.
        structure: what is known of the text besides its length.
    """

    context: int
    planned: int
    row_seeds: Sequence[int]
    has_continuation: bool = False
    structure: TextStructure = RUNNING

    @property
    def is_written(self) -> bool:
        return self.planned > self.context


def open_session(
    model: nn.Module, method: Method, text: Text, *, adapter: Adapter | None = None, seed: int = 0,
    execution: str = "streamed", chunk: int = 64, at_once: bool = False, compresses_context: bool = True,
    is_late: bool = False, overhead: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Session:
    """Open a session of a method; use it while the model is :func:`prepared` for the adapter and the length.

    Args:
        execution: ``streamed`` (entries are removed) or ``onepass`` (entries are masked).
        chunk: number of tokens that are fed at a time.
        at_once: feed the whole context in one forward pass if the method allows it, which is fastest.
        compresses_context: remove entries at the end of the context; otherwise only while tokens are generated.
        is_late: the same for policies; layouts hold what they hold from the start.
        overhead: context manager entered around all work outside the model's own forward pass, so that it can be timed.

    Raises:
        UserError: the budget is below what the method needs, or its layout plans the context as well.
    """
    with Reader(model, adapter).without_adapter():  # the shape of the cache is found out on the base model
        method = method.with_budget_for(text.context, cache_shape(model))
    if isinstance(method, CachePolicy):
        once = (text.has_continuation or text.is_written) and method.prefill == "once"
        is_masked = execution == ONEPASS and not once and not text.is_written
        if is_masked:
            check_maskable(method)
        return (MaskedPolicySession if is_masked else PolicySession)(
            model, method, text.context, text.row_seeds, seed, (text.context if at_once else chunk) if once else None,
            overhead=overhead, compresses_context=compresses_context and not is_late,
        )
    if not compresses_context:
        raise UserError(f"{method.name} plans context and generated tokens together.", "Use it for both.")
    if isinstance(method, Homer):
        return HomerSession.opened(Reader(model, adapter, overhead), method, text.context, _layers(model))
    layout = _planned(method, text, seed)
    if at_once and layout.is_plain:
        chunk = len(layout)
    if isinstance(method, OutputMemory):
        return OutputMemorySession(
            Reader(model, adapter, overhead), layout, text.context, chunk, mix=method.mix / 100,
            sharpness=float(method.sharpness),
        )
    if isinstance(method, Memory):
        _check_places(method, model, layout)
    is_masked = execution == ONEPASS and not text.is_written
    kind: type[LayoutSession] = MaskedSession if is_masked else LayoutSession
    if layout.written:
        kind = MaskedMemorySession if is_masked else MemorySession
    return kind(Reader(model, adapter, overhead), layout, text.context, chunk, evicts=execution != ONEPASS)


def one_pass(reader: Reader, ids: Tensor, drawn: Layout | CachePolicy, wanted: slice) -> Tensor:
    """Logits ``[batch, wanted, vocabulary]`` of a text in one masked pass, through which gradients can flow."""
    if isinstance(drawn, CachePolicy):
        return masked_logits(reader.model, drawn, ids, wanted)
    return reader.one_pass(ids, drawn, wanted)


@contextmanager
def prepared(model: nn.Module, adapter: Adapter | None, length: int) -> Iterator[None]:
    """Prepare the model for texts of ``length`` tokens within the block: rotary embeddings fixed, adapter applied."""
    with fixed_rotations(model, length), Reader(model, adapter).ready():
        yield


def joined(
    model: nn.Module, groups: Sequence[tuple[Tensor, Session]], layouts: bool = False
) -> Together | None:
    """One forward pass for the next token of several sessions, with their rows; None if each must be fed by itself.

    Args:
        layouts: whether sessions of layouts may join, too; the model must be one that policies can be used on.
    """
    if sharing_of(model) is not None:  # each session hands its own entries from layer to layer
        return None
    members = [
        (rows, session) for rows, session in groups
        if can_join(session) and (layouts or isinstance(session, PolicySession))
    ]
    return Together(model, members) if len(members) == len(groups) > 1 else None


def rows_together(method: Method, row_seeds: Sequence[int]) -> list[list[int]]:
    """Group the rows of a batch that can share a session: under a random layout, those with the same layout."""
    if method.depends_on_words:
        return [[row] for row in range(len(row_seeds))]
    if not method.seeded:
        return [list(range(len(row_seeds)))]
    found: dict[int, list[int]] = {}
    for row, seed in enumerate(row_seeds):
        found.setdefault(seed, []).append(row)
    return list(found.values())


def check_method(method: Method, model: nn.Module, name: str, facts: ModelFacts) -> None:
    """Check that the model supports what the method needs of it, and what it does to positions.

    Args:
        name: name of the model, for messages.

    Raises:
        UserError: it does not.
    """
    if method.feeds_rows:
        facts.check_embeddings(name, method.name)
    if method.averages_pre_rope:
        inv_freq_by_layer(model)
    if method.counts_anew and inv_freq_by_layer(model) is None:
        raise UserError(
            f"{name} has learned positions, which cannot be counted anew in the cache.",
            "Use --set positions=absolute.",
        )
    if isinstance(method, (CachePolicy, Homer)) and facts.policy_refusal:
        raise UserError(f"{name}: {facts.policy_refusal} ({method.name})", OTHER_METHOD)
    if isinstance(method, Homer):
        if sharing_of(model) is not None:
            raise UserError(f"{name}: layers that share entries cannot be read by {method.name}.", "Leave --share out.")
        decoder_layers(model)
    if isinstance(method, CachePolicy):
        if method.needs.moments or method.needs.rotations:
            inv_freq_by_layer(model)
        with method.patched(model):
            pass


def places_needed(method: Method, model: nn.Module, text: Text, seed: int) -> int:
    """Number of position ids that the planned tokens of a text need, special tokens included."""
    method = method.with_budget_for(text.context, cache_shape(model))
    if isinstance(method, CachePolicy):
        return text.planned
    if isinstance(method, Homer):
        return method.plan(text.context, _layers(model)).positions + text.planned - text.context
    layout = _planned(method, text, seed)
    read = method.positions_read(layout.written) if isinstance(method, Memory) else 0
    return max(int(layout.position.max()) + 1, read)


def held_at_end(method: Method, model: nn.Module, text: Text, seed: int) -> int:
    """Number of entries that are held when a text has been read and written."""
    method = method.with_budget_for(text.context, cache_shape(model))
    if isinstance(method, CachePolicy):
        return text.planned if method.packs or method.keeps_all else method.budget(text.planned, text.planned, 0, 1)
    if isinstance(method, Homer):
        return method.plan(text.context, _layers(model)).entries + text.planned - text.context
    layout = _planned(method, text, seed)
    return len(layout.held_after(len(layout)))


class PeakSize(NamedTuple):
    """Size of a session at its largest, for an estimate of its memory.

    Attributes:
        entries: entries that the cache holds besides those being fed; packed ones count as 0.
        fed: number of tokens that are fed at a time.
    """

    entries: int
    fed: int


def peak_size(method: Method, model: nn.Module, text: Text, seed: int, chunk: int, is_read: bool) -> PeakSize:
    """Estimate from below what reading a prompt and generating text after it takes.

    Args:
        chunk: number of tokens that are fed at a time, if the prompt cannot be fed at once.
        is_read: whether the prompt is read; otherwise the cache is filled with random entries.
    """
    method, prompt = method.with_budget_for(text.context, cache_shape(model)), text.context
    if isinstance(method, CachePolicy):
        once = is_read and method.prefill == "once"
        held = prompt if once or method.keeps_all else method.budget(prompt, prompt, 0, 1)
        fed = prompt if once else method.run_length(0) if is_read else 1
        return PeakSize(0 if method.packs else held, fed)
    if isinstance(method, Homer):
        return PeakSize(method.plan(prompt, _layers(model)).entries, prompt if is_read else 1)
    layout = _planned(method, text, seed)
    if layout.is_plain:
        return PeakSize(text.planned, prompt if is_read else 1)
    held = len(layout.held_after(int(layout.raw_slots[prompt - 1]) + 1))
    return PeakSize(held, min(chunk, len(layout)) if is_read else 1)


def _check_places(method: Memory, model: nn.Module, layout: Layout) -> None:
    """Check that a writer's own reads fit a model with learned positions.

    Raises:
        UserError: they do not.
    """
    needed, places = method.positions_read(layout.written), context_of(model.config)
    if needed > places and not has_rotary(model):
        raise UserError(
            f"{method.name} reads {needed} rows and tokens at a time to write its memory, and {type(model).__name__} "
            f"has learned positions up to {places}.", "Give a smaller --set n_comp=, or shorter texts.",
        )


def _layers(model: nn.Module) -> int:
    return len(cache_shape(model).layers)


def _planned(method: Method, text: Text, seed: int) -> Layout:
    """The layout of a text, cached for batches of the same lengths and seed."""
    assert isinstance(method, LayoutMethod), "all others have been asked for"
    which = text.row_seeds[0] if method.seeded else 0
    structure = text.structure._replace(
        prefix=text.context if text.is_written else 0, is_continued=text.has_continuation or text.is_written
    )
    return _layout(method, text.planned, seed, which, structure)


@lru_cache(maxsize=512)
def _layout(method: LayoutMethod, n: int, seed: int, which: int, structure: TextStructure) -> Layout:
    layout = make_layout(method, n, seed, which, structure)
    _ = layout.last_query  # computed here, so that it is not timed later
    return layout
