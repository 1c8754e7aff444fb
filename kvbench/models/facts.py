"""What is known of a model once it has been probed, and what follows from it for a request."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kvbench.errors import UserError

OTHER_METHOD = "Use a method whose layout is known beforehand, such as sinks."


@dataclass(frozen=True)
class ModelFacts:
    """What a probe found.

    Attributes:
        kind: class of the model.
        refusal: why no number of this model would be right, as a sentence; empty if numbers are.
        forward_refusal: why not even its own forward pass gives a likelihood; empty if it does.
        policy_refusal: why policies cannot be used on it, likewise.
        window: the longest text that every layer attends whole; None if there is no such bound.
        window_setting: what the configuration calls it, such as ``sliding_window``.
        needs_ids: predictions rest on more than the embeddings of the tokens, so that nothing can be fed but text.
        learned: places are part of what is read, and not only of queries and keys.
        mark: how the model enters the signature of a number; empty for most.
        apart: how far the ways to the same number lay apart at most, in nats per token.
        tolerance: how far they may, by the precision of the weights and by what two kernels differ in.
        seconds: what the probe took.
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
        """From what ``as_dict`` made of it.

        Raises:
            TypeError: something is too much, or of another type.
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
        """See that numbers of the model can be right at all.

        Raises:
            UserError: they cannot.
        """
        if self.refusal:
            raise UserError(f"{model}: {self.refusal}", "Choose another model; 'kvbench doctor' says more.")

    def check_length(self, model: str, longest: int, remedy: str) -> None:
        """See that every layer attends the whole of a text.

        Raises:
            UserError: some see less of it.
        """
        if self.window is not None and self.window < longest:
            raise UserError(
                f"{model} attends within {self.window_setting} {self.window} in some of its layers, shorter than "
                f"the {longest} tokens of a sequence: its full cache is already compressed.", remedy,
            )

    def check_embeddings(self, model: str, method: str) -> None:
        """See that special tokens can be fed, which have embeddings and no ids.

        Raises:
            UserError: the model looks more up by id than embeddings.
        """
        if self.needs_ids:
            raise UserError(
                f"{model} ({self.kind}) looks more up by token id than its embeddings, and the special tokens of "
                f"{method} have none.", "Use a method without an adapter.",
            )
