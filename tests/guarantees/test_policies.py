"""Policies: what is removed while reading equals a mask made of what was kept, on every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from kvbench.inference.attention_statistics import received_attention, with_moments
from kvbench.inference.generation import greedy
from kvbench.inference.policy_session import PolicySession
from kvbench.methods import METHODS, kept
from kvbench.methods.policies.policy import LayerView, highest
from kvbench.models.attention_hooks import OBSERVER
from kvbench.models.rope import rotated
from tests.helpers.models import normalises_keys
from tests.helpers.policies import BATCH, LENGTH, POLICIES, Replayed, masked, policy_of, read, runs_of, seen_at, text
from tests.helpers.sessions import texts

CHANGING = ["cam", "d2o", "fp8", "kivi", "lorc", "subgen", "think"]
"""Policies after which entries are not what was computed, so that no mask can stand for them."""

MASKED = [name for name in POLICIES if name not in CHANGING]


@pytest.mark.parametrize("name", MASKED)
def test_removed_is_masked_by_what_was_kept(model: nn.Module, name: str) -> None:
    """On every family, in chunks of 7, with entries held and bytes as they should be."""
    ids, policy = text(), policy_of(name, step="7")
    logits, run = read(model, policy, ids)
    assert float((logits - masked(model, run, ids)).abs().max()) < 1e-5
    layers = len(run.cache.layers)
    budgets = [policy.budget(LENGTH, LENGTH, i, layers) for i in range(layers)]
    assert abs(sum(budgets) / layers - kept(LENGTH, policy.ratio)) <= 1
    assert 1 <= run.cache.physical_bytes() / run.cache.logical_bytes() <= 1.05
    if policy.keeps_all:
        assert [layer.held for layer in run.cache.layers] == [LENGTH] * layers
        assert run.cache.logical_bytes() >= LENGTH * run.cache.entry_bytes()
        return
    assert [round(layer.entries()) for layer in run.cache.layers] == budgets
    assert run.cache.logical_bytes() == sum(budgets) * run.cache.layers[0].entry_bytes()
    if name != "adakv":
        assert run.peak <= max(budgets) + 7


@pytest.mark.parametrize("name", CHANGING)
def test_what_is_stored_is_what_transformers_would_attend(model: nn.Module, name: str) -> None:
    """On every family: each run of tokens, fed to the model itself with the entries that were held before it."""
    ids, policy = text(), policy_of(name, step="7", count="false")  # counts: test_weighted_entries.py
    if name == "lorc" and normalises_keys(model):
        pytest.skip("refused: test_latents.py")
    run = PolicySession(model, policy, LENGTH, (3, 5))
    with torch.inference_mode():
        for start, stop in runs_of(policy, LENGTH):
            cache = DynamicCache()
            for place, layer in enumerate(run.cache.layers):
                cache.update(*(tensor.clone() for tensor in layer.present()), place)
            held = run.cache.most_entries()
            mask = torch.ones(stop - start, held + stop - start, dtype=torch.bool).tril(held)[None, None]
            places = torch.arange(start, stop)[None]
            part = ids[:, start:stop]
            with policy.patched(model):
                stock = model(input_ids=part, past_key_values=cache, attention_mask=mask, position_ids=places)
            assert float((run.feed(part) - stock.logits).abs().max()) < 1e-5
            run.remove()
    assert 1 <= run.cache.physical_bytes() / run.cache.logical_bytes() <= 1.05
    assert run.cache.logical_bytes() < 0.8 * LENGTH * run.cache.entry_bytes()


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("name", MASKED)
def test_removed_is_masked_at_any_step(llama: nn.Module, name: str, step: int) -> None:
    ids = text()
    logits, run = read(llama, policy_of(name, step=str(step)), ids)
    assert float((logits - masked(llama, run, ids)).abs().max()) < 1e-5


@pytest.mark.parametrize("name", [name for name in POLICIES if "ratio" in METHODS[name].budgets])
def test_nothing_removed_is_the_full_cache(llama: nn.Module, name: str) -> None:
    ids = text()
    logits, run = read(llama, policy_of(name, "0"), ids)
    with torch.inference_mode():
        full = llama(input_ids=ids).logits
    assert float((logits - full).abs().max()) < 1e-5
    assert run.cache.most_entries() == LENGTH


@pytest.mark.parametrize("name", POLICIES)
def test_a_prefix_that_is_compressed_once_does_not_depend_on_chunks(llama: nn.Module, name: str) -> None:
    ids, policy = text(), policy_of(name)
    (_, one), (_, other) = read(llama, policy, ids, 7), read(llama, policy, ids, LENGTH)
    for a, b in zip(one.cache.layers, other.cache.layers, strict=True):
        assert torch.equal(a.positions, b.positions)
        differ = (a.present()[0] - b.present()[0]).abs() > 1e-5
        assert float(differ.float().mean()) < (0.01 if name in ("fp8", "kivi") else 1e-9)  # a code may be rounded up


@pytest.mark.parametrize("name", POLICIES)
def test_rows_leave_each_other_alone(llama: nn.Module, name: str) -> None:
    ids, policy = text(), policy_of(name)
    _, both = read(llama, policy, ids)
    alone = PolicySession(llama, policy, LENGTH, (5,))
    with torch.inference_mode():
        list(alone.prefill(ids[1:]))
    for a, b in zip(both.cache.layers, alone.cache.layers, strict=True):
        assert torch.equal(seen_at(a.positions[1:], LENGTH), seen_at(b.positions, LENGTH))


@pytest.mark.parametrize("length", [1, 2, 5, 33])
@pytest.mark.parametrize("name", POLICIES)
def test_short_texts(llama: nn.Module, name: str, length: int) -> None:
    """Whatever the length, something is held, in every head as much, in order."""
    ids = text(length)
    logits, run = read(llama, policy_of(name, "0.9", step="4"), ids)
    assert torch.isfinite(logits).all()
    for layer in run.cache.layers:
        assert layer.held >= 1
        assert (layer.positions.diff(dim=-1) > 0).logical_or(layer.positions[..., 1:] < 0).all()
        assert int(layer.positions.max()) < length


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "neox"], indirect=True)
def test_streaming_llm_counts_positions_in_the_cache(model: nn.Module) -> None:
    """Against the published scheme: every key rotated to its place in the cache, the query to the place after."""
    ids, policy = text(48), policy_of("streaming-llm", "0.6", positions="cache", step="1")
    keep = policy.budget(48, 48, 0, 1)
    logits, run = read(model, policy, ids)
    for token in range(30, 48):  # the first layer's keys depend on nothing before: encode what was kept anew
        held = [0, 1, 2, 3, *range(token - (keep - 4), token)] if token > keep else list(range(token))
        assert run.history is not None
        assert run.history[token][0][0, 0].tolist() == held
    first = run.cache.layers[0]
    with torch.inference_mode():
        fresh = PolicySession(model, policy_of("streaming-llm", "0"), keep, (3, 5))
        fresh.feed(torch.cat([ids[:, :4], ids[:, 48 - (keep - 4) :]], 1))
    speeds, gap = run.cache.inv_freq[0], 48 - keep
    assert speeds is not None
    angle = gap * speeds[None]
    stored = first.keys.clone()
    stored[:, :, :4] = rotated(stored[:, :, :4], angle.cos(), angle.sin())
    back = rotated(stored, angle.cos(), -angle.sin())  # all of them counted from the cache's beginning
    assert float((back - fresh.cache.layers[0].keys).abs().max()) < 1e-5
    absolute, _ = read(model, policy_of("streaming-llm", "0.6", step="1"), ids)
    assert float((logits - absolute).abs().max()) > 1e-4


def test_positions_in_the_cache_need_rotations(called: Callable[..., Any], model_folder: Callable[..., Path]) -> None:
    folder = model_folder("gpt2", context=256)
    found = called([
        "run", "--model", folder, "--method", "streaming-llm", "--ratio", "0.5", "--task", "minidocs", "--limit",
        "1", "--set", "block=64", "--no-baselines", "--json",
    ])
    assert found.code == 2
    assert "positions=absolute" in found.err


@pytest.mark.parametrize("name", MASKED)
def test_texts_are_written_under_a_mask_of_what_was_kept(llama: nn.Module, name: str) -> None:
    """Greedy texts after a prefix that is compressed once; entries go on being removed while they are written."""
    ids, policy, new = text(40), policy_of(name, step="4"), 12
    run = PolicySession(llama, policy, 40, (3, 5), chunk=16, history=[])
    with torch.inference_mode():
        written = texts(run, ids, greedy(BATCH, new))
    assert run.history is not None
    # Three chunks of the prefix, then a token each.
    kept_at, whole = run.history[3:], torch.cat([ids, written], 1)[:, :-1]
    masks = []
    for layer in range(len(run.cache.layers)):
        mask = torch.ones(whole.shape[1], whole.shape[1], dtype=torch.bool).tril().repeat(BATCH, 4, 1, 1)
        for number, held in enumerate(kept_at):
            seen = seen_at(held[layer], whole.shape[1])
            seen[..., 40 + number] = True
            mask[:, :, 40 + number] = seen.repeat_interleave(2, 1)
        masks.append(mask)
    replayed = object.__new__(Replayed)
    replayed.masks = masks
    token = OBSERVER.set(replayed)
    try:
        with torch.inference_mode():
            logits = llama(
                input_ids=whole, use_cache=False, attention_mask=torch.ones(1, 1, 1, 1).bool(),
                position_ids=torch.arange(whole.shape[1])[None],
            ).logits
    finally:
        OBSERVER.reset(token)
    assert torch.equal(logits[:, 39:].argmax(-1), written)
    assert len(run.visible(torch.arange(1, 40 + new))) == 39 + new
    assert policy.keeps_all or run.kept < 40


@pytest.mark.parametrize("name", POLICIES)
def test_a_text_that_is_continued_twice_is_the_same_text(llama: nn.Module, name: str) -> None:
    """Each row of the cache repeated, in whatever form it is held: the same logits, also after more has gone."""
    ids, policy = text(), policy_of(name, step="4")
    (_, one), (_, other) = (read(llama, policy, ids[:, :80]) for _ in range(2))
    other.expand(2)
    with torch.inference_mode():
        for token in range(80, 92):
            single = one.feed(ids[:, token : token + 1])
            double = other.feed(ids[:, token : token + 1].repeat_interleave(2, 0))
            assert float((double - single.repeat_interleave(2, 0)).abs().max()) < 1e-5
            for run in (one, other):
                if run.is_due:
                    run.remove()


def test_scores_that_tie_keep_the_later() -> None:
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 0.0]]])
    assert highest(scores, 2).tolist() == [[[2, 3]]]
    assert highest(torch.zeros(1, 1, 5), 3).tolist() == [[[2, 3, 4]]]


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_the_highest_are_those_of_a_sort(length: int, values: int, seed: int) -> None:
    """With many that tie, and some that are infinite."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(values, (2, 3, length), generator=generator).float()
    scores[scores == values - 1] = float("inf")
    scores[..., : length // 3] = float("-inf")
    keep = 1 + seed % length
    wanted = [[sorted(sorted(range(length), key=lambda i: (row[i], i))[-keep:]) for row in part]
              for part in scores.tolist()]
    assert highest(scores, keep).tolist() == wanted


def test_layers_get_more_the_earlier_they_are() -> None:
    policy = policy_of("pyramidkv", "0.5", window="8", beta="20")
    budgets = [policy.budget(200, 200, layer, 4) for layer in range(4)]
    assert sum(budgets) == 4 * 100
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] <= 200
    assert budgets[-1] >= 8


