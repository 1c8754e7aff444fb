"""Which judges a user asked for; without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvbench.models.references import ModelReference

NOTHING, SENTENCES = "none", "encoder"
ENCODER = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class JudgeChoice:
    """What the user asked of the judges.

    Attributes:
        scorer: name of the language model that fluency is measured with; ``itself`` for the
            uncompressed model that is measured, ``none`` for no fluency.
        encoder: whether texts are turned into vectors.
        features: what MAUVE compares: ``encoder`` (those vectors), or the name of a causal language
            model whose last states it takes; ``none`` for no MAUVE.
        mauve_asked: it was asked for by name, so that too few documents are an error.
        models: the language models among them, by name: those that the cells' options name.
    """

    scorer: str = NOTHING
    encoder: bool = False
    features: str = NOTHING
    mauve_asked: bool = False
    models: dict[str, ModelReference] = field(default_factory=dict)

    @classmethod
    def load(cls, raw: dict[str, Any]) -> JudgeChoice:
        """From what ``dataclasses.asdict`` made of it."""
        return cls(**{**raw, "models": {name: ModelReference(**model) for name, model in raw["models"].items()}})
