"""A cache for transformers' own ``generate``: rows of equal length share a session of the method.

``generate`` calls the model with this cache; what it feeds is handed to sessions, which read it and remove entries as
in every other measurement of kvbench. Rows are read without their padding, so that a left-padded row has the positions
and keeps the entries that it would have alone.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kvbench.errors import UserError
from kvbench.inference.opening import Text, joined, open_session
from kvbench.inference.row_group import CacheUsage, RowGroup
from kvbench.inference.session import Session
from kvbench.methods import Method
from kvbench.models.adapter import Adapter
from kvbench.models.rope import dynamic_rotary

PREFILL, DECODE, BOTH = "prefill", "decode", "both"
LAYOUTS = 16
"""Number of random layouts that the texts of a run are spread over."""


@dataclass(frozen=True)
class Compression:
    """What is done to the cache of a model.

    Attributes:
        during: remove entries when the context has been read (``prefill``), while tokens are generated (``decode``), or
            ``both``.
        seed: seed of random layouts and draws.
    """

    model: nn.Module
    method: Method
    adapter: Adapter | None = None
    during: str = PREFILL
    seed: int = 0

    @property
    def shared(self) -> dict[int, Any]:
        """A memo for ``copy.deepcopy``: what copies of a cache share instead of copying it."""
        return {id(thing): thing for thing in (self, self.model, self.method, self.adapter) if thing is not None}


class CompressedCache(Cache):  # type: ignore[misc]
    """The cache of one batch, as ``generate`` sees it: its length is the number of columns read, padding included.

    Attributes:
        columns: of the prompt that it is opened for; entries are removed once all of them have been fed.
        planned: columns of prompt and generated tokens together, at most.
        mask: bool ``[batch, columns]``, False for padding; None before the prompt has been fed.
        groups: the rows, by length.
    """

    is_compileable = False

    def __init__(self, compression: Compression, columns: int, planned: int, chunk: int | None = None) -> None:
        super().__init__(layers=[])
        self.compression, self.columns, self.planned, self.chunk = compression, columns, planned, chunk
        self.mask: Tensor | None = None
        self.groups: list[RowGroup] = []
        self.fed: list[Tensor] = []
        self.seen = 0
        self.is_broken = False

    def feed(self, ids: Tensor, mask: Tensor | None, wanted: int) -> Tensor:
        """Read the next columns of all rows.

        Args:
            ids: int64 ``[batch, m]``.
            mask: ``[batch, columns so far]``, 0 for padding; None for no padding.
            wanted: number of last columns whose logits are returned.

        Returns:
            Logits ``[batch, wanted, vocabulary]``; not computed (zeros) before the whole prompt has been fed.
        """
        if self.is_broken:
            raise UserError("An earlier call failed while this cache was read.", "Begin with a new one.")
        self.is_broken = True
        logits = self._feed(ids, mask, wanted)
        self.is_broken = False
        return logits

    def _feed(self, ids: Tensor, mask: Tensor | None, wanted: int) -> Tensor:
        if self.groups:
            self._check_continuation(ids, mask)
            self.seen += ids.shape[1]
            return self._go_on(ids, wanted)
        self.seen += ids.shape[1]
        self.fed.append(ids)
        if self.seen < self.columns:  # the prompt comes in chunks
            return torch.zeros(len(ids), 1, 1, device=ids.device)
        whole = torch.cat(self.fed, 1)
        self.fed = []
        self.mask = torch.ones_like(whole, dtype=torch.bool) if mask is None else mask.bool()
        return self._read_prompt(whole, self.mask, wanted)

    def _read_prompt(self, ids: Tensor, mask: Tensor, wanted: int) -> Tensor:
        lengths = mask.sum(1).tolist()
        if len(set(lengths)) > 1 and dynamic_rotary(self.compression.model):
            raise UserError(
                f"The rotations of {type(self.compression.model).__name__} depend on the length of the text, and rows "
                "are of unequal length.", "Generate them one by one.",
            )
        if not all(length and bool(row[-length:].all()) for row, length in zip(mask, lengths, strict=True)):
            raise UserError(
                "A row of the batch is padded on the right, in the middle, or all over.",
                "Pad on the left: tokenizer.padding_side = 'left'.",
            )
        out: Tensor | None = None
        for (length, _), rows in _together(ids, lengths, self.compression.method).items():
            texts = ids[rows, ids.shape[1] - length :]
            session = self.open_group(rows, length, [seed_of(text) for text in texts]).session
            logits = torch.cat([part.logits for part in session.prefill(texts, max(0, length - wanted))], 1)
            if out is None:
                out = logits.new_zeros(len(ids), wanted, logits.shape[-1])
            out[rows, -logits.shape[1] :] = logits
        assert out is not None
        return out

    def open_group(self, rows: Sequence[int], length: int, seeds: Sequence[int]) -> RowGroup:
        """Open a session for rows of one length, which have not been read yet."""
        setting = self.compression
        planned = length if setting.during == PREFILL else length + self.planned - self.columns
        session = open_session(
            setting.model, setting.method, Text(length, planned, tuple(seeds), has_continuation=True),
            adapter=setting.adapter, seed=setting.seed, chunk=self.chunk or length, at_once=self.chunk is None,
            compresses_context=setting.during != DECODE,
        )
        device = next(setting.model.parameters()).device
        self.groups.append(RowGroup(torch.tensor(rows, device=device), session, length, tuple(seeds)))
        return self.groups[-1]

    def _go_on(self, ids: Tensor, wanted: int) -> Tensor:
        setting = self.compression
        groups = [(group.rows, group.session) for group in self.groups]
        together = joined(setting.model, groups) if ids.shape[1] == 1 else None
        if together is not None:
            return together.feed(ids, removes=setting.during != PREFILL)
        out: Tensor | None = None
        for group in self.groups:
            logits = self._advance(group.session, ids[group.rows])[:, -wanted:]
            if len(self.groups) == 1:
                return logits
            if out is None:
                out = logits.new_zeros(len(ids), *logits.shape[1:])
            out[group.rows] = logits
        assert out is not None
        return out

    def _advance(self, session: Session, ids: Tensor) -> Tensor:
        if self.compression.during == PREFILL:
            parts = [part.logits for part in session.extend(ids)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return torch.stack([session.step(column) for column in ids.unbind(1)], 1)

    def _check_continuation(self, ids: Tensor, mask: Tensor | None) -> None:
        """Check that new tokens follow what has been read, in the same rows.

        Raises:
            UserError: they do not, or the positions of the model depend on the length of the whole text.
        """
        assert self.mask is not None
        if len(ids) != self.rows:
            raise UserError(
                f"The cache holds {self.rows} rows, and {len(ids)} are continued.",
                "Repeat rows before the prompt is read: several return sequences need a prompt of their own.",
            )
        if mask is None:
            if not bool(self.mask.all()):
                raise UserError("A padded context is continued without its mask.", "Give the mask of the whole text.")
        elif not torch.equal(mask[:, : self.mask.shape[1]].bool(), self.mask):
            raise UserError("The mask of the context is not that under which it was read.", "Leave it as it was.")
        elif not bool(mask[:, self.mask.shape[1] :].all()):
            raise UserError("Tokens after a compressed context are padded.", "Ask rows of equal length, or one row.")
        if self.seen + ids.shape[1] > self.planned and dynamic_rotary(self.compression.model):
            raise UserError(
                f"The rotations of {type(self.compression.model).__name__} depend on the length of the whole text, "
                f"which was taken to be {self.planned} tokens.", "Read the whole text in one call.",
            )

    @property
    def rows(self) -> int:
        return 0 if self.mask is None else len(self.mask)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies of a row next to each other."""
        assert self.mask is not None, "nothing has been read"
        self.mask = self.mask.repeat_interleave(repeats, 0)
        for group in self.groups:
            group.expand(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        raise UserError("Rows of a compressed cache cannot be selected.", "Select the rows of the prompt.")

    def reset(self) -> None:
        raise UserError("A compressed cache cannot be emptied.", "Begin with a new one.")

    def __deepcopy__(self, memo: dict[int, Any]) -> CompressedCache:
        """A cache that goes on from here by itself; model and method are shared."""
        memo |= self.compression.shared
        made = CompressedCache.__new__(CompressedCache)
        memo[id(self)] = made
        for name, value in vars(self).items():
            setattr(made, name, copy.deepcopy(value, memo))
        return made

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: sessions store the entries.

        Raises:
            UserError: always.
        """
        raise UserError("A compressed cache is filled by the model that is compressed, inside its block.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise UserError("A compressed cache does not follow beams.", "Sample, or decode greedily.")

    def crop(self, max_length: int) -> None:
        raise UserError(
            "A compressed cache cannot be cropped: removed entries do not return.",
            "Do without assisted decoding and prompt lookup.",
        )

    def copy(self) -> CompressedCache:
        """A cache that goes on from here by itself; model and method are shared."""
        return copy.deepcopy(self)

    def usage(self) -> CacheUsage:
        """What the cache holds now."""
        assert self.mask is not None, "nothing has been read"
        generated = self.seen - self.mask.shape[1]
        return CacheUsage.over([group.usage(generated) for group in self.groups])


def seed_of(text: Tensor) -> int:
    """A number from 0 to 15 that depends on the ids of a text only."""
    content = text.cpu().numpy().astype("<i8").tobytes()
    return hashlib.sha256(content).digest()[0] % LAYOUTS


def _together(ids: Tensor, lengths: Sequence[int], method: Method) -> dict[tuple[int, int], list[int]]:
    """Rows that can share a session: by length, and under a random layout by seed."""
    found: dict[tuple[int, int], list[int]] = {}
    for row, length in enumerate(lengths):
        seed = seed_of(ids[row, ids.shape[1] - length :]) if method.seeded else 0
        found.setdefault((length, seed), []).append(row)
    return found
