"""Checks of what is assumed about a model: its rotary embeddings, its bytes, and the attention that policies see."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from kvbench.cache.shape import cache_shape
from kvbench.doctor.checks import Check, policies
from kvbench.doctor.examined import Subject, method_of
from kvbench.doctor.replay import removed_and_masked
from kvbench.errors import UserError
from kvbench.inference.policy_session import PolicySession
from kvbench.methods.policies.policy import CachePolicy
from kvbench.models.attention import plain_attention
from kvbench.models.attention_hooks import LISTENER, AttentionCall
from kvbench.models.rope import FAR, fixed_rotations, fresh_rotations, inv_freq_by_layer, pairwise_distance, rotated

_PLACES = (3, 17, 2003)
"""Positions at which a token is read alone, as far as the model's context goes."""


def rotations_are_those_of_one_pass(subject: Subject) -> Check:
    """Keys that are stored early in a long text equal those of one pass over the whole text."""
    with fresh_rotations(subject.loaded.model):
        whole = _keys_at(subject, (0, 1, 2, FAR))
    with fixed_rotations(subject.loaded.model, FAR + 1):
        early = _keys_at(subject, (0, 1, 2))
    worst = max(
        (_relative(a[:, :, :3], b[:, :, :3]) for a, b in zip(whole, early, strict=True) if a.shape[1] == b.shape[1]),
        default=0.0,
    ) if not subject.facts.learned else 0.0
    return Check(
        "rotations are those of one pass", worst <= _near(subject), f"keys differ by {worst:.1e}",
        "Its rotations depend on how long a text is: numbers of long texts would be wrong.",
    )


def layers_rotate_as_assumed(subject: Subject) -> Check:
    """Every layer rotates keys as assumed by methods that rotate keys again."""
    name, worst = "layers turn keys as assumed", 0.0
    with fixed_rotations(subject.loaded.model, subject.block):  # some rotations depend on the length
        try:
            inv_freq = inv_freq_by_layer(subject.loaded.model)
        except UserError as error:
            return Check(name, True, f"methods that turn keys are refused: {error.message}", "")
        if inv_freq is None:
            return Check(name, True, "positions are learned: methods that turn keys are refused", "")
        start, *others = [place for place in _PLACES if place < max(subject.loaded.context, _PLACES[1] + 1)]
        first = _keys_at(subject, (start,))
        for place in others:
            for speed, here, there in zip(inv_freq, first, _keys_at(subject, (place,)), strict=True):
                angle = (place - start) * (torch.zeros(1) if speed is None else speed)[None].to(here.device)
                worst = max(worst, pairwise_distance(rotated(here, angle.cos(), angle.sin()), there, speed))
    return Check(
        name, worst <= _near(subject), f"keys differ by {worst:.1e} after a turn",
        "Use --set positions=absolute and merge_at=rotated on this model.",
    )


def bytes_are_those_cached(subject: Subject) -> Check:
    """An entry takes as many bytes as in the cache of transformers."""
    ids, cache = subject.ids()[:1], DynamicCache()
    with torch.inference_mode():
        subject.loaded.model(input_ids=ids, past_key_values=cache, use_cache=True)
    theirs = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / ids.shape[1]
    ours = cache_shape(subject.loaded.model).entry_bytes
    return Check(
        "bytes are those cached", ours == theirs, f"{ours} bytes per entry, {theirs:g} in the cache of transformers",
        "Budgets in bytes would be wrong on this model: use ratios.",
    )


def chosen_is_masked(subject: Subject) -> Check:
    """Removing entries under a policy, and one pass under a mask of what it kept, give the same scores."""
    name, worst, at = "what policies chose is masked", 0.0, ""
    for method, ratio in policies(subject):
        removed, masked = _both_ways(subject, method, ratio)
        apart = float((removed - masked).abs().mean())
        worst, at = max((worst, at), (apart, f" ({method})"))
    if subject.facts.policy_refusal:
        return Check(name, True, f"policies are refused: {subject.facts.policy_refusal}", "")
    return Check(
        name, worst <= subject.tolerance, f"differs by {worst:.1e} nats{at}",
        "Results of policies on this model must not be trusted: use methods with a layout.",
    )


def policies_see_attention(subject: Subject) -> Check:
    """The attention that policies choose by equals the attention of the model's own eager code."""
    name = "policies see the model's attention"
    if subject.facts.policy_refusal:
        return Check(name, True, f"policies are refused: {subject.facts.policy_refusal}", "")
    model, ids = subject.loaded.model, subject.ids()[:1]
    with torch.inference_mode(), fixed_rotations(model, ids.shape[1]):
        run = PolicySession(model, _policy("h2o", "0"), ids.shape[1], (0,))
        for _ in run.prefill(ids):
            pass
        with plain_attention(model):
            own = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    if not own or any(weights is None for weights in own):
        return Check(name, True, "the model does not show its attention", "")
    worst = 0.0
    for weights, layer in zip(own, run.cache.layers, strict=True):
        sums = weights.float().sum(2)
        wanted = sums.view(1, layer.sums.shape[1], -1, sums.shape[-1]).sum(2)
        worst = max(worst, _relative(layer.sums, wanted))
    return Check(
        name, worst <= _near(subject), f"sums of attention differ by {worst:.1e}",
        "Results of policies on this model must not be trusted: use methods with a layout.",
    )


def _policy(name: str, ratio: str) -> CachePolicy:
    found = method_of(name, ratio)
    assert isinstance(found, CachePolicy)
    return found


def _both_ways(subject: Subject, method: str, ratio: str) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every token but the first, in nats, with entries removed and with them masked."""
    model, ids = subject.loaded.model, subject.ids()[:2]
    with torch.inference_mode(), fixed_rotations(model, ids.shape[1]):
        both = removed_and_masked(model, _policy(method, ratio), ids)
    log_p = (logits[:, :-1].float().log_softmax(-1) for logits in (both.removed, both.masked))
    removed, masked = (-of_all.gather(-1, ids[:, 1:, None]) for of_all in log_p)
    return removed, masked


def _keys_at(subject: Subject, places: tuple[int, ...]) -> list[Tensor]:
    """Keys ``[1, heads, places, width]`` of every layer, for one token at each of the positions ``places``."""
    model, calls = subject.loaded.model, list[AttentionCall]()
    device = subject.device
    token = LISTENER.set(calls.append)
    try:
        with torch.inference_mode():
            model(
                input_ids=torch.ones(1, len(places), dtype=torch.long, device=device), use_cache=False,
                attention_mask=torch.ones(1, 1, len(places), len(places), dtype=torch.bool, device=device).tril(),
                position_ids=torch.tensor([places], device=device).clamp(max=_last(subject)),
            )
    finally:
        LISTENER.reset(token)
    return [call.key for call in calls]


def _last(subject: Subject) -> int:
    """The last position at which the model can be used."""
    return subject.loaded.context - 1 if subject.facts.learned else FAR


def _near(subject: Subject) -> float:
    return 1e-3 if subject.tolerance < 1e-3 else 0.05


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max().clamp(min=1e-12))
