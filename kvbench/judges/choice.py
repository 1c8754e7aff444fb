"""The judges that the user asked for; needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvbench.models.references import ModelReference

NOTHING, SENTENCES = "none", "encoder"
ENCODER = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class JudgeChoice:
    """The judges that the user asked for.

    Attributes:
        scorer: name of the language model that measures fluency; ``itself`` for the model under test
            with its full cache, ``none`` for no fluency.
        encoder: whether sentence embeddings of the texts are computed.
        features: what MAUVE compares: ``encoder`` (the sentence embeddings), or the name of a causal
            language model whose last hidden states are used; ``none`` for no MAUVE.
        mauve_asked: whether MAUVE was asked for explicitly, so that too few documents are an error.
        models: the language models named in ``scorer`` and ``features``, by these names.
    """

    scorer: str = NOTHING
    encoder: bool = False
    features: str = NOTHING
    mauve_asked: bool = False
    models: dict[str, ModelReference] = field(default_factory=dict)

    @classmethod
    def load(cls, raw: dict[str, Any]) -> JudgeChoice:
        """Restore a choice from the output of ``dataclasses.asdict``."""
        return cls(**{**raw, "models": {name: ModelReference(**model) for name, model in raw["models"].items()}})
