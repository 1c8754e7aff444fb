"""What the checks are made on: a model, and some text cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from kvbench.data.documents import Document, embedded_documents
from kvbench.errors import UserError
from kvbench.methods import Method, make_method
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import resolve_model
from kvbench.probe.cached import sample
from kvbench.probe.probing import LENGTH, examine
from kvbench.protocols.block import cut_blocks
from kvbench.protocols.pieces import Piece, Tokenizer, make_tokenizer
from kvbench.protocols.scoring import BatchScore, score_pieces

BLOCK, BLOCKS = 256, 6
"""Tokens of a block (or the model's context if that is less), and number of blocks."""


def method_of(name: str, ratio: str) -> Method:
    """Create a method with a window that suits a block, and absolute positions."""
    return make_method(name, Fraction(ratio), {"window": "8", "positions": "absolute"})


@dataclass(frozen=True)
class Subject:
    """A model and the text that it is checked on.

    Attributes:
        documents: documents with their text, for the check of the cut.
        pieces: blocks of equal length, each from another document.
        tolerance: largest allowed difference, in nats per token.
        facts: result of a probe of the model, made for these checks.
    """

    loaded: Loaded
    tokenizer: Tokenizer
    documents: tuple[Document, ...]
    pieces: tuple[Piece, ...]
    tolerance: float
    facts: ModelFacts

    @property
    def device(self) -> torch.device:
        return next(self.loaded.model.parameters()).device

    @property
    def block(self) -> int:
        return len(self.pieces[0].ids)

    def score(
        self, name: str, ratio: str, pieces: list[Piece] | None = None, execution: str = "streamed", chunk: int = 64
    ) -> BatchScore:
        """Score blocks (all of them by default) under a method."""
        alike = [replace(piece, layout=3) for piece in pieces or self.pieces]  # so that they can share a session
        found, _ = score_pieces(self.loaded.model, method_of(name, ratio), alike, execution=execution, chunk=chunk)
        return found

    def ids(self) -> Tensor:
        return torch.tensor([piece.ids for piece in self.pieces], device=self.device)


def make_subject(model: str, revision: str | None, device: str, dtype: str) -> Subject:
    """Load and probe the model, and cut the embedded documents for it.

    Raises:
        UserError: it cannot be loaded, or its context is too short for any check.
    """
    loaded = load_model(resolve_model(model, revision), device, dtype)
    facts = examine(loaded.model, sample(loaded, min(LENGTH, loaded.context)))
    facts.check(model)
    where = next(loaded.model.parameters()).device
    if where.type == "cuda":
        torch.cuda.set_device(where)  # events are recorded on the current device
    documents = embedded_documents()
    tokenizer = make_tokenizer(loaded.tokenizer, "auto")
    block = min(BLOCK, loaded.context, facts.window or BLOCK)
    pieces = []
    for document in documents:
        found = [piece for piece in cut_blocks(document, tokenizer, block).pieces if len(piece.ids) == block]
        pieces += found[:1]
        if len(pieces) == BLOCKS:
            break
    if len(pieces) < 2:
        raise UserError(
            f"{model} reads so few or so many tokens at a time ({block}) that the embedded documents give no block.",
            "Examine another model.",
        )
    return Subject(loaded, tokenizer, documents, tuple(pieces), facts.tolerance, facts)