SAME = ("tova", "chunkkv", "streaming-llm", "cam", "kivi", "fp8", "think", "refreshkv", "lorc")
"""Policies that hold the same entries in all heads."""


def test_heads_differ_unless_they_share(llama: nn.Module) -> None:
    for name in POLICIES:
        _, run = read(llama, policy_of(name), text())
        same = all(torch.equal(layer.positions[:, :1].expand_as(layer.positions), layer.positions)
                   for layer in run.cache.layers)
        assert same is (name in SAME), name


def test_chunks_stay_whole(llama: nn.Module) -> None:
    """All but the window, and the chunk that the budget cuts."""
    _, run = read(llama, policy_of("chunkkv", window="8", size="4"), text(), LENGTH)
    places = run.cache.layers[0].positions[0, 0]
    counts = torch.bincount(places[places < LENGTH - 8] // 4)
    assert ((counts == 0) | (counts == 4)).sum() >= len(counts) - 1


def test_sums_are_those_of_a_plain_loop(llama: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(1, 4, 70, 8, generator=generator), torch.randn(1, 2, 90, 8, generator=generator)
    plain = torch.zeros(1, 2, 90)
    for head in range(4):
        for row in range(70):
            seen = 20 + row + 1
            weights = (keys[0, head // 2, :seen] @ query[0, head, row] * 0.3).softmax(0)
            plain[0, head // 2, :seen] += weights
    assert float((received_attention(query, keys, 0.3, torch.arange(90).expand(1, 2, 90)) - plain).abs().max()) < 1e-5


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "tova", "--execution", "onepass"], "has no form in one masked pass"),
    (["--method", "tova", "--task", "online"], "comes in chunks"),
    (["--method", "snapkv", "--set", "window=0"], "window=0"),
    (["--method", "h2o", "--set", "prefill=twice"], "prefill"),
    (["--method", "think", "--ratio", "0.6"], "keys are half of it"),
    (["--method", "tova", "--budget-tokens", "64", "--ratio", "0.5"], "--budget-tokens and --ratio both say"),
    (["--method", "tova", "--budget-tokens", "64", "--budget-bytes", "9KB"], "--budget-bytes both say"),
    (["--method", "tova", "--budget-bytes", "9KB", "--equal-bytes"], "--equal-bytes both say"),
    (["--method", "tova", "--budget-tokens", "0"], "below 1"),
    (["--method", "sinks", "--budget-tokens", "64", "--set", "budget=160"], "budget=160 both say what"),
    (["--method", "tova", "--budget-bytes", "lots"], "--budget-bytes lots: not a size"),
    (["--method", "kivi", "--budget-tokens", "64"], "kivi cannot be given a budget in tokens. It takes one in bytes"),
    (["--method", "fp8", "--budget-bytes", "9KB"], "fp8 cannot be given a budget in bytes. Leave it out"),
    (["--method", "refreshkv", "--equal-bytes"], "refreshkv cannot be set to a number of bytes"),
    (["--method", "ccm-concat", "--task", "online", "--budget-tokens", "9"], "no budget of its own"),
    (["--method", "kivi", "--set", "bits=3"], "bits"),
    (["--method", "kivi", "--set", "group=6"], "Give a multiple of 4"),
    (["--method", "snapkv", "--set", "kernel=4"], "no middle"),
    (["--method", "sinks", "--budget-tokens", "3"], "below the 5 entries that sinks needs"),
])
def test_what_cannot_be_done_is_a_sentence(words: list[str], message: str, called: Callable[..., Any]) -> None:
    found = called(["run", *words])
    assert found.code == 2
    assert message in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize(("words", "message"), [
    (["--method", "snapkv", "--budget-bytes", "100KB"], "the 33 entries that snapkv needs. Give at least 202752"),
    (["--method", "kivi", "--equal-bytes", "--ratio", "0.95"], "kivi cannot remove 0.95 of the bytes of 512 entries"),
])
def test_budgets_below_what_a_method_needs(words: list[str], message: str, called: Callable[..., Any]) -> None:
    """Known once texts are cut for the model, and before anything is written."""
    found = called(["run", "--task", "minidocs", "--limit", "1", "--no-baselines", *words])
    assert found.code == 2
    assert message in found.err


@pytest.mark.heavy
def test_the_command_measures_policies_on_every_kind_of_task(called: Callable[..., Any]) -> None:
    found = called([
        "run", "--task", "minidocs", "--task", "recall", "--task", "minidocs-gen", "--method", "keydiff",
        "--method", "h2o", "--ratio", "0.7", "--limit", "2", "--no-baselines", "--json", "--set", "step=8",
    ])
    assert found.code == 0, found.err
    rows = found.document["rows"]
    for task in ("minidocs", "recall", "minidocs-gen"):
        for name in ("keydiff", "h2o"):
            mine = [r for r in rows if (r["task"], r["method"]) == (task, name) and r["params"]["bin"] is None]
            assert mine, (task, name)
            assert all(r["ratio_realised"] == pytest.approx(0.7, abs=0.005) for r in mine)
            assert {r["removal"] for r in mine} == {"real"}
            held = {r["metric"]: r["value"] for r in mine}
            assert held["kv_bytes_physical"] == pytest.approx(held["kv_bytes_logical"], rel=0.05)
            assert held["kv_bytes_logical"] == pytest.approx(0.3 * held["kv_bytes_full"], rel=0.02)
            assert all("evicts every 8" in r["signature"] for r in mine)


def view_of(found: Any, rows: slice = slice(None)) -> LayerView:
    """A layer with the keys, values and last queries that kvpress was given (tests/parity/make_fixtures.py)."""
    keys, values, queries = (torch.from_numpy(found[name])[rows] for name in ("keys", "values", "queries"))
    length = keys.shape[2]
    positions = torch.arange(length).expand(keys.shape[:3])
    return LayerView(
        keys=keys, values=values, positions=positions,
        attention_sums=torch.zeros_like(positions, dtype=torch.float32), queries=queries,
        scaling=keys.shape[-1] ** -0.5, read=length, layer=0, layers=1,
        row_seeds=torch.zeros(len(keys), dtype=torch.long), seed=0,
        query_moments=with_moments(None, torch.from_numpy(found["all_queries"])[rows], 0, 4, None),
        inv_freq=torch.from_numpy(found["speeds"]),
    )


@pytest.fixture(scope="module")
def kvpress() -> Any:
    return np.load(Path(__file__).parents[1] / "parity" / "kvpress.npz", allow_pickle=False)


@pytest.mark.parametrize("name", ["knorm", "keydiff", "lagkv", "snapkv", "streaming-llm", "expected-attention"])
def test_the_same_entries_as_kvpress(kvpress: Any, name: str) -> None:
    policy = policy_of(name, "0.5", window="20", kernel="5", pool="mean", lag="32", future="64")
    assert policy.chosen(view_of(kvpress), 100).tolist() == kvpress[f"kept:{name}"].tolist()


def test_the_same_chunks_as_kvpress(kvpress: Any) -> None:
    """Row by row: kvpress keeps the first row's chunks in all rows of a batch, and we do not."""
    policy = policy_of("chunkkv", "0.5", window="20", kernel="5", pool="mean", size="10")
    mine = policy.chosen(view_of(kvpress), 100)
    for row in range(2):
        assert mine[row].tolist() == kvpress[f"kept:chunkkv:{row}"][0].tolist()
    assert mine[0].tolist() != mine[1].tolist()


def test_tova_differs_from_kvpress_in_the_last_token_only(kvpress: Any) -> None:
    """kvpress always keeps it, and says so; published and here it stays by its own weight, or does not."""
    view = view_of(kvpress)
    mine, theirs = policy_of("tova", "0.5").chosen(view, 100), kvpress["kept:tova"]
    last = view.entries - 1
    for row in range(2):
        here, there = set(mine[row, 0].tolist()), set(theirs[row, 0].tolist())
        assert last in there
        assert here == there or (there - here == {last} and len(here - there) == 1)
