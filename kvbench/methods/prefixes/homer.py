"""Hierarchical context merging (Song et al., ICLR 2024, arXiv 2404.10308)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from kvbench.errors import UserError
from kvbench.methods.base import Method
from kvbench.methods.budget import kept, ratio_text
from kvbench.methods.options import option

WARM = Fraction(3, 8)
"""Share of the layers that every chunk is read through before anything is dropped, as published for 32 layers."""


@dataclass(frozen=True)
class MergePlan:
    """How a context is cut, read and merged.

    Attributes:
        sinks: first tokens, which every chunk begins with.
        chunk: tokens of the text between, in each of ``2 ** len(levels)`` chunks.
        suffix: last tokens, which every chunk ends with.
        held: tokens of the text between that a merged chunk keeps.
        levels: layers before which chunks are merged in pairs, ascending.
    """

    sinks: int
    chunk: int
    suffix: int
    held: int
    levels: tuple[int, ...]

    @property
    def entries(self) -> int:
        """Entries that are held in the end, in every layer."""
        return self.sinks + self.held + self.suffix

    @property
    def positions(self) -> int:
        """Position of the text that follows: one past the suffix, which stands behind the place of a whole chunk."""
        return self.sinks + self.chunk + self.suffix


@dataclass(frozen=True)
class Homer(Method):
    """Reads a context in chunks that are merged in pairs from layer to layer, until kept(P, r) entries are left.

    The context is cut into chunks, each between the first ``sinks`` and the last ``suffix`` tokens of the context, with
    positions that begin anew. After every few layers each chunk drops the tokens that the last token of its suffix pays
    least attention to (the largest logit over the heads of that layer), about half, and is merged with its neighbour;
    sinks and suffix of both are averaged. A token that is dropped leaves the caches of the layers below, too. What
    follows is read from the position behind the suffix, so that positions stay within a chunk's length.

    Departures from the released code: no bias of the logits by distance, which is calibrated on other text there; all
    chunks of a level are read at once, instead of depth first, so that the peak is that of the whole context; sinks and
    suffix stand for the parts of the prompt around the document; tokens that chunks of equal length leave over belong
    to the suffix. There is no training.
    """

    name = "homer"
    summary = "chunks of a context, thinned and merged in pairs from layer to layer; only for what follows it"
    paper = "arXiv 2404.10308"
    position_rule = "cache"
    needs_continuation = True

    sinks: int = option(4, "first tokens of the context that every chunk begins with")
    suffix: int = option(32, "last tokens, that every chunk ends with and by which the others are chosen", least=1)

    def plan(self, n: int, layers: int) -> MergePlan:
        """How a context of ``n`` tokens is read by a model of so many layers.

        Raises:
            UserError: the ratio keeps no token besides sinks and suffix.
        """
        self.check_kept(n)
        sinks, suffix = min(self.sinks, n - 1), min(self.suffix, n - min(self.sinks, n - 1))
        text, held = n - sinks - suffix, kept(n, self.ratio) - sinks - suffix
        if text == held:
            return MergePlan(sinks, text, suffix, text, ())
        warm = math.floor(layers * WARM)
        height = min(max(1, round(math.log2(text / held))), layers - warm - 1)
        if height < 1:
            raise UserError("homer merges chunks between layers, and the model has one.", "Use another method.")
        over = text % 2**height  # these belong to the suffix
        per_level = (layers - warm) // (height + 1)
        first = layers - per_level * height
        return MergePlan(
            sinks, text // 2**height, suffix + over, held - over,
            tuple(first + per_level * level for level in range(height)),
        )

    def check_kept(self, n: int) -> None:
        least = self.sinks + self.suffix + 16
        if self.ratio and kept(n, self.ratio) < least:
            raise UserError(
                f"homer at ratio {ratio_text(self.ratio)} keeps {kept(n, self.ratio)} of {n} tokens, and its sinks, "
                f"suffix and the text between need {least}.",
                "Ask for a lower ratio, or a smaller --set suffix=.",
            )
