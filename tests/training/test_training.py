"""Training: it learns, it continues exactly where it was, and its data are what they should be."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kvbench.data.facts import FACT_LOW, NAMES, fact
from kvbench.errors import UserError
from kvbench.inference.reader import Reader
from kvbench.methods import make_layout, make_method
from kvbench.methods.layouts.sentinel import span_layout
from kvbench.models.adapter import WEIGHTS, Adapter, AdapterCard, read_card
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.training.adapter_training import AdapterPlan, step_loss, step_sample, text_loss, train_adapter
from kvbench.training.base_training import BasePlan, new_model, train_base, train_tokenizer
from kvbench.training.curve import read_curve
from kvbench.training.held_out import HeldOut
from kvbench.training.loop import CHECKPOINT, rate_factor, restore_checkpoint, save_checkpoint
from kvbench.training.mixture import Mixture
from tests.helpers.command import Outcome
from tests.helpers.models import VOCABULARY, small_model

PLAN = AdapterPlan(
    "sentinel", steps=6, batch=2, length=48, lr=1e-2, rank=4, warmup=2, autocast="none", seed=3
)
DISTIL = replace(PLAN, objective="distil")


def mixture(length: int = 48, seed: int = 3) -> Mixture:
    stream = np.random.default_rng(0).integers(0, VOCABULARY, 5000)
    return Mixture(stream, lambda text: [ord(c) % VOCABULARY for c in text], length, seed)


def trained(plan: AdapterPlan, out: Path, stop_after: int | None = None) -> Adapter:
    """An adapter after a training that may be broken off."""
    out.mkdir(exist_ok=True)
    model = small_model("llama")
    torch.manual_seed(plan.seed)
    card = AdapterCard("sentinel", plan.adapter, plan.rank, 4.0, 2, "small", "hash")
    adapter = Adapter.fresh(card, model)
    list(islice(train_adapter(plan, model, adapter, mixture(), out, 2), stop_after))
    return adapter


@pytest.mark.parametrize(("gate", "objective"), [("gated", "distil"), ("gated", "text"), ("plain", "text")])
def test_training_changes_the_adapter_only_and_lowers_its_loss(
    tmp_path: Path, gate: str, objective: str
) -> None:
    plan = replace(PLAN, objective=objective, adapter=gate, steps=40, length=64)
    model, data = small_model("llama"), mixture(64)
    frozen = {name: p.clone() for name, p in model.named_parameters()}
    torch.manual_seed(0)
    adapter = Adapter.fresh(AdapterCard("sentinel", gate, 4, 4.0, 2, "small", "hash"), model)
    ids = torch.from_numpy(data.batch(0, 8))
    layout = make_layout(make_method("sentinel", Fraction("0.7")), 64, 0, 0)

    def loss() -> float:
        reader = Reader(model, adapter)
        with torch.no_grad(), reader.ready():
            return float(step_loss(plan, model, reader, ids, layout))

    before = loss()
    losses = [state.loss for state in train_adapter(plan, model, adapter, data, tmp_path, 100)]
    assert loss() < before
    assert len(losses) == 40
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())


def test_text_loss_at_ratio_zero_is_that_of_transformers(model: nn.Module) -> None:
    ids = torch.from_numpy(mixture().batch(0, 3))
    layout = make_layout(make_method("full", Fraction(0)), 48, 0, 0)
    ours = text_loss(Reader(model).one_pass(ids, layout, slice(0, -1)), ids)
    assert float(ours) == pytest.approx(float(model(input_ids=ids, labels=ids).loss), abs=1e-6)


@pytest.mark.parametrize("objective", ["text", "distil"])
def test_the_loss_behind_a_span_weighs_more(llama: nn.Module, objective: str) -> None:
    """Against a loop over the targets of a layout with two spans."""
    plan = replace(PLAN, objective=objective, boundary=3.0, length=48)
    torch.manual_seed(0)
    adapter = Adapter.fresh(AdapterCard("sentinel", "plain", 4, 4.0, 2, "small", "hash"), llama)
    with torch.no_grad():
        for pair in adapter.pairs:
            pair.b.normal_(std=0.2)
    layout = span_layout([5, 20, 8], [6, 9])  # text tokens 11 and 40 are the first behind a span
    behind = {*range(11, 19), *range(40, 48)}
    ids, reader = torch.from_numpy(mixture().batch(0, 2)), Reader(llama, adapter)
    with torch.no_grad(), reader.ready():
        found = step_loss(plan, llama, reader, ids, layout)
        logits = reader.one_pass(ids, layout).log_softmax(-1)
        with reader.without_adapter():
            base = llama(input_ids=ids).logits.log_softmax(-1)
    total = weight = 0.0
    for row in range(2):
        for target in range(1, 48):
            share, given = 3.0 if target in behind else 1.0, logits[row, target - 1]
            wanted = base[row, target - 1]
            lost = -given[ids[row, target]] if objective == "text" else (wanted.exp() * (wanted - given)).sum()
            total, weight = total + share * float(lost), weight + share
    assert float(found) == pytest.approx(total / weight, abs=1e-5)


def test_distillation_of_nothing_is_zero(llama: nn.Module) -> None:
    torch.manual_seed(0)
    adapter = Adapter.fresh(AdapterCard("sentinel", "gated", 4, 4.0, 2, "small", "hash"), llama)
    reader = Reader(llama, adapter)
    layout = make_layout(make_method("sentinel", Fraction(0)), 48, 0, 0)
    with torch.no_grad(), reader.ready():
        loss = step_loss(DISTIL, llama, reader, torch.from_numpy(mixture().batch(0, 2)), layout)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


def test_broken_off_and_continued_gives_the_same_weights(tmp_path: Path) -> None:
    whole = trained(PLAN, tmp_path / "whole")
    trained(PLAN, tmp_path / "broken", stop_after=5)  # the last checkpoint is after step 4
    assert (tmp_path / "broken" / CHECKPOINT).exists()
    continued = trained(PLAN, tmp_path / "broken")
    for ours, theirs in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    trained(PLAN, tmp_path, stop_after=3)
    with pytest.raises(UserError, match=r"other settings: lr\."):
        trained(replace(PLAN, lr=5e-3), tmp_path)
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        trained(PLAN, tmp_path)


@pytest.mark.parametrize("plan", [PLAN, BasePlan()])
def test_a_checkpoint_is_continued_with_the_same_model_and_texts_only(tmp_path: Path, plan: Any) -> None:
    known = [name for name in ("base_hash", "tokenizer", "data") if hasattr(plan, name)]
    made = replace(plan, **dict.fromkeys(known, "a"))
    save_checkpoint(tmp_path, made, 2, {})
    assert restore_checkpoint(tmp_path, made, {}) == 2
    for name in known:
        with pytest.raises(UserError, match="has changed" if name == "data" else f"other settings: {name}"):
            restore_checkpoint(tmp_path, replace(made, **{name: "b"}), {})
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    del state["plan"]["data"]  # as an older version wrote it
    torch.save(state, tmp_path / CHECKPOINT)
    assert restore_checkpoint(tmp_path, replace(made, data="b"), {}) == 2


def test_ratios_and_spans_are_drawn_anew_every_step() -> None:
    plan = replace(PLAN, length=256)
    layouts = [step_sample(plan, step) for step in range(60)]
    held = [len(layout.held_after(len(layout))) for layout in layouts]
    assert min(held) < 40
    assert max(held) > 200
    assert len(set(held)) > 30
    assert len(step_sample(plan, 7)) == len(step_sample(plan, 7))


def test_rate_warms_up_and_falls_to_three_per_cent() -> None:
    factors = [rate_factor(step, 1000, 100, 0.7) for step in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert factors[100:700] == [1.0] * 600
    assert factors[-1] == pytest.approx(0.03, abs=0.005)
    assert all(a >= b for a, b in pairwise(factors[700:]))


def test_ratios_out_of_reach_are_not_drawn() -> None:
    plan = replace(PLAN, length=256, options={"closing": "4", "sees": "previous"})
    held = [len(layout.held_after(len(layout))) for layout in (step_sample(plan, step) for step in range(60))]
    assert 40 < min(held) < 70  # at most 21 of 25 tokens can leave


def test_mixture_is_a_function_of_seed_and_step() -> None:
    assert np.array_equal(mixture().batch(4, 3), mixture().batch(4, 3))
    assert not np.array_equal(mixture().batch(4, 3), mixture().batch(5, 3))
    assert not np.array_equal(mixture().batch(4, 3), mixture(seed=4).batch(4, 3))


def test_mixture_holds_text_copies_and_facts(tiny_tokenizer: Any) -> None:
    """A quarter of the rows repeats something; facts come back word for word."""
    rng = np.random.default_rng(0)
    data = Mixture(
        rng.integers(300, 4000, 50_000), lambda text: tiny_tokenizer(text).input_ids, 512, 0
    )
    rows = data.batch(0, 400)
    assert rows.shape == (400, 512)
    texts = [tiny_tokenizer.decode(row) for row in rows]
    with_facts = [text for text in texts if " of " in text and any(f"{name} is " in text for name in NAMES)]
    assert 0.07 < len(with_facts) / 400 < 0.2
    sentences = [s for s in with_facts[0].split("\n\n") if s.startswith("The ") and s.endswith(".")]
    assert len(sentences) > len(set(sentences))
    repeats = sum(_repeats(row) for row in rows) / 400
    assert 0.15 < repeats < 0.35


def _repeats(row: np.ndarray) -> bool:
    """Whether some run of eight tokens occurs twice."""
    runs = [tuple(row[i : i + 8]) for i in range(len(row) - 8)]
    return len(set(runs)) < len(runs)


def test_fact_form() -> None:
    assert fact("key", "Mary", 4821) == "\n\nThe key of Mary is 4821.\n\n"
    assert FACT_LOW == 100


def test_base_model_learns_and_continues_exactly(tmp_path: Path) -> None:
    plan = BasePlan(steps=8, batch=2, length=64, hidden=64, layers=2, heads=1, kv_heads=1, feed_forward=96,
                    vocabulary=VOCABULARY, warmup=2, autocast="none")

    def run(out: Path, stop: int | None = None) -> tuple[nn.Module, list[float]]:
        out.mkdir(exist_ok=True)
        model = new_model(plan, VOCABULARY, 0)
        steps = islice(train_base(plan, model, mixture(64), out, 3), stop)
        return model, [state.loss for state in steps]

    whole, losses = run(tmp_path / "whole")
    assert losses[-1] < losses[0]
    run(tmp_path / "broken", stop=4)
    continued, rest = run(tmp_path / "broken")
    assert len(rest) == 5
    for ours, theirs in zip(whole.parameters(), continued.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_tokenizer_is_byte_level_and_round_trips() -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat. " * 50] * 3, 300, 64)
    text = "The cat; naïve — ☃\n\n on the mat"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "</s>"
    assert len(tokenizer) <= 300


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    words = np.random.default_rng(1).choice(["river", "stone", "bridge", "mill", "the", "of", "and"], 4000)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words))
    return path


def test_train_command_writes_an_adapter_that_run_uses(
    called: Callable[[Sequence[str | Path]], Outcome], text_file: Path, tmp_path: Path
) -> None:
    command = ["train", "--method", "sentinel", "--data", text_file, "--out", "adapter", "--steps", "3",
               "--batch-size", "2", "--length", "64", "--rank", "4", "--held-out", text_file, "--every", "2",
               "--set", "autocast=none"]
    done = called(command)
    assert (done.code, done.out.strip()) == (0, "adapter: adapter"), done.err
    card = read_card(tmp_path / "adapter")
    assert card.training["tokens"] == 3 * 2 * 64
    assert card.training["data"][0]["file"] == "text.txt"
    assert set(card.held_out) == {"0.3", "0.5", "0.7", "0.8", "0.9"}
    assert not (tmp_path / "adapter" / CHECKPOINT).exists()
    log = [json.loads(line) for line in (tmp_path / "adapter" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 3]
    again = called(command)
    assert again.code == 2
    assert "already holds a finished training" in again.err
    (tmp_path / "doc.txt").write_text("The mill by the bridge. " * 60)
    run = called(["run", "--method", "sentinel", "--adapter", "adapter", "--task", "minidocs",
                  "--data", "doc.txt", "--set", "block=128", "--no-baselines", "--json"])
    assert run.code == 0, run.err
    assert {row["method"] for row in run.document["rows"]} == {"full", "sentinel"}


def test_the_best_weights_are_kept_in_half_precision(
    called: Callable[[Sequence[str | Path]], Outcome], text_file: Path, tmp_path: Path
) -> None:
    """Random words are learnt, and text is held out, whose loss rises: not the last weights are kept."""
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("The ferry leaves at nine, and the tide turns an hour later. " * 40)
    command = ["train", "--method", "local-tuned", "--data", text_file, "--out", "adapter", "--steps", "6",
               "--length", "64", "--rank", "4", "--every", "1", "--lr", "0.03", "--set", "keep=best",
               "--set", "autocast=none"]
    refused = called(command)
    assert (refused.code, "Give --held-out" in refused.err) == (2, True)
    done = called([*command, "--held-out", held_out, "--set", "stored=bfloat16"])
    assert done.code == 0, done.err
    curve, card = read_curve(tmp_path / "adapter"), read_card(tmp_path / "adapter")
    best = min(curve, key=lambda point: sum(score["nll"] for score in point.held_out.values()))
    assert len(curve) == 6
    assert best.step < 6
    assert card.training["kept_step"] == best.step
    assert card.training["tokens"] == best.step * 2 * 64
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    loaded = load_model(resolve_model("kvbench-tiny", None), "cpu", "float32")
    held = HeldOut.from_file(held_out, loaded.tokenizer, 64)
    found = held.measure(loaded.model, Adapter.load(tmp_path / "adapter", loaded.model), "local-tuned")
    assert found == card.held_out  # of what is written, not of what was rounded to it
    assert found["0.5"]["nll"] == pytest.approx(best.held_out["0.5"]["nll"], abs=0.02)
