"""A learnt prompt in the place of every chunk: the control of memories that are made from text."""

from __future__ import annotations

from dataclasses import dataclass

from kvbench.methods.layouts.ccm import Streaming
from kvbench.methods.layouts.chunked import ChunkVisibility
from kvbench.methods.layouts.layout import COMP


@dataclass(frozen=True)
class Prompt(Streaming):
    """Replaces each chunk by ``n_comp`` trained entries that have never seen any text.

    The layout is that of ``ccm-concat``: as many entries, at the same positions, seen by the same tokens. But COMP
    tokens see each other and those of earlier chunks only, so that what a memory gains over this one is what it has
    taken from the text; the rest is what trained rows do to a model by themselves. Under ``budget=160`` the same holds
    of the streaming form.
    """

    name = "prompt"
    summary = "trained entries in the place of each chunk that have seen no text: the control of memories"
    adapter_kinds = ("gated", "plain", "full")

    def visibility(self, chunks: int) -> ChunkVisibility:
        return ChunkVisibility(chunks, text=True, memory=True, latest=False, kind=COMP, reads=False)
