"""Policies in one masked pass, and LagKV's windows chosen from once (LRSA): against the stream, and against loops."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.inference.masked_policy import MaskedPolicySession, masked_logits
from kvbench.inference.opening import Text, open_session
from kvbench.inference.policy_session import PolicySession
from kvbench.methods import METHODS, kept, make_method
from kvbench.methods.policies.lagkv import LagKV, LagKVTuned
from kvbench.methods.policies.masking import check_maskable, last_queries, mask_of
from kvbench.methods.policies.policy import CachePolicy
from kvbench.training.adapter_training import text_loss
from tests.helpers.models import VOCABULARY, normalises_keys
from tests.helpers.policies import LENGTH, policy_of, text

WAYS = [
    ("knorm", {"step": "7"}), ("knorm", {"skip": "1"}), ("keydiff", {"step": "7"}), ("lagkv", {}),
    ("lagkv", {"passes": "once"}), ("lagkv", {"passes": "once", "lag": "5", "sinks": "0"}),
    ("lagkv-tuned", {"lag": "16"}),
]
SEEDS = (3, 5)


def once(ratio: str = "0.6", lag: int = 8, sinks: int = 4) -> LagKV:
    policy = policy_of("lagkv", ratio, passes="once", lag=str(lag), sinks=str(sinks))
    assert isinstance(policy, LagKV)
    return policy


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_one_pass_is_the_stream(model: nn.Module, name: str, options: dict[str, str]) -> None:
    """On every family: logits, what each query saw, what is held and its bytes; and what follows the text."""
    if name == "knorm" and normalises_keys(model):
        pytest.skip("all keys are equally long but for rounding, which then decides")
    ids, policy = text(), policy_of(name, **options)
    more = ids[:, :9]
    with torch.inference_mode():
        streamed = PolicySession(model, policy, LENGTH, SEEDS)
        masked = MaskedPolicySession(model, policy, LENGTH, SEEDS)
        expected, found = (torch.cat([p.logits for p in run.prefill(ids)], 1) for run in (streamed, masked))
        assert float((expected - found).abs().max()) < 1e-5
        assert masked.seen == pytest.approx(streamed.seen)
        assert masked.kept == streamed.kept
        assert masked.bytes()[::2] == streamed.bytes()[::2]  # all but spare room
        assert masked.peak == LENGTH >= streamed.peak
        for a, b in zip(masked.cache.layers, streamed.cache.layers, strict=True):
            assert torch.equal(a.positions, b.positions)
        after = [torch.cat([part.logits for part in run.extend(more)], 1) for run in (streamed, masked)]
        assert float((after[0] - after[1]).abs().max()) < 1e-5


def slow_lagkv(keys: Tensor, values: Tensor, lag: int, sinks: int, numbers: list[int]) -> list[list[int]]:
    """By head, the last query of every entry: the published recursion, window by window, with plain loops."""
    found = []
    n = keys.shape[1]
    for head in range(len(keys)):
        last = [n] * n
        for window, stays in enumerate(numbers):
            begin, end = sinks + window * lag, sinks + (window + 1) * lag
            scores = np.zeros(lag)
            for part in (keys[head], values[head]):
                own, following = part[begin:end].double().numpy(), part[end : end + lag].double().numpy()
                low, high = following.min(0), following.max(0)
                worth = ((own - low) / (high - low)).std(1, ddof=1)
                scores += np.exp(worth - worth.max()) / np.exp(worth - worth.max()).sum()
            for place in np.argsort(scores)[: lag - stays]:
                last[begin + int(place)] = end + lag - 1
        found.append(last)
    return found


@given(n=st.integers(30, 120), ratio=st.sampled_from(["0.02", "0.1", "0.3", "0.5", "0.8"]),
       lag=st.sampled_from([4, 8, 11]), sinks=st.integers(0, 5), seed=st.integers(0, 5))
def test_each_window_is_chosen_from_once(n: int, ratio: str, lag: int, sinks: int, seed: int) -> None:
    """Against loops; and kept(N, r) entries are held at the end, if so few can be."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, 2, n, 6, generator=generator) for _ in range(2))
    policy = once(ratio, lag, sinks)
    last = last_queries(policy, keys, values, layer=0, layers=1, row_seeds=torch.tensor([3]))
    windows, after = divmod(n - sinks, lag)
    whole = min(n, sinks + lag + after)
    held = int((last[0, 0] == n).sum())
    assert held == (n if windows < 2 else max(whole, kept(n, Fraction(ratio))))
    each = Fraction(held - whole, max(1, windows - 1))
    numbers = [int((i + 1) * each) - int(i * each) for i in range(max(0, windows - 1))]
    assert last[0].tolist() == slow_lagkv(keys[0], values[0], lag, sinks, numbers)


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_later_text_never_changes_what_was_seen(name: str, options: dict[str, str]) -> None:
    policy = policy_of(name, **options)
    keys, values = (torch.randn(1, 2, 90, 6, generator=torch.Generator().manual_seed(i)) for i in range(2))
    places = {"layer": 1, "layers": 2, "row_seeds": torch.tensor([3])}
    before = mask_of(last_queries(policy, keys, values, **places))  # type: ignore[arg-type]
    for changed in (40, 61, 89):
        other = torch.cat([keys[:, :, :changed], values[:, :, changed:]], 2)
        after = mask_of(last_queries(policy, other, values, **places))  # type: ignore[arg-type]
        assert torch.equal(before[:, :, :changed], after[:, :, :changed])
        assert changed > 61 or not torch.equal(before, after)


