"""Held-out evaluation of an adapter: perplexity and recall at several ratios."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kvbench.data.documents import Document
from kvbench.data.rows import TEXT, read_rows
from kvbench.errors import UserError
from kvbench.methods import LAYOUT_IDS, METHODS, make_method
from kvbench.methods.budget import parse_ratio
from kvbench.models.adapter import Adapter
from kvbench.protocols.pieces import MIN_TOKENS, Piece, Tokenizer
from kvbench.protocols.scoring import score_pieces

RATIOS = ("0.3", "0.5", "0.7", "0.8", "0.9")
DOCUMENTS = 24
_WHOLE = 1 << 16
"""Tokens that are fed at a time: more than any text has."""


@dataclass(frozen=True)
class HeldOut:
    """Blocks of held-out text and recall trials made from it.

    Attributes:
        blocks: token ids, one block per document.
        trials: recall pieces.
    """

    blocks: tuple[tuple[int, ...], ...]
    trials: tuple[Piece, ...]

    @classmethod
    def from_file(
        cls, path: Path, hf_tokenizer: Any, length: int, most: int = DOCUMENTS, column: str = TEXT, recall: bool = True,
    ) -> HeldOut:
        """One block from the middle of each of the first ``most`` documents.

        Args:
            recall: whether to make recall trials as well.

        Raises:
            UserError: the file cannot be read.
        """
        tokenizer = Tokenizer(hf_tokenizer, None)
        blocks, documents = [], []
        for row in read_rows(path, column)[:most]:
            text = row["text"][len(row["text"]) // 2 :][: 12 * length]
            ids = tokenizer.encode(text)[0][:length]
            if len(ids) >= MIN_TOKENS:
                blocks.append(tuple(ids))
                documents.append(Document(row["id"], row["id"], text))
        trials = _trials(tuple(documents), tokenizer) if recall else []
        if not blocks:
            raise UserError(f"{path} has no text of {MIN_TOKENS} tokens to measure on.")
        return cls(tuple(blocks), tuple(trials))

    def reached(self, method: str, ratios: Sequence[str], options: dict[str, str] | None = None) -> list[str]:
        """The ratios that a method can reach on all of the text."""
        found = []
        for ratio in ratios if "ratio" in METHODS[method].budgets else ("0",):
            kind = make_method(method, parse_ratio(ratio), options)
            with suppress(UserError):
                for length in {len(ids) for ids in self.blocks}:
                    kind.check(length, in_chunks=False)
                    kind.check_kept(length)
                    kind.check_text(length, 0, 0)
                for piece in self.trials:
                    kind.check_text(piece.context, 0, 0)
                found.append(ratio)
        return found

    def measure(
        self, model: nn.Module, adapter: Adapter | None, method: str, ratios: Sequence[str] = RATIOS,
        options: dict[str, str] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Nats per token and recall accuracy, for each ratio that the method can reach on all of the text.

        Args:
            method: a layout method or a policy; a policy is scored while it removes entries.

        Raises:
            RuntimeError: the model's predictions are not finite.
        """
        found = {}
        blocks = [Piece(str(i), ids, len(ids), 1, 0, i % LAYOUT_IDS) for i, ids in enumerate(self.blocks)]
        for ratio in self.reached(method, ratios, options):
            kind = make_method(method, parse_ratio(ratio), options)
            scored, answered = (
                [score_pieces(model, kind, [piece], adapter=adapter, chunk=_WHOLE)[0] for piece in pieces]
                for pieces in (blocks, self.trials)
            )
            tokens = sum(score.nll.numel() for score in scored)
            found[ratio] = {"nll": round(sum(float(score.nll.sum()) for score in scored) / tokens, 4)}
            if answered:
                found[ratio]["recall"] = round(sum(bool(score.hit.all()) for score in answered) / len(answered), 3)
        return found


def _trials(documents: tuple[Document, ...], tokenizer: Tokenizer) -> list[Piece]:
    """Recall trials in the documents; none if they are too short to hide a fact in."""
    from kvbench.data.tasks import RecallSpec  # needs pydantic, which GPU machines may lack
    from kvbench.protocols.recall import recall_trials

    spec = RecallSpec(distances=(30, 120, 240, 400), trials=10, context=32)
    with suppress(UserError):
        return [cut.pieces[0] for _, cut in recall_trials(documents, tokenizer, spec, 0)]
    return []
