"""A context that is read once for many policies: what is kept, and what is predicted, is as if each had read it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from kvbench.execution.contexts import Contexts
from kvbench.execution.worker import PreparedCell
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.session import Session
from kvbench.inference.shared_context import SharedContext, keeps_whole
from kvbench.methods import METHODS, CachePolicy, Method, make_method
from kvbench.protocols.answer import AnswerProtocol
from kvbench.protocols.pieces import Asked, Cut, Piece
from kvbench.protocols.scoring import score_pieces, share_context
from tests.helpers.models import FAMILIES, VOCABULARY, small_model
from tests.helpers.records import SINKS

N = 90
ALONE = {"lorc"}
"""Policies that change the model, or remove entries while they read."""


def methods() -> list[Method]:
    """Every policy, at two ratios where it has one."""
    found: list[Method] = []
    for name, kind in METHODS.items():
        if issubclass(kind, CachePolicy) and not kind.adapter_kinds:
            known = kind.options()
            given = {"window": "4", "group": "8", "recent": "8"}
            options = {key: value for key, value in given.items() if key in known}
            ratios = ("0.2", "0.3") if name == "think" else ("0.4", "0.7")
            found += [make_method(name, Fraction(ratio), options) for ratio in ratios]
    found.append(make_method("expected-attention", Fraction("0.4"), {"sinks": "20"}))  # other queries are left out
    return found


def runs_on(method: Method, family: str) -> bool:
    """Whether a family is not refused: it has learned positions to count anew, or normalises its keys."""
    return not (family in ("opt", "gpt2") and getattr(method, "rerotated", 0)) and not (
        family == "qwen3" and method.name == "lorc"
    )


def opened(model: nn.Module, method: Method) -> Session:
    return open_session(model, method, Text(N, N, (3,), has_continuation=True), seed=1, chunk=64, at_once=True)


@torch.inference_mode()
def test_a_pass_that_fails_is_not_counted_twice(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(1, VOCABULARY, (1, N), generator=torch.Generator().manual_seed(2))
    method = make_method("h2o", Fraction(1, 2), {})
    with prepared(llama, None, N):
        shared = SharedContext(llama, ids, [opened(llama, method)])
        with monkeypatch.context() as broken:
            broken.setattr(llama.lm_head, "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                shared.read_into(opened(llama, method))
        together, alone = opened(llama, method), opened(llama, method)
        shared.read_into(together)
        for _ in alone.prefill(ids, N):
            pass
    for mine, other in zip(together.cache.layers, alone.cache.layers, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(mine.positions, other.positions)
        assert torch.allclose(mine.sums, other.sums)


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_cache_takes_over_what_policies_read(family: str) -> None:
    """It reads nothing itself, holds what it would have read, and shares no storage with the others."""
    model = small_model(family)
    ids = torch.randint(1, VOCABULARY, (1, N + 6), generator=torch.Generator().manual_seed(4))
    full, policy = make_method("full", Fraction(0), {}), make_method("snapkv", Fraction(1, 2), {"window": "4"})
    with prepared(model, None, N + 6):
        shared = SharedContext(model, ids[:, :N], [opened(model, policy), opened(model, full)])
        together, alone = opened(model, full), opened(model, full)
        assert keeps_whole(together)
        assert not keeps_whole(opened(model, policy))
        assert not keeps_whole(opened(model, make_method("sinks", Fraction(1, 2), {})))
        logits = [shared.read_into(together)]
        shared.read_into(opened(model, policy))
        assert shared.passes == 1
        *_, part = alone.prefill(ids[:, :N], N - 1)
        assert torch.allclose(logits[0], part.logits[:, -1:], atol=1e-5)
        assert (together.kept, together.peak, together.removals) == (N, N, 0)
        assert (alone.kept, alone.peak, alone.removals) == (N, N, 0)
        assert together.bytes() == alone.bytes()
        assert together.entries_by_head() == alone.entries_by_head()
        stored = {tensor.data_ptr() for reader in shared.readers.values() for tensor in reader.cache.tensors()}
        assert not stored & {tensor.data_ptr() for tensor in together.tensors()}
        for mine, other in zip(together.held_positions() or (), alone.held_positions() or (), strict=True):
            assert torch.equal(mine, other)
        for start, stop in ((N, N + 4), (N + 4, N + 5), (N + 5, N + 6)):
            (mine,), (other,) = together.extend(ids[:, start:stop]), alone.extend(ids[:, start:stop])
            assert float((mine.logits - other.logits).abs().max()) < 1e-5
        assert SharedContext(model, ids[:, :N], [together]).read_into(opened(model, full)).shape[1] == 1


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_changes_no_number(family: str) -> None:
    model = small_model(family)
    ids = torch.randint(1, VOCABULARY, (1, N + 6), generator=torch.Generator().manual_seed(2))
    tried = [method for method in methods() if runs_on(method, family)]
    with prepared(model, None, N + 6):
        shared = SharedContext(model, ids[:, :N], [opened(model, method) for method in tried])
        for method in tried:
            together, alone = opened(model, method), opened(model, method)
            shared.read_into(together)
            for _ in alone.prefill(ids[:, :N], N):
                pass
            assert (together.kept, together.peak) == (alone.kept, alone.peak)
            ours, theirs = together.bytes(), alone.bytes()
            assert (ours.logical, ours.full) == (theirs.logical, theirs.full)
            assert ours.physical <= theirs.physical  # alone, fused projections leave spare room
            for mine, other in zip(together.held_positions() or (), alone.held_positions() or (), strict=True):
                assert torch.equal(mine, other), method.name
            one, other = (next(session.extend(ids[:, N:])).logits for session in (together, alone))
            assert float((one - other).abs().max()) < 1e-5, method.name
    alike = [method for method in tried if method.name not in ALONE and method.prefill == "once"]  # type: ignore[attr-defined]
    assert shared.passes == 1 + len(tried) - len(alike)
    assert len(alike) > 20


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_behind_a_context_that_is_read_in_chunks_for_all_are_those_of_each_alone(family: str) -> None:
    model = small_model(family)
    generator = torch.Generator().manual_seed(4)
    rows = torch.randint(1, VOCABULARY, (3, N + 20), generator=generator).tolist()
    pieces = [Piece(str(row), tuple(ids), N, N, 1, row) for row, ids in enumerate(rows)]
    tried = [method for method in methods() if runs_on(method, family)]
    shared, sharing = share_context(model, tried, pieces, chunk=32, seed=1)
    assert shared is not None
    assert {method.name for method in tried} - {method.name for method in sharing} <= ALONE
    for method in sharing:
        together, _ = score_pieces(model, method, pieces, chunk=32, seed=1, shared=shared)
        alone, _ = score_pieces(model, method, pieces, chunk=32, seed=1)
        assert float((together.nll - alone.nll).abs().max()) < 1e-6, method.name
        assert together.visible == alone.visible
        for name in ("held", "peak", "logical", "physical", "full"):
            assert getattr(together, name) == getattr(alone, name), (method.name, name)
    assert shared.passes == 1


@torch.inference_mode()
def test_a_shared_pass_that_fails_leaves_every_cell_its_own(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another cell needs of the pass may be too much for the memory: the full cache is not lost with it."""
    ids = tuple(range(1, N + 1))
    piece = Piece("d", (*ids, 5), N, N + 1, 0, 3, asked=Asked(("x",), "contains-all", 2, None, N))
    cells = [
        PreparedCell(replace(SINKS, method=name), make_method(name, ratio, {}), None)
        for name, ratio in (("full", Fraction(0)), ("knorm", Fraction(1, 2)))
    ]
    protocol = AnswerProtocol(64, "auto", "", False, N, False, "end", "apart")
    monkeypatch.setattr(SharedContext, "_read", lambda self: torch.zeros(1 << 62))
    reading = Contexts(llama, protocol, "g", Cut((piece,), 0), cells)
    assert reading.sharing == [cells[1], cells[0]]
    with prepared(llama, None, N + 2):
        held = [reading.read(ids, cell).kept for cell in cells]
    assert held == [N, N // 2]
