"""``kvbench doctor``: every check holds on every family, and is seen to fail when its fault is planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kvbench import runtime
from kvbench.cache.evicting import EvictingLayer
from kvbench.doctor import CHECKS, Subject, checks, make_subject, published, similarity
from kvbench.judges.encoder import SentenceEncoder
from kvbench.methods import windows
from kvbench.profiling.clock import Timeline
from kvbench.profiling.passes import Timed
from tests.conftest import FAMILIES
from tests.test_bad_input import refused
from tests.test_compare import Call

UNTIMED = [check for check in CHECKS if check not in (checks.time_repeats, checks.halves_are_alike)]


@pytest.fixture(scope="module")
def subject(model_folder: Callable[..., Path]) -> Subject:
    return small(make_subject(str(model_folder("llama", context=128)), None, "cpu", "float32"))


def small(subject: Subject) -> Subject:
    """With two documents to cut, and two blocks."""
    return replace(subject, documents=subject.documents[:2], pieces=subject.pieces[:3])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_hold_on_every_family(model_folder: Callable[..., Path], family: str) -> None:
    subject = small(make_subject(str(model_folder(family, context=128)), None, "cpu", "float32"))
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
    assert not checks.nothing_removed_is_full(subject).ok


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


def test_a_model_that_remembers_is_seen(subject: Subject) -> None:
    calls = iter(range(1 << 20))
    handle = hooked(subject, lambda out: out * (1 + 0.01 * next(calls)))
    try:
        assert not checks.documents_leave_nothing_behind(subject).ok
    finally:
        handle.remove()


def test_an_attention_that_takes_no_mask_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = runtime.Reader._mask

    def open_(*arguments: Any) -> Tensor | None:
        found = mask(*arguments)
        return None if found is None else torch.ones_like(found)

    monkeypatch.setattr(runtime.Reader, "_mask", staticmethod(open_))
    assert not checks.masked_is_removed(subject).ok


def test_a_view_that_holds_its_parent_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def keep(self: EvictingLayer, entries: Tensor) -> None:
        both = (torch.cat([t.index_select(-2, entries), t], -2) for t in (self.keys, self.values))
        self.replace(*(t[:, :, : len(entries)] for t in both))

    monkeypatch.setattr(EvictingLayer, "keep", keep)
    assert not checks.removed_is_freed(subject).ok


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
    check = checks.carried_out(published.published_is_met, subject)
    assert not check.ok
    assert check.name == "published is met"
    assert "Hugging Face hub" in check.found
