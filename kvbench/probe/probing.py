"""The probe: a few short forward passes that test the model itself instead of trusting its configuration."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from kvbench.cache.policy_cache import PolicyCache
from kvbench.errors import UserError
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.policy_session import PolicySession
from kvbench.inference.reader import Reader
from kvbench.methods import Layout, make_layout
from kvbench.methods.layouts.full import Full
from kvbench.methods.layouts.windows import Window
from kvbench.methods.policies.knorm import KNorm
from kvbench.models.attention import plain_attention
from kvbench.models.attention_hooks import LISTENER, MASKS, AttentionCall, MaskFunction
from kvbench.models.configuration import context_of, text_config
from kvbench.models.facts import ModelFacts
from kvbench.models.rope import find_rotations, fixed_rotations, fresh_rotations, rotation_mark
from kvbench.probe.masks import MODEL_ERRORS, attention_span, sees, setting_name

LENGTH, CHUNK, LEAST = 48, 7, 8
"""Tokens of the probe's text, tokens per chunk in a stream, and the fewest tokens that give a meaningful result."""

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Accepted difference between two ways to compute the same likelihoods, in nats per token, by dtype of the weights."""

LONGEST = 1 << 20
"""Length in tokens up to which a limit on what layers attend is searched for."""


class _FoundError(Exception):
    """Ends the probe: the model cannot be measured."""


class _ForwardError(_FoundError):
    """Not even the model's own forward pass gives a valid likelihood."""


def examine(model: nn.Module, ids: Tensor) -> ModelFacts:
    """Probe a model.

    Args:
        ids: int64 ``[1, n]``, a text in the model's vocabulary; n is at most its context length.
    """
    started, facts = time.perf_counter(), ModelFacts(type(model).__name__)
    with torch.inference_mode():
        try:
            facts = _Probe(model, ids).carried_out(facts)
        except _FoundError as found:
            forward = str(found) if isinstance(found, _ForwardError) else ""
            facts = replace(facts, refusal=str(found), forward_refusal=forward)
        except UserError as found:  # rotations that cannot be fixed
            facts = replace(facts, refusal=found.message)
    return replace(facts, seconds=round(time.perf_counter() - started, 3))


def apart(model: nn.Module, ids: Tensor) -> float:
    """Difference in nats per token between ways of reading a text, the larger of two: the model's own forward pass
    against a stream with every entry stored; half of the entries masked against the same entries really removed."""
    half = make_layout(Window(Fraction(1, 2)), ids.shape[1], 0, 0)
    with torch.inference_mode(), fixed_rotations(model, ids.shape[1]):
        streamed = _nll_streamed(model, ids, 64)
        masked, removed = _nll(Reader(model).one_pass(ids, half), ids), _nll_streamed(model, ids, 64, half)
    with torch.inference_mode(), fresh_rotations(model):
        return max(_distance(_nll(_own(model, ids), ids), streamed), _distance(masked, removed))


