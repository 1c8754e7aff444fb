"""``kvbench doctor``: every check holds on every family, and is seen to fail when its fault is planted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench.cache.evicting import EvictingLayer
from kvbench.cache.shape import CacheShape
from kvbench.data.documents import embedded_documents
from kvbench.doctor import CHECKS, Subject, checks, examined, make_subject, model_checks, published
from kvbench.doctor import mauve as similarity
from kvbench.errors import UserError
from kvbench.inference import layout_session as runtime
from kvbench.inference import opening
from kvbench.judges.encoder import SentenceEncoder
from kvbench.methods.layouts import windows
from kvbench.methods.policies.knorm import KNorm
from kvbench.methods.policies.policy import CachePolicy
from kvbench.models import rope as rotary
from kvbench.models.facts import ModelFacts
from kvbench.probe import probing
from kvbench.profiling.clock import Timeline
from kvbench.profiling.passes import Timed
from tests.helpers.command import Call, refused
from tests.helpers.models import FAMILIES

UNTIMED = [check for check in CHECKS if check not in (checks.time_repeats, checks.halves_are_alike)]


@pytest.fixture(scope="module", autouse=True)
def _few() -> Iterator[None]:
    """Two documents, and a block of each that is read in two chunks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(examined, "BLOCK", 96)
        patched.setattr(examined, "embedded_documents", lambda: embedded_documents()[:2])
        yield


@pytest.fixture(scope="module")
def subject(model_folder: Callable[..., Path]) -> Subject:
    return made(model_folder("llama", context=128))


def made(folder: Path, dtype: str = "float32") -> Subject:
    return make_subject(str(folder), None, "cpu", dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_hold_on_every_family(model_folder: Callable[..., Path], family: str) -> None:
    subject = made(model_folder(family, context=128))
    for run in UNTIMED:
        check = run(subject)
        assert check.ok, check


def hooked(subject: Subject, change: Callable[[Tensor], Tensor]) -> Any:
    """The model's embeddings, changed."""
    return subject.loaded.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
        lambda _module, _inputs, out: change(out)
    )


