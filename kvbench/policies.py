"""Whether a policy can be used on a model: what cannot work is refused by name, before anything is read."""

from __future__ import annotations

from torch import nn

from kvbench.errors import UserError
from kvbench.methods.policy import Policy
from kvbench.models.rotary import frequencies


def check_policy(policy: Policy, model: nn.Module, name: str) -> None:
    """See that what the policy observes, and what it does to positions, is what the model does.

    Sliding windows that are shorter than the text are refused for every method, where the text is cut; models
    without transformers' attention interface where they are loaded.

    Raises:
        UserError: it is not.
    """
    if getattr(model.config, "attn_logit_softcapping", None) is not None:
        raise UserError(
            f"{name} caps the logits of its attention, and {policy.name} would be given others.",
            "Use a method whose layout is known beforehand, such as sinks.",
        )
    if any(key.rpartition(".")[2] == "sinks" for key, _ in model.named_parameters()):
        raise UserError(
            f"{name} attends learned sinks beside its entries, which {policy.name} does not know.",
            "Use a method whose layout is known beforehand, such as sinks.",
        )
    if policy.turned and frequencies(model) is None:
        raise UserError(
            f"{name} has learned positions, which cannot be counted anew in the cache.",
            "Use --set positions=absolute.",
        )
    if policy.takes_moments:
        frequencies(model)
    with policy.on(model):
        pass