class _Probe:
    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids, self.length = model, ids, ids.shape[1]
        self.tolerance = TOLERANCES.get(next(model.parameters()).dtype, 0.1)
        self.worst = 0.0

    def carried_out(self, facts: ModelFacts) -> ModelFacts:
        """Run all tests, those that rule a model out first.

        Raises:
            _FoundError: the model is ruled out.
            UserError: its rotations cannot be fixed.
        """
        model, (rules, calls, own_masks) = self.model, self._masks()
        window = attention_span(rules, max(LONGEST, context_of(model.config)))
        if window is not None and window < self.length:  # test the rest on a text that all layers attend in full
            self.ids, self.length = self.ids[:, :window], window
            if window < LEAST:
                raise _FoundError(f"{type(model).__name__} attends no more than {window} tokens in some layers.")
        ids = self.ids
        with plain_attention(model):
            own = self._tried(lambda: _nll(_own(model, ids), ids), "its own forward pass", _ForwardError)
        mine = self._tried(lambda: _nll(_own(model, ids), ids), "its own forward pass", _ForwardError)
        self._check("its attention, computed by PyTorch, is not that of its own code", own, mine, _ForwardError)
        if next(model.parameters()).dtype != torch.float32:  # nearer to the difference between two kernels
            self.tolerance = min(self.tolerance, max(self.tolerance / 20, 4 * self.worst))
        with fixed_rotations(model, self.length):
            streamed = self._tried(lambda: _nll_streamed(model, ids, CHUNK), "reading it with stored entries")
            self._check("what it predicts with stored entries is not what it predicts in one pass", own, streamed)
            self._check_masks()
            needs_ids = self._needs_ids(mine)
            policy_refusal = own_masks or self._policies(own, calls)
            found, mark = find_rotations(model), rotation_mark(model)
        return replace(
            facts, window=window, window_setting=setting_name(model.config, window), policy_refusal=policy_refusal,
            needs_ids=needs_ids, learned=found.learned,
            mark=mark + "|input:ids" * needs_ids, apart=self.worst, tolerance=self.tolerance,
        )

    def _masks(self) -> tuple[list[MaskFunction], list[AttentionCall], str]:
        """The mask functions that layers use, the layers' attention calls, and why policies cannot be used: a reason
        if layers change the model's masks, otherwise empty.

        Raises:
            _ForwardError: a token attends later tokens.
        """
        made: list[tuple[MaskFunction, Tensor]] = []
        calls: list[AttentionCall] = []
        with _collected(MASKS, made), _heard(calls.append):
            self._tried(lambda: _own(self.model, self.ids), "its own forward pass", _ForwardError)
        later = torch.ones(self.length, self.length, dtype=torch.bool, device=self.ids.device).triu(1)
        if any(sees(call, later) for call in calls):
            config: Any = self.model.config
            is_encoder = "is_decoder" in vars(type(config)) and not config.is_decoder
            why = " (is_decoder: false)" if is_encoder else ""
            raise _ForwardError(
                f"{type(self.model).__name__} attends tokens that come later{why}: it is no causal language model, "
                "and has no perplexity."
            )
        by_storage = {mask.untyped_storage().data_ptr(): rule for rule, mask in made}
        given = [call.mask for call in calls if call.mask is not None]
        reached = [by_storage.get(mask.untyped_storage().data_ptr()) for mask in given]
        if None in reached:
            name = type(self.model).__name__
            own = f"In {name}, layers attend under masks of their own, which a policy does not know."
            return [rule for rule, _ in made], calls, own
        return list({id(rule): rule for rule in reached if rule is not None}.values()), calls, ""

    def _check_masks(self) -> None:
        """Check that a window gives the same likelihoods masked in one pass and with entries really removed."""
        layout = make_layout(Window(Fraction(1, 2)), self.length, 0, 0)
        what, ids = "reading it under a mask", self.ids
        masked = self._tried(lambda: _nll(Reader(self.model).one_pass(ids, layout), ids), what)
        removed = self._tried(lambda: _nll_streamed(self.model, ids, CHUNK, layout), what)
        self._check("it does not attend under the masks that it is given", masked, removed)

    def _needs_ids(self, by_ids: Tensor) -> bool:
        """Whether predictions depend on token ids beyond the input embeddings.

        Feeding a token's embedding runs the same kernels as feeding its id, so results should be equal. Slightly
        scaled embeddings should give nearly the same: some models map exact embeddings back to their ids.
        """
        embedded = self.model.get_input_embeddings()(self.ids)  # type: ignore[operator]
        slightly = 2**-10 if embedded.dtype == torch.float32 else 2**-6
        try:
            exact, larger = (
                _nll(self.model(inputs_embeds=given, use_cache=False).logits, self.ids)
                for given in (embedded, embedded * (1 + slightly))
            )
        except MODEL_ERRORS:
            return True
        return _distance(by_ids, exact) > self.tolerance / 100 or _distance(exact, larger) > 32 * slightly

    def _policies(self, own: Tensor, calls: list[AttentionCall]) -> str:
        """Why policies cannot be used; empty if every layer attends exactly what it caches, in one call."""
        name = type(self.model).__name__
        extra_terms = {term for call in calls for term in call.extra_terms}
        if "softcap" in extra_terms:
            return f"{name} caps the logits of its attention, and a policy would be given others."
        if "s_aux" in extra_terms:
            return f"{name} attends learned sinks beside its entries, which a policy does not know."
        policy = KNorm()
        run, cache = PolicySession(self.model, policy, self.length, (0,)), _Noting()
        run.cache, heard = cache, list[AttentionCall]()
        try:
            with _heard(heard.append):
                logits = [part.logits for part in run.prefill(self.ids)]
        except (*MODEL_ERRORS, UserError) as error:
            storing = {layer for layer, *_ in cache.given}
            shared = [str(call.layer) for call in calls if call.layer not in storing]
            why = f"layers {', '.join(shared)} attend what others have stored" if shared else _sentence(error)
            return f"{name} cannot be read under a policy: {why}."
        why = _uncached(cache, heard)
        if why:
            return f"In {name}, {why}, and a policy would choose by something else than what is attended."
        if _distance(own, _nll(torch.cat(logits, 1), self.ids)) > self.tolerance:
            return f"{name} predicts something else under a policy that removes nothing."
        return ""

    def _tried(self, run: Callable[[], Tensor], what: str, kind: type[_FoundError] = _FoundError) -> Tensor:
        try:
            found = run()
        except MODEL_ERRORS as error:
            raise kind(self._why(f"{what} fails: {_sentence(error)}")) from error
        if not bool(torch.isfinite(found).all()):
            raise kind(f"{what} gives predictions that are not finite (overflow, or damaged weights).")
        return found

    def _check(self, what: str, one: Tensor, other: Tensor, kind: type[_FoundError] = _FoundError) -> None:
        distance = _distance(one, other)
        if not distance <= self.tolerance:
            raise kind(self._why(f"{what} ({distance:.2g} nats per token apart)"))
        self.worst = max(self.worst, distance)

    def _why(self, what: str) -> str:
        name, others = type(self.model).__name__, other_layers(self.model)
        if others:
            return (
                f"{name} keeps another state than keys and values in some of its layers ({', '.join(others)}), from "
                "which no entry can be removed."
            )
        return f"in {name}, {what}."


