"""What an adapter does on text it was not trained on: perplexity by ratio, and recall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kvbench.cache.evicting import EvictingCache
from kvbench.data.documents import Document
from kvbench.data.rows import TEXT, read_rows
from kvbench.data.tasks import RecallSpec
from kvbench.errors import UserError
from kvbench.inference.layout_session import Reader
from kvbench.methods import METHODS, make_layout, make_method
from kvbench.models.adapter import Adapter
from kvbench.models.rope import fixed_rotations
from kvbench.protocols.pieces import MIN_TOKENS, Piece, Tokenizer
from kvbench.protocols.recall import recall_trials

RATIOS = ("0.3", "0.5", "0.7", "0.8", "0.9")
_TRIALS = RecallSpec(distances=(30, 120, 240, 400), trials=10, context=32)


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
    def from_file(cls, path: Path, hf_tokenizer: Any, length: int, most: int = 24, column: str = TEXT) -> HeldOut:
        """One block from the middle of each of the first ``most`` documents.

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
        try:
            trials = [c.pieces[0] for _, c in recall_trials(tuple(documents), tokenizer, _TRIALS, 0)]
        except UserError:  # texts too short to hide a fact in: perplexity alone is measured
            trials = []
        if not blocks:
            raise UserError(f"{path} has no text of {MIN_TOKENS} tokens to measure on.")
        return cls(tuple(blocks), tuple(trials))

    def measure(
        self, model: nn.Module, adapter: Adapter | None, method: str, ratios: Sequence[str] = RATIOS,
        options: dict[str, str] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Nats per token and recall accuracy, by the ratios that the method can reach."""
        reader = Reader(model, adapter)
        device = next(model.parameters()).device
        found = {}
        with torch.inference_mode(), reader.ready():
            for ratio in ratios if METHODS[method].takes_ratio else ("0",):
                kind = make_method(method, Fraction(ratio), options)
                try:
                    kind.check(min(map(len, self.blocks)), in_chunks=False)
                except UserError:  # out of this method's reach
                    continue
                nll = tokens = 0.0
                for i, block in enumerate(self.blocks):
                    ids = torch.tensor([block], device=device)
                    layout = make_layout(kind, len(block), 0, i % 16)
                    with fixed_rotations(model, len(block)):
                        logits = reader.one_pass(ids, layout, slice(0, -1))[0].float()
                    nll += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
                    tokens += len(block) - 1
                correct = 0
                for piece in self.trials:
                    ids = torch.tensor([piece.ids], device=device)
                    layout = make_layout(kind, piece.context, 0, piece.layout)
                    cache = EvictingCache()
                    with fixed_rotations(model, len(piece.ids)):
                        for _ in reader.stream(ids[:, : piece.context], layout, cache, len(layout)):
                            pass
                        logits = reader.go_on(ids[:, piece.context : -1], piece.context, cache)
                    answer = ids[0, piece.scored :]
                    correct += int((logits[0, -len(answer) :].argmax(-1) == answer).all())
                found[ratio] = {"nll": round(nll / tokens, 4)}
                if self.trials:
                    found[ratio]["recall"] = round(correct / len(self.trials), 3)
        return found
