"""The streaming form of the Compressed Context Memory (arXiv 2312.03414): a cache that never exceeds a budget.

The cache consists of sinks, memory and a window of raw (uncompressed) text. When they reach ``budget`` entries
together, the oldest ``compress`` raw entries are compressed into ``n_comp`` memory entries; the newest ``memory``
memory entries are kept. ``sinks`` with the same options drops raw entries at the same steps, so that it always holds
the same number of entries.

Departure from the released code: keys keep their absolute positions, so that a stream longer than the model's context
uses positions beyond it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.layouts.layout import COMP, SUM, TEXT, Layout, Tokens
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.options import option

if TYPE_CHECKING:
    from kvbench.methods.layouts.chunked import Merge, Pool

_NEVER = 1 << 60


class Cut(NamedTuple):
    """One cut of the window, at which its oldest tokens are compressed, or dropped.

    Attributes:
        after: text token after which it takes place.
        start, stop: range of raw tokens that are removed.
        memory: number of memory entries afterwards.
    """

    after: int
    start: int
    stop: int
    memory: int


@dataclass(frozen=True)
class StreamingBudget(LayoutMethod):
    """Base of methods with a streaming form; ``budget=0`` disables it, and the other options with it."""

    budget: int = option(0, "entries at which the cache is cut; 0: no streaming form")
    memory: int = option(8, "entries of memory that are kept, under --set budget=", least=1)
    compress: int = option(64, "tokens that are compressed at a cut, under --set budget=", least=2)
    sink: int = option(1, "first tokens that stay, under --set budget=")

    @property
    def streams(self) -> bool:
        """Whether the streaming form is used."""
        return self.budget > 0

    @property
    def resolved(self) -> dict[str, str]:
        return {k: v for k, v in super().resolved.items() if self.streams or k not in StreamingBudget.options()}

    def check_budget(self, n_comp: int, in_chunks: bool) -> None:
        """Check that the budget has room for sinks, memory and the tokens to compress.

        Raises:
            UserError: it has not, or the text comes in chunks of its own.
        """
        if not self.streams:
            return
        if in_chunks:
            raise UserError(
                f"--set budget= is for running text, and {self.name} would read text in chunks of its own.",
                "Use it with --protocol stream.",
            )
        if self.memory % n_comp:
            raise UserError(
                f"--set memory={self.memory} is no multiple of n_comp={n_comp}.", "Memory is kept in whole steps."
            )
        if self.compress <= n_comp:
            raise UserError(f"--set compress={self.compress}: {n_comp} entries of memory would save nothing.")
        if self.budget < self.sink + self.memory + self.compress:
            raise UserError(
                f"--set budget={self.budget} is less than sinks, memory and tokens to compress together "
                f"({self.sink} + {self.memory} + {self.compress}).",
                "Raise the budget, or lower --set memory= or --set compress=.",
            )


def cuts(n: int, method: StreamingBudget, n_comp: int, most: int) -> list[Cut]:
    """The cuts made while ``n`` tokens are read, with at most ``most`` memory entries."""
    budget, compress, sink = method.budget, method.compress, method.sink
    found: list[Cut] = []
    start, memory = sink, 0
    for i in range(n):
        if sink + memory + i + 1 - start < budget:
            continue
        grown = min(most, memory + n_comp)
        found.append(Cut(i, start, start + compress, grown))
        start, memory = start + compress, grown
    return found


def window_cuts(n: int, method: StreamingBudget, n_comp: int) -> list[Cut]:
    """The cuts of a window without memory that always holds as many entries as ``ccm-concat``."""
    with_memory = cuts(n, method, n_comp, method.memory)
    found: list[Cut] = []
    start, before = method.sink, 0
    for cut in with_memory:
        stop = start + method.compress - (cut.memory - before)
        found.append(Cut(cut.after, start, stop, 0))
        start, before = stop, cut.memory
    return found


@dataclass(frozen=True, eq=False)
class BudgetVisibility:
    """Visibility: text sees all entries still held; memory tokens see the sinks, the memory and what they compress.

    Attributes:
        until: int64 ``[T]``: the last slot from which text may see each entry.
        kind: token kind of memory entries.
        sink: number of first raw tokens that stay.
        reads: whether memory tokens see text at all.
    """

    until: Tensor
    kind: int
    sink: int
    reads: bool = True

    def __call__(self, queries: Tokens, keys: Tokens) -> Tensor:
        held = queries.slot <= self.until[keys.slot]
        raw, memory = keys.kind == TEXT, keys.kind == self.kind
        own = keys.segment == queries.segment
        earlier = memory & (keys.segment < queries.segment) & held
        text = held & (raw | memory)
        is_sink = raw & (keys.raw < self.sink)
        made = (own & ((raw & self.reads) | (keys.kind == COMP))) | (is_sink & self.reads) | earlier
        mixed = own & (keys.kind == COMP) | (memory & (keys.segment == queries.segment - 1))
        return torch.where(
            queries.kind == TEXT, text, torch.where(queries.kind == COMP, made, mixed & (queries.kind == SUM))
        )


def budget_layout(
    method: StreamingBudget, n: int, n_comp: int, rule: Merge | Pool | None, with_memory: bool = True,
    reads: bool = True,
) -> Layout:
    """The layout of ``n`` tokens under a budget: with memory tokens, or as a plain window with equally many entries."""
    sink = method.sink
    most = n_comp if rule is not None else method.memory
    made = cuts(n, method, n_comp, most) if with_memory else window_cuts(n, method, n_comp)
    n_comp = n_comp if with_memory else 0
    special = [] if n_comp == 0 else [COMP] + ([SUM] if rule is not None else [])
    segment_of = torch.full((n,), len(made))
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # kind, raw, segment, row
    begin = 0
    for e, cut in enumerate(made):
        segment_of[cut.start : cut.stop] = e
    for e in range(len(made) + 1):
        stop = made[e].after + 1 if e < len(made) else n
        raw = torch.arange(begin, stop)
        parts.append((torch.full_like(raw, TEXT), raw, segment_of[begin:stop], torch.full_like(raw, -1)))
        begin = stop
        if e < len(made):
            row = torch.arange(n_comp)
            place, segment = torch.full_like(row, made[e].stop - 1), torch.full_like(row, e)
            parts += [(torch.full_like(row, kind_), place, segment, row) for kind_ in special]
    kind, raw, segment, row = (torch.cat([part[i] for part in parts]) for i in range(4))
    slot = torch.arange(len(kind))
    tokens = Tokens(slot, kind, raw, segment, row)
    ends = _ends(tokens, made)
    until = torch.full((len(kind),), _NEVER)
    leaves = (kind == TEXT) & (segment < len(made))
    until[leaves] = ends[segment[leaves]]
    memory_kind = COMP if rule is None else SUM
    lasts = 1 if rule is not None else most // max(1, n_comp)
    for e in range(len(made)):
        last = ends[e + lasts] if e + lasts < len(made) else _NEVER
        until[(kind == memory_kind) & (segment == e)] = last
    visibility = BudgetVisibility(until, memory_kind, sink, reads)
    chunks = [cut.stop - cut.start for cut in made]
    return Layout(
        tokens, raw + row + 1, visibility, n, next_segment=len(made),
        merge_plan=None if rule is None else rule.of(tokens, chunks, n_comp),
    )


def _ends(tokens: Tokens, made: list[Cut]) -> Tensor:
    """int64 ``[cuts]``: the last slot of each cut, which is the last that may see what the cut removes."""
    ends = tokens.slot[tokens.kind == TEXT][[cut.after for cut in made]]
    for e in range(len(made)):
        special = tokens.slot[(tokens.kind != TEXT) & (tokens.segment == e)]
        ends[e] = special[-1] if len(special) else ends[e]
    return ends
