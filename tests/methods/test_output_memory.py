"""Predictions from a memory of hidden states and the tokens that followed: against a loop over all pairs."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.inference.cache_state import restore_session, session_state
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.output_memory import OutputMemorySession
from kvbench.methods import make_method
from tests.helpers.models import VOCABULARY

N, MORE = 60, 12
RATIO = Fraction("0.2")


def ids(n: int = N, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (2, n), generator=torch.Generator().manual_seed(seed))


def opened(model: nn.Module, text: Text, chunk: int = 64, ratio: Fraction = RATIO, **options: str) -> Any:
    session = open_session(model, make_method("output-memory", ratio, options), text, chunk=chunk)
    assert isinstance(session, OutputMemorySession)
    return session


def read(model: nn.Module, chunk: int = 64, text: Tensor | None = None, **options: str) -> Tensor:
    """Logits ``[2, N, vocabulary]`` of a text that is scored while it is read."""
    tokens = ids() if text is None else text
    n = tokens.shape[1]
    with torch.inference_mode(), prepared(model, None, n):
        session = opened(model, Text(n, n, (0, 0)), chunk, **options)
        return torch.cat([part.logits for part in session.prefill(tokens)], 1)


def window_of(model: nn.Module) -> int:
    """Entries that 60 pairs leave of 48: a pair is a state of 64 numbers and an id."""
    layers, heads = 3, 4 if model.config.model_type in ("gpt_neox", "opt", "gpt2") else 2
    entry, pair = 2 * layers * heads * 16 * 4, 64 * 4 + 4
    return (48 * entry - N * pair) // entry


@torch.inference_mode()
def states_of(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and last hidden states under a window, from one pass with a mask made by hand."""
    size, n = window_of(model), tokens.shape[1]
    place = torch.arange(n)
    mask = (place[None] <= place[:, None]) & (place[None] >= place[:, None] - size)
    with prepared(model, None, n):
        out = model(
            input_ids=tokens, attention_mask=mask[None, None], position_ids=place[None], output_hidden_states=True
        )
    return out.logits, out.hidden_states[-1]


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_prediction_is_that_of_a_loop_over_all_pairs(model: nn.Module, chunk: int) -> None:
    found = read(model, chunk, mix="30", sharpness="5")
    logits, states = states_of(model, ids())
    for row in range(2):
        for i in range(0, N, 7):
            expected = logits[row, i].softmax(-1)
            if i:
                scores = [5 * torch.cosine_similarity(states[row, i], states[row, j], dim=0) for j in range(i)]
                weights = torch.stack(scores).softmax(0)
                memory = torch.zeros(VOCABULARY)
                for j in range(i):
                    memory[ids()[row, j + 1]] += weights[j]
                expected = 0.7 * expected + 0.3 * memory
            assert (found[row, i].softmax(-1) - expected).abs().max() < 1e-5
            if i:
                assert found[row, i].exp().sum() == pytest.approx(1, abs=1e-5)


def test_without_its_share_it_is_the_window(llama: nn.Module) -> None:
    logits, _ = states_of(llama, ids())
    assert (read(llama, 7, mix="0") - logits).abs().max() < 1e-5


def test_what_neither_predicts_has_a_likelihood(llama: nn.Module) -> None:
    """A model so sure that other tokens' probabilities are 0 in float32."""
    head = llama.get_output_embeddings()  # type: ignore[operator]
    weight = head.weight.clone()
    try:
        with torch.no_grad():
            head.weight.mul_(1000)
        assert bool(torch.isfinite(read(llama, mix="99")).all())
    finally:
        with torch.no_grad():
            head.weight.copy_(weight)


def test_a_copied_passage_is_predicted(llama: nn.Module) -> None:
    """Deterministic states and a sharp memory: after a repeated passage its continuation has all of the mass."""
    passage = ids(24)
    text = torch.cat([passage, passage], 1)
    with torch.inference_mode(), prepared(llama, None, 48):
        session = opened(llama, Text(48, 48, (0, 0)), mix="99", sharpness="1000", ratio=Fraction("0.4"))
        found = torch.cat([part.logits for part in session.prefill(text)], 1)
    hits = (found[:, 30:47].argmax(-1) == text[:, 31:]).float().mean()
    assert hits > 0.5


def test_what_is_held_are_the_bytes_asked_for(model: nn.Module) -> None:
    with torch.inference_mode(), prepared(model, None, N + MORE):
        session = opened(model, Text(N, N, (0, 0), has_continuation=True), 7)
        for _ in session.prefill(ids(), N - 1):
            pass
        entry, held = session.cache.entry_bytes() // 2, session.bytes()
        assert session.cache.entries() == window_of(model)
        pairs = (N - 1) * (64 * 4 + 4) + 64 * 4  # the last state's next token is not known yet
        assert held.logical == 2 * (window_of(model) * entry + pairs)
        assert 47 * entry < held.logical / 2 <= 48 * entry
        assert abs(session.kept - 48) <= 1
        assert held.physical <= held.logical * 33 / 32 + 2 * (entry + 260)
        before = session.bytes().logical
        list(session.extend(ids(MORE, 4)))
        added = 2 * MORE * entry
        assert session.bytes().logical == before + added + 2 * 4, "text read on behind is in no pair but the first"


def test_written_one_by_one_is_what_reading_gives(model: nn.Module) -> None:
    """Tokens that are written are remembered as those that are read."""
    more = ids(MORE, 4)
    text = Text(N, N + MORE, (0, 0))
    with torch.inference_mode(), prepared(model, None, N + MORE):
        session, twin = opened(model, text, mix="30"), opened(model, text, 7, mix="30")
        for _ in session.prefill(ids(), N - 1):
            pass
        steps = torch.stack([session.step(column) for column in more.unbind(1)], 1)
        twin.context = N + MORE
        together = torch.cat([part.logits for part in twin.prefill(torch.cat([ids(), more], 1), N)], 1)
    assert (steps - together).abs().max() < 1e-4


def test_a_saved_session_goes_on_as_the_one_that_was_saved(llama: nn.Module) -> None:
    text = Text(N, N + MORE, (0, 0))
    with torch.inference_mode(), prepared(llama, None, N + MORE):
        session, again = opened(llama, text), opened(llama, text)
        for _ in session.prefill(ids(), N - 1):
            pass
        tensors: dict[str, Tensor] = {}
        state = session_state(session, tensors)
        restore_session(again, state, tensors, torch.device("cpu"))
        column = ids(1, 4)[:, 0]
        assert torch.equal(session.step(column), again.step(column))
        session.expand(2)
        assert session.step(column.repeat_interleave(2)).shape == (4, VOCABULARY)


def test_pairs_that_leave_no_window_are_refused(llama: nn.Module) -> None:
    with pytest.raises(UserError, match="leave none"):
        opened(llama, Text(N, N, (0, 0)), ratio=Fraction("0.9"))
