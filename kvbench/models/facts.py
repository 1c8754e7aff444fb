"""What a probe found out about a model, and the requests that this rules out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UserError

OTHER_METHOD = "Use a method whose layout is known beforehand, such as sinks."


@dataclass(frozen=True)
class ModelFacts:
    """Results of probing a model.

    Attributes:
        kind: class name of the model.
        refusal: why the model cannot be measured, as a sentence; empty if it can.
        forward_refusal: why not even its own forward pass gives a valid likelihood; empty if it does.
        policy_refusal: why cache policies cannot be used on it; empty if they can.
        window: length of the longest text that every layer attends in full; None if there is no such limit.
        window_setting: name of the window in the configuration, such as ``sliding_window``.
        needs_ids: predictions depend on token ids beyond the input embeddings, so that only text tokens can be fed.
        learned: positions change the hidden states (learned embeddings), and not only queries and keys.
        mark: what the model adds to the signature of a result, such as ``|rope:by layer``; empty for most models.
        apart: largest difference between two ways to compute the same likelihoods, in nats per token.
        tolerance: accepted difference, from the dtype of the weights and the difference between two kernels.
        seconds: duration of the probe.
    """

    kind: str
    refusal: str = ""
    forward_refusal: str = ""
    policy_refusal: str = ""
    window: int | None = None
    window_setting: str = "window"
    needs_ids: bool = False
    learned: bool = False
    mark: str = ""
    apart: float = 0.0
    tolerance: float = 1e-4
    seconds: float = 0.0

    @classmethod
    def load(cls, raw: dict[str, Any]) -> ModelFacts:
        """Restore facts from the output of ``as_dict``.

        Raises:
            TypeError: a field is unknown, or has another type.
        """
        facts = cls(**raw)
        for name, value in facts.as_dict().items():
            usual = getattr(cls, name, "")
            if type(value) is not type(usual) and not (name == "window" and type(value) is int):
                raise TypeError(f"{name} is {value!r}")
        return facts

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, model: str) -> None:
        """Check that the model can be measured.

        Raises:
            UserError: it cannot.
        """
        if self.refusal:
            raise UserError(f"{model}: {self.refusal}", "Choose another model; 'kvbench doctor' says more.")

    def check_length(self, model: str, longest: int, remedy: str) -> None:
        """Check that every layer attends a text of ``longest`` tokens in full.

        Raises:
            UserError: some layers attend less of it.
        """
        if self.window is not None and self.window < longest:
            raise UserError(
                f"{model} attends within {self.window_setting} {self.window} in some of its layers, shorter than "
                f"the {longest} tokens of a sequence: its full cache is already compressed.", remedy,
            )

    def check_embeddings(self, model: str, method: str) -> None:
        """Check that special tokens can be fed, which have embeddings but no ids.

        Raises:
            UserError: the model uses token ids beyond its input embeddings.
        """
        if self.needs_ids:
            raise UserError(
                f"{model} ({self.kind}) looks more up by token id than its embeddings, and the special tokens of "
                f"{method} have none.", "Use a method without an adapter.",
            )
