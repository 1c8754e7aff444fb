"""Whether a policy can be used on a model: what cannot work is refused by name, before anything is read."""

from __future__ import annotations

from torch import nn

from kvbench.errors import UserError
from kvbench.methods.policies.policy import Policy
from kvbench.models.facts import OTHER_METHOD, ModelFacts
from kvbench.models.rope import frequencies


def check_policy(policy: Policy, model: nn.Module, name: str, facts: ModelFacts) -> None:
    """See that what the policy observes, and what it does to positions, is what the model does.

    Texts that some layers do not attend whole are refused for every method, where they are cut.

    Raises:
        UserError: it is not.
    """
    if facts.policy_refusal:
        raise UserError(f"{name}: {facts.policy_refusal} ({policy.name})", OTHER_METHOD)
    if policy.turned and frequencies(model) is None:
        raise UserError(
            f"{name} has learned positions, which cannot be counted anew in the cache.",
            "Use --set positions=absolute.",
        )
    if policy.takes_moments:
        frequencies(model)
    with policy.on(model):
        pass
