"""Text that several sessions write together, one per policy or per layout: each row is as if its session were alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kvbench.execution import texts
from kvbench.execution.texts import write_texts
from kvbench.execution.worker import PreparedCell
from kvbench.inference.generation import read_prompt
from kvbench.inference.opening import Text, joined, open_session, prepared
from kvbench.inference.shared_context import SharedContext, can_share
from kvbench.inference.together import can_join
from kvbench.methods import make_method
from kvbench.models.loading import Loaded
from kvbench.protocols.generate import Generate
from kvbench.protocols.pieces import Piece
from tests.helpers.models import FAMILIES, VOCABULARY, small_model
from tests.helpers.records import SINKS
from tests.inference.test_shared_context import N, methods, opened, runs_on


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_policies_are_as_if_fed_alone(family: str) -> None:
    model = small_model(family)
    ids = torch.randint(1, VOCABULARY, (1, N + 12), generator=torch.Generator().manual_seed(3))
    context, question, answer = ids[:, :N], ids[:, N : N + 7], ids[0, N + 7 :]
    tried = [method for method in methods() if runs_on(method, family)]
    with prepared(model, None, N + 12):
        sessions = [session for session in (opened(model, method) for method in tried) if can_share(session)]
        sessions = [session for session in sessions if can_join(session)]
        assert len(sessions) > 30
        shared = SharedContext(model, context, sessions)
        for session in sessions:
            shared.read_into(session)
        alone = [copy.deepcopy(session, {id(model): model}) for session in sessions]
        rows = [torch.tensor([row]) for row in range(len(sessions))]
        together = joined(model, list(zip(rows, sessions, strict=True)))
        assert together is not None
        found = [together.extend(question.repeat(len(sessions), 1))]
        found += [together.extend(token.repeat(len(sessions), 1)) for token in answer]
        for row, session in enumerate(alone):
            *_, part = session.extend(question)
            logits = [part.logits[:, -1:]]
            for token in answer:
                *_, part = session.extend(token[None, None])
                logits.append(part.logits)
            for mine, theirs in zip(found, logits, strict=True):
                assert float((mine[row] - theirs[0]).abs().max()) < 1e-5, tried[row].name
            assert session.kept == sessions[row].kept
            assert session.bytes().logical == sessions[row].bytes().logical


LAYOUTS = [("scattered", "0.3"), ("scattered", "0.8"), ("sinks", "0.5"), ("local", "0.9"), ("full", "0")]


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_layouts_are_as_if_written_alone(family: str) -> None:
    """Rows under layouts of their own, two copies of each, with entries removed while text is written; then read on."""
    model = small_model(family)
    ids = torch.randint(1, VOCABULARY, (5, N + 12), generator=torch.Generator().manual_seed(5))
    copies = ids.repeat_interleave(2, dim=0)
    for name, ratio in LAYOUTS:
        method = make_method(name, Fraction(ratio))
        with prepared(model, None, N + 12):
            sessions = [
                open_session(model, method, Text(N, N + 8, (seed,)), seed=1, chunk=32) for seed in (3, 4, 9, 9, 11)
            ]
            for session, row in zip(sessions, ids, strict=True):
                read_prompt(session, row[None, :N])
            alone = [copy.deepcopy(session, {id(model): model}) for session in sessions]
            rows = list(torch.arange(5).split(1))  # type: ignore[no-untyped-call]
            groups = list(zip(rows, sessions, strict=True))
            assert joined(model, groups) is None, "only where the model is one that policies can be used on"
            together = joined(model, groups, layouts=True)
            assert together is not None
            together.expand(2)
            found = [together.step(copies[:, N + place]) for place in range(8)]
            found += [together.extend(copies[:, N + 8 : N + 11])[:, -1], together.extend(copies[:, N + 11 :])[:, -1]]
            for row, session in enumerate(alone):
                mine = copies[2 * row : 2 * row + 2]
                session.expand(2)
                logits = [session.step(mine[:, N + place]) for place in range(8)]
                for start, stop in ((N + 8, N + 11), (N + 11, N + 12)):
                    *_, part = session.extend(mine[:, start:stop])
                    logits.append(part.logits[:, -1])
                for one, other in zip(found, logits, strict=True):
                    assert float((one[2 * row : 2 * row + 2] - other).abs().max()) < 1e-5, (name, ratio)
                joint = sessions[row]
                assert (session.kept, session.peak, session.removals) == (joint.kept, joint.peak, joint.removals)
                assert session.bytes().logical == joint.bytes().logical
                assert [t.shape for t in session.tensors()] == [t.shape for t in joint.tensors()]


def test_layouts_with_special_tokens_are_fed_by_themselves(llama: nn.Module) -> None:
    sessions = [
        open_session(llama, make_method("sentinel", Fraction(1, 2)), Text(N, N + 8, (seed,)), seed=1) for seed in (1, 2)
    ]
    groups = list(zip(torch.arange(2).tensor_split(2), sessions, strict=True))
    assert joined(llama, groups, layouts=True) is None


@pytest.mark.parametrize("end", [0, 60])
def test_texts_of_a_batch_of_random_layouts_are_those_of_each_alone(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch, end: int
) -> None:
    """And one forward pass serves all of them per token, however many layouts there are and when their texts end."""
    cell = replace(SINKS, method="scattered", execution="streamed")
    prepared_cell = PreparedCell(cell, make_method("scattered", Fraction(1, 2)), None)
    protocol = Generate(
        chunk=32, bos="auto", prefix=N, new_tokens=10, in_words=False, decodings=("nucleus", "greedy"), top_p=0.9,
        temperature=1.0, batch=0, preset="task",
    )
    ids = torch.randint(1, VOCABULARY, (4, N + 10), generator=torch.Generator().manual_seed(6)).tolist()
    pieces = [
        Piece(str(row), tuple(text), N, N, 1, layout, is_generated=True)
        for row, (text, layout) in enumerate(zip(ids, (2, 2, 5, 7), strict=True))
    ]
    groups = [pieces[:2], pieces[2:3], pieces[3:]]
    loaded = Loaded(llama, SimpleNamespace(eos_token_id=None), 512, VOCABULARY)
    monkeypatch.setattr(texts, "end_tokens", lambda _: tuple(range(end)))
    calls: list[int] = []
    hook = llama.register_forward_pre_hook(lambda *_: calls.append(1))
    found = []
    for at_once in (True, True, False):  # the first call looks at the model, too
        calls.clear()
        found.append((write_texts(loaded, prepared_cell, protocol, groups, at_once), len(calls)))
    hook.remove()
    _, (together, passes), (alone, more) = found
    if not end:
        assert more - passes == 2 * 9, "nine tokens are read back in three sessions, or in one pass"
    else:
        lengths = [max(len(text) for row in written.ids for text in row) for written in together]
        assert len(set(lengths)) > 1, "texts end at different times"
    for mine, theirs in zip(together, alone, strict=True):
        assert mine.ids == theirs.ids
        assert mine._replace(ids=[], shares=None) == theirs._replace(ids=[], shares=None)  # type: ignore[arg-type]
        assert torch.equal(mine.shares, theirs.shares)