def test_a_method_that_removes_at_ratio_0_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "kept", lambda n, ratio: max(1, n // 4))
    opening._layout.cache_clear()
    assert not checks.nothing_removed_is_full(subject).ok
    opening._layout.cache_clear()


def test_a_target_that_is_left_out_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_blocks = checks.cut_blocks

    def skipping(*arguments: Any) -> Any:
        cut = cut_blocks(*arguments)
        first = cut.pieces[0]
        return replace(cut, pieces=(replace(first, ids=first.ids[:5] + first.ids[6:]), *cut.pieces[1:]))

    monkeypatch.setattr(checks, "cut_blocks", skipping)
    assert not checks.targets_are_scored_once(subject).ok


def test_a_model_that_mixes_rows_is_seen(subject: Subject) -> None:
    handle = hooked(subject, lambda out: out + 0.1 * (len(out) - 1))
    try:
        assert not checks.batches_change_nothing(subject).ok
    finally:
        handle.remove()


@pytest.mark.parametrize(("size", "is_right"), [(1e-7, True), (1e-2, False)])
def test_a_near_tie_that_a_batch_decides_otherwise_is_no_fault(
    subject: Subject, size: float, is_right: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch is rounded otherwise, and a policy goes by the last digits of keys."""
    monkeypatch.setattr(KNorm, "scores", lambda self, view: (view.keys.float().sum(-1) * 1e4).frac())
    torch.manual_seed(0)
    handle = hooked(subject, lambda out: out * (1 + size * torch.randn_like(out)) if len(out) > 1 else out)
    try:
        check = checks.batches_change_nothing(subject)
    finally:
        handle.remove()
    assert check.ok == is_right, check
    assert "knorm" in check.found


def test_a_model_that_remembers_is_seen(subject: Subject) -> None:
    calls = iter(range(1 << 20))
    handle = hooked(subject, lambda out: out * (1 + 0.01 * next(calls)))
    try:
        assert not checks.documents_leave_nothing_behind(subject).ok
    finally:
        handle.remove()


def test_an_attention_that_takes_no_mask_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = runtime.LayoutSession._mask

    def open_(*arguments: Any) -> Tensor | None:
        found = mask(*arguments)
        return None if found is None else torch.ones_like(found)

    monkeypatch.setattr(runtime.LayoutSession, "_mask", open_)
    assert not checks.masked_is_removed(subject).ok


def test_a_view_that_holds_its_parent_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: EvictingLayer, entries: Tensor) -> None:
        both = (torch.cat([t.index_select(-2, entries), t], -2) for t in (self.keys, self.values))
        self.replace(*(t[:, :, : len(entries)] for t in both))

    monkeypatch.setattr(EvictingLayer, "keep", keep)
    assert not checks.removed_is_freed(subject).ok


LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 300, "factor": 5.0,
        "long_factor": [1.0 + i / 7 for i in range(8)], "short_factor": [1.0] * 8}
"""Rotations that change only beyond what doctor reads."""
TWO = {"num_hidden_layers": 2}
"""Enough where layers are alike, or of two kinds in turn."""
GEMMA3N = {**TWO, "vocab_size_per_layer_input": 4100, "layer_types": ["full_attention"] * 2,
           "activation_sparsity_pattern": [0.0] * 2, "intermediate_size": [96] * 2}


@pytest.mark.parametrize(("kind", "more"), [
    ("llama", {"rope_parameters": LONG, **TWO}), ("smollm3", {}), ("gemma3n_text", GEMMA3N),
    ("llama4_text", {"attention_chunk_size": 80}), ("gpt_oss", TWO), ("diffllama", TWO), ("deepseek_v3", TWO),
    ("gemma2", TWO),
])
def test_kinds_of_models_that_are_read_right_pass(
    zoo_folder: Callable[..., Path], kind: str, more: dict[str, Any]
) -> None:
    subject = made(zoo_folder(kind, **more))
    for run in UNTIMED:
        check = checks.run_check(run, subject)
        assert check.ok, check


@pytest.mark.parametrize(("kind", "words"), [
    ("bert", "come later"), ("lfm2", "conv"), ("granitemoehybrid", "linear"),
])
def test_kinds_of_models_that_cannot_be_read_are_refused(
    zoo_folder: Callable[..., Path], kind: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        made(zoo_folder(kind))


def failing(subject: Subject) -> list[str]:
    """The checks of the model that do not hold."""
    of_model = [run for run in UNTIMED if run is not checks.intervals_are_right]
    return [run.__name__ for run in of_model if not checks.run_check(run, subject).ok]


def test_rotations_that_are_not_fixed_are_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the switch lies beyond every text that doctor reads."""
    monkeypatch.setattr(rotary, "_fixed_copy", lambda module, length, model: copy.deepcopy(module))
    folder = zoo_folder("llama", rope_parameters=LONG, **TWO)
    subject = made(folder)
    assert failing(subject) == ["rotations_are_those_of_one_pass"]


def test_layers_that_are_taken_to_turn_alike_are_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = made(zoo_folder("smollm3"))
    found = rotary.find_rotations(subject.loaded.model)
    wrong = rotary.Rotations((found.layers[0],) * len(found.layers), False)
    monkeypatch.setattr(rotary, "find_rotations", lambda _: wrong)
    assert failing(subject) == ["layers_rotate_as_assumed"]


def test_rotations_that_differ_little_are_not_taken_for_one_another(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, where keys of near places say nothing."""
    stretched = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}
    folder = zoo_folder(
        "olmo3", head_dim=32, sliding_window=4096, max_position_embeddings=65536,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": stretched, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    )
    subject = made(folder, "bfloat16")
    assert model_checks.layers_rotate_as_assumed(subject).ok
    found = rotary.find_rotations(subject.loaded.model)
    wrong = rotary.Rotations((found.layers[1],) * len(found.layers), False)
    monkeypatch.setattr(rotary, "find_rotations", lambda _: wrong)
    assert not model_checks.layers_rotate_as_assumed(subject).ok


def test_embeddings_that_are_fed_where_ids_are_needed_are_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = runtime.Reader.inputs

    def embedded(self: runtime.Reader, *arguments: Any) -> Tensor:
        ids: Tensor = inputs(self, *arguments)
        found: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        return found

    folder = zoo_folder("gemma3n_text", **GEMMA3N)
    subject = made(folder)
    monkeypatch.setattr(runtime.Reader, "inputs", embedded)
    assert "targets_are_scored_once" in failing(subject)


def test_policies_of_a_model_that_attends_otherwise_are_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention twice per layer; caps that a policy does not know."""
    monkeypatch.setattr(probing._Probe, "_policies", lambda *_: "")
    for kind in ("diffllama", "gemma2"):
        subject = made(zoo_folder(kind, **TWO))
        assert {"policies_see_attention", "nothing_removed_is_full", "chosen_is_masked"} & set(failing(subject)), kind


@pytest.mark.parametrize(("kind", "more"), [
    ("llama4_text", {"attention_chunk_size": 80}), ("mistral", {"sliding_window": 80, **TWO}),
])
def test_attention_that_is_local_is_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str, more: dict[str, Any]
) -> None:
    monkeypatch.setattr(probing, "attention_span", lambda *_: None)
    subject = made(zoo_folder(kind, **more))
    assert "targets_are_scored_once" in failing(subject)


@pytest.mark.parametrize("kind", ["bert", "lfm2", "granitemoehybrid"])
def test_models_that_are_not_refused_are_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(ModelFacts, "check", lambda *_: None)
    subject = made(zoo_folder(kind))
    assert "targets_are_scored_once" in failing(subject)


def test_bytes_that_are_worked_out_from_a_configuration_are_seen(
    zoo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = made(zoo_folder("deepseek_v3"))
    monkeypatch.setattr(model_checks, "cache_shape", lambda _: CacheShape.uniform(4, 4, 16, 4))
    assert failing(subject) == ["bytes_are_those_cached"]


def test_a_policy_that_chooses_by_another_place_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it kept and what it says that it kept are two."""
    chosen = CachePolicy.chosen

    def shifted(self: CachePolicy, view: Any, keep: int) -> Tensor:
        view.positions.sub_(1).clamp_(min=0)
        return chosen(self, view, keep)

    monkeypatch.setattr(CachePolicy, "chosen", shifted)
    assert "chosen_is_masked" in failing(subject)


def test_intervals_that_are_too_narrow_are_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "bootstrap_intervals", lambda *_: np.array([[-0.001, 0.001]]))
    assert not checks.intervals_are_right(subject).ok


@pytest.mark.long
def test_people_are_like_people(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an encoder that tells the halves apart, or a clustering that is not seeded, is seen."""
    found = checks.halves_are_alike(subject)
    assert found.ok, found
    encode = SentenceEncoder.encode

    def tells_apart(self: SentenceEncoder, texts: Sequence[str]) -> Any:
        vectors = encode(self, texts)
        vectors[: len(vectors) // 2] += 0.2
        return vectors

    with monkeypatch.context() as planted:
        planted.setattr(SentenceEncoder, "encode", tells_apart)
        assert not checks.halves_are_alike(subject).ok
    monkeypatch.setattr(SentenceEncoder, "encode", lambda _, texts: np.zeros((len(texts), 8)))
    monkeypatch.setattr(similarity, "measure", lambda *_: [0.95, 0.99, 0.91, 0.99, 0.99])
    assert not checks.halves_are_alike(subject).ok


def test_a_published_number_is_measured_by_a_plain_loop(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " ".join(document.text for document in subject.documents)
    ids = torch.tensor([subject.loaded.tokenizer(text)["input_ids"]])
    nll, count = 0.0, 0
    for start in range(0, ids.shape[1] - 1, 100):
        window = ids[:, start : start + 100]
        if window.shape[1] > 1:
            loss = subject.loaded.model(input_ids=window, labels=window).loss
            nll, count = nll + float(loss) * (window.shape[1] - 1), count + window.shape[1] - 1
    expected = float(np.exp(nll / count))
    assert published.windowed_perplexity(subject.loaded, text, 100) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(published, "hub_rows", lambda _: [{"text": text}])
    monkeypatch.setattr(published, "load_model", lambda *_: subject.loaded)
    monkeypatch.setattr(published, "resolve_model", lambda _: None)
    monkeypatch.setattr(published, "WINDOW", 100)
    assert not published.published_is_met(subject).ok
    monkeypatch.setattr(published, "PUBLISHED", expected)
    assert published.published_is_met(subject).ok


@pytest.mark.parametrize(("second", "ok"), [(0.1, True), (0.12, False)])
def test_a_machine_that_is_busy_is_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, second: float, ok: bool
) -> None:
    gaps = iter([0.1] + [0.1, second] * 50)

    def timed(*_: Any) -> Timed:
        gap = next(gaps)
        return Timed(Timeline(0.0, 1.0, (1.0, 1.0 + gap)), 2.0, 1, 1.0)

    monkeypatch.setattr(checks, "time_request", timed)
    check = checks.time_repeats(subject)
    assert check.ok is ok
    assert ("16.7 %" in check.found) is not ok


def test_the_command_prints_a_line_each(
    called: Call, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "compare_halves", lambda _: ("0.97", True))
    monkeypatch.setattr(checks, "ROUNDS", 3)
    folder = model_folder("llama", context=128)
    found = called(["doctor", "--model", folder, "--threads", "1"])
    assert found.code in (0, 1), found.err  # the timing may fail beside other tests
    for line in ("ratio 0 is the full cache: nll", "masked is removed", "what is removed is freed: physical"):
        assert f"ok      {line}" in found.out
    document = called(["doctor", "--model", folder, "--threads", "1", "--json"]).document
    assert [check["ok"] for check in document["checks"][:-1]] == [True] * (len(CHECKS) - 1)
    assert document["ok"] is all(check["ok"] for check in document["checks"])


def test_bad_requests_are_sentences(called: Call) -> None:
    refused(called, ["doctor", "--model", "./nowhere"], "no model folder")
    refused(called, ["doctor", "--dtype", "float23"], "Unknown dtype")


def test_a_hub_that_cannot_be_reached_is_a_line(subject: Subject) -> None:
    check = checks.run_check(published.published_is_met, subject)
    assert not check.ok
    assert check.name == "published is met"
    assert "Hugging Face hub" in check.found
