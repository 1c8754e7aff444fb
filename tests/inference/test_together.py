"""Answers that are written together, one row per policy: each row is as if its session had been fed alone."""

from __future__ import annotations

import copy

import pytest
import torch

from kvbench.inference.opening import joined, prepared
from kvbench.inference.shared_context import SharedContext, can_share
from kvbench.inference.together import can_join
from tests.helpers.models import FAMILIES, VOCABULARY, small_model
from tests.inference.test_shared_context import N, methods, opened


@torch.inference_mode()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_many_policies_are_as_if_fed_alone(family: str) -> None:
    model = small_model(family)
    ids = torch.randint(1, VOCABULARY, (1, N + 12), generator=torch.Generator().manual_seed(3))
    context, question, answer = ids[:, :N], ids[:, N : N + 7], ids[0, N + 7 :]
    tried = [method for method in methods() if not (family in ("opt", "gpt2") and getattr(method, "rerotated", 0))]
    with prepared(model, None, N + 12):
        sessions = [session for session in (opened(model, method) for method in tried) if can_share(session)]
        sessions = [session for session in sessions if can_join(session)]
        assert len(sessions) > 30
        shared = SharedContext(model, context, sessions)
        for session in sessions:
            shared.read_into(session)
        alone = [copy.deepcopy(session, {id(model): model}) for session in sessions]
        rows = [torch.tensor([row]) for row in range(len(sessions))]
        together = joined(list(zip(rows, sessions, strict=True)))
        assert together is not None
        found = [together.extend(model, question.repeat(len(sessions), 1))]
        found += [together.extend(model, token.repeat(len(sessions), 1)) for token in answer]
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
