"""Policies as they are profiled: read or filled, they hold the same, and what they hold is what is weighed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kvbench.inference.opening import Text, open_session
from kvbench.inference.policy_session import PolicySession
from kvbench.profiling.memory import CpuMemory
from kvbench.profiling.passes import measure_memory
from kvbench.profiling.request import SessionRequest, cache_bytes
from tests.helpers.models import VOCABULARY
from tests.helpers.policies import POLICIES, policy_of

P, G = 96, 24


def policed(model: nn.Module, name: str, **options: str) -> SessionRequest:
    policy = policy_of(name, step="4", **options)
    prompt = torch.randint(1, VOCABULARY, (2, P), generator=torch.Generator().manual_seed(5))
    session = open_session(model, policy, Text(P, P + G, (0, 1)), at_once=True)
    return SessionRequest(session, model, prompt, G)


def session_of(request: SessionRequest) -> PolicySession:
    assert isinstance(request.session, PolicySession)
    return request.session


@pytest.mark.parametrize("name", POLICIES)
def test_a_filled_cache_has_the_size_of_one_that_was_read(llama: nn.Module, name: str) -> None:
    read, filled = policed(llama, name), policed(llama, name)
    with torch.inference_mode():
        logits = read.read()
        filled.fill(7)
        assert (filled.held, filled.entries) == (read.held, read.entries)
        assert filled.live_bytes == read.live_bytes
        for request in (read, filled):
            logical, physical = cache_bytes(request)
            assert logical == request.live_bytes
            assert logical <= physical <= 1.05 * logical
        texts = [torch.stack(list(request.write(logits)), 1) for request in (read, filled)]
        assert texts[0].shape == (2, G)
        logical, physical = cache_bytes(read)
        assert physical <= 1.1 * logical
    assert session_of(read).read == P + G - 1


def test_a_filled_cache_is_seeded(llama: nn.Module) -> None:
    def filled(seed: int) -> torch.Tensor:
        request = policed(llama, "snapkv")
        with torch.inference_mode():
            request.fill(seed)
        return session_of(request).cache.layers[0].positions

    assert torch.equal(filled(1), filled(1))
    assert not torch.equal(filled(1), filled(2))


def test_peaks_fall_with_what_is_removed(llama: nn.Module) -> None:
    def weighed(name: str, **options: str) -> tuple[int, int]:
        found = measure_memory(lambda: policed(llama, name, **options), CpuMemory(), None)
        return found.prefill_peak, found.decode_peak

    whole, once, blocks = (weighed("knorm", ratio="0"), weighed("knorm"), weighed("knorm", prefill="blocks"))
    assert once[1] < whole[1]
    assert blocks[0] < once[0]
