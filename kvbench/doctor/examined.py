"""What is examined: a model with some text, cut into blocks."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from kvbench.data.documents import Document, embedded_documents
from kvbench.errors import UserError
from kvbench.methods import Layout, make_layout, make_method
from kvbench.methods.policies.policy import Policy
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import resolve_model
from kvbench.probe.asking import LENGTH, examine
from kvbench.probe.kept import sample
from kvbench.protocols.pieces import Piece, Tokenizer, cut_blocks, make_tokenizer
from kvbench.protocols.score_policy import score_policed
from kvbench.protocols.scoring import BatchScore, score_batch

BLOCK, BLOCKS = 256, 6
"""Tokens of a block, or the model's context if that is less, and how many are read."""

def policy_of(method: str, ratio: str) -> Policy:
    """With windows that suit a block."""
    policy = make_method(method, Fraction(ratio), {"window": "8", "positions": "absolute"}).policy
    assert policy is not None, "it is one"
    return policy


@dataclass(frozen=True)
class Subject:
    """A model and what it is examined with.

    Attributes:
        documents: with their text, for the check of the cut.
        pieces: blocks of equal length, each of another document.
        tolerance: nats per token.
        facts: what a probe of the model has shown, just now.
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

    def layout(self, method: str, ratio: str, which: int = 3) -> Layout:
        return make_layout(make_method(method, Fraction(ratio)), self.block, 0, which)

    def score(
        self, layout: Layout, pieces: list[Piece] | None = None, execution: str = "streamed", chunk: int = 64
    ) -> BatchScore:
        """Score blocks (all of them by default) under a layout."""
        score, _ = score_batch(
            self.loaded.model, None, layout, list(pieces or self.pieces), None, execution, chunk
        )
        return score

    def score_policy(self, method: str, ratio: str, pieces: list[Piece] | None = None) -> BatchScore:
        """Score blocks (all of them by default) under a policy, what it removes really removed."""
        return score_policed(
            self.loaded.model, policy_of(method, ratio), list(pieces or self.pieces), None, self.block, 0
        )

    def ids(self) -> Tensor:
        return torch.tensor([piece.ids for piece in self.pieces], device=self.device)


def make_subject(model: str, revision: str | None, device: str, dtype: str) -> Subject:
    """Load the model, and cut the embedded documents for it.

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