class _Noting(PolicyCache):
    """Records the keys and values that every layer was given to attend."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[tuple[int, Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.given.append((layer_idx, keys, values))
        return keys, values


def _uncached(cache: _Noting, heard: list[AttentionCall]) -> str:
    """How attended keys and values differ from the cached ones; empty if they do not."""
    cached, attended = ([call[0] for call in calls] for calls in (cache.given, heard))
    if cached != attended:
        layer = next((i for i, pair in enumerate(zip(cached, attended, strict=False)) if pair[0] != pair[1]), 0)
        many = len(attended) / max(1, len(cached))
        return f"attention is computed {many:.3g} times for each time that a layer stores entries (from call {layer})"
    for (layer, keys, values), call in zip(cache.given, heard, strict=True):
        for what, one, other in (("keys", keys, call.key), ("values", values, call.value)):
            if one.shape != other.shape or not torch.equal(one, other):
                return f"layer {layer} caches other {what} than it attends"
    return ""


def other_layers(model: nn.Module) -> list[str]:
    """Names of layer types other than attention over keys and values, at most three."""
    config: Any = text_config(model.config)
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    parts = {
        type(module).__name__ for module in model.modules()
        if any(word in type(module).__name__ for word in ("Mamba", "ShortConv", "Recurrent", "SSM", "Rwkv"))
    }
    return (sorted(kind for kind in kinds if "attention" not in kind or "linear" in kind) or sorted(parts))[:3]


def _sentence(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _own(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood of every token but the first, float32 ``[1, n - 1]``."""
    log_p = logits[:, : ids.shape[1] - 1].float().log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0]


def _nll_streamed(model: nn.Module, ids: Tensor, chunk: int, layout: Layout | None = None) -> Tensor:
    """The same from a stream with stored entries, which are removed as the layout says if there is one."""
    layout = layout or make_layout(Full(), ids.shape[1], 0, 0)
    parts = []
    for part in LayoutSession(Reader(model), layout, ids.shape[1], chunk).prefill(ids):
        targets = ids[:, part.start + 1 : part.stop + 1]
        log_p = part.logits[:, : targets.shape[1]].float().log_softmax(-1)
        parts.append(-log_p.gather(-1, targets[..., None])[..., 0])
    return torch.cat(parts, 1)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


@contextmanager
def _heard(listen: Callable[[AttentionCall], None]) -> Iterator[None]:
    token = LISTENER.set(listen)
    try:
        yield
    finally:
        LISTENER.reset(token)


@contextmanager
def _collected(variable: Any, into: list[Any]) -> Iterator[None]:
    token = variable.set(into)
    try:
        yield
    finally:
        variable.reset(token)