def test_a_prefix_that_is_read_whole_is_chosen_from_at_its_end(llama: nn.Module) -> None:
    """``prefill=once``: the same windows, by keys and values that the whole prefix has computed."""
    ids, policy = text(), once()
    with torch.inference_mode():
        run = open_session(llama, policy, Text(LENGTH, LENGTH, SEEDS, has_continuation=True))
        assert isinstance(run, PolicySession)
        whole = PolicySession(llama, policy, LENGTH, SEEDS)
        whole.feed(ids)
        list(run.prefill(ids))
    for layer, full in zip(run.cache.layers, whole.cache.layers, strict=True):
        last = last_queries(policy, *full.present(), layer=0, layers=3, row_seeds=torch.tensor(SEEDS))
        assert sorted(layer.positions[0, 0].tolist())[:4] == [0, 1, 2, 3]
        assert layer.positions.shape[-1] == int((last[0, 0] == LENGTH).sum())
        windows = [int(((layer.positions[0, 0] - 4) // 8 == i).sum()) for i in range(10)]
        assert max(windows) - min(windows) <= 1  # each keeps as many as the others


def test_training_reads_what_the_stream_reads(llama: nn.Module) -> None:
    """The loss of a step is the mean loss of the stream; gradients reach what is kept, and no choice."""
    ids, policy = text(), once("0.7", 16)
    with torch.inference_mode():
        streamed = torch.cat([part.logits for part in PolicySession(llama, policy, LENGTH, SEEDS).prefill(ids)], 1)
        expected = float(text_loss(streamed[:, :-1], ids))
    weight = llama.get_parameter("model.layers.0.self_attn.v_proj.weight").requires_grad_()
    try:
        loss = text_loss(masked_logits(llama, policy, ids, slice(0, -1)), ids)
        loss.backward()  # type: ignore[no-untyped-call]
        assert float(loss.detach()) == pytest.approx(expected, abs=1e-5)
        assert weight.grad is not None
        assert float(weight.grad.abs().max()) > 0
    finally:
        weight.requires_grad_(False).grad = None


def test_training_draws_ratios_and_windows_that_fit() -> None:
    rng = np.random.default_rng(0)
    drawn = [LagKVTuned.training_sample(256, rng, {}) for _ in range(60)]
    assert all(isinstance(policy, LagKVTuned) for policy in drawn)
    policies = [policy for policy in drawn if isinstance(policy, LagKVTuned)]
    for policy in policies:
        policy.check(256, in_chunks=False)
    assert {policy.lag for policy in policies} == {16, 32, 64}
    assert min(policy.ratio for policy in policies) < Fraction("0.15")
    assert max(policy.ratio for policy in policies) > Fraction("0.75")
    assert isinstance(LagKVTuned.training_sample(20, rng, {}), LagKVTuned)


@pytest.mark.parametrize(("prefix", "more", "ratio", "tokens"), [
    (40, 100, "0.7", 0), (64, 90, "0.75", 0), (96, 100, "0.5", 0), (96, 120, "0", 40), (20, 150, "0", 40),
])
def test_what_is_written_fills_the_cache_to_what_is_asked(
    llama: nn.Module, prefix: int, more: int, ratio: str, tokens: int
) -> None:
    """From the second window on, at every removal: kept(n, r), or the budget in tokens; and no more than a window
    above it between two."""
    policy = replace(once(ratio), budget_tokens=tokens)
    ids = torch.randint(1, VOCABULARY, (2, prefix + more), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        run = open_session(llama, policy, Text(prefix, prefix + more, SEEDS))
        assert isinstance(run, PolicySession)
        list(run.prefill(ids[:, :prefix]))
        for place in range(prefix, prefix + more):
            run.step(ids[:, place])
            read = place + 1
            wanted = min(read, tokens) if tokens else kept(read, Fraction(ratio))
            assert run.kept <= max(wanted, 12) + 8 + (8 if read < prefix + 16 else 0), (read, run.kept)
            if run.removed_at == read and read > prefix + 16:
                assert run.kept == max(wanted, 12)
    assert run.removals > more // 8 - 2


def test_a_ratio_that_once_cannot_reach_is_refused() -> None:
    with pytest.raises(UserError, match="keeps 52 of 512 entries; under passes=once 4 sinks, the last window of 32 "
                                        "and the 28 tokens after it stay"):
        make_method("lagkv", Fraction("0.9"), {"passes": "once"}).check(512, in_chunks=False)
    make_method("lagkv", Fraction("0.9"), {"passes": "once", "lag": "16"}).check(512, in_chunks=False)
    make_method("lagkv", Fraction("0.9")).check(512, in_chunks=False)
    with pytest.raises(UserError, match="keeps 18 of 60 entries"):
        make_method("lagkv", Fraction("0.7"), {"passes": "once"}).check(60, in_chunks=False)
    replace(once("0"), budget_tokens=20).check(1 << 40, in_chunks=False)


@pytest.mark.parametrize("name", [n for n, kind in METHODS.items() if issubclass(kind, CachePolicy)])
def test_only_what_looks_at_keys_and_values_alone_has_a_mask(name: str) -> None:
    policy = policy_of(name)
    if "onepass" in policy.executions:
        check_maskable(policy)
    elif name not in ("random", "streaming-llm"):  # they could have one
        with pytest.raises(UserError, match="no mask stands for it"):
            check_maskable(policy)
