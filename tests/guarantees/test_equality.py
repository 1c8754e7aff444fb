"""The main guarantee: one masked pass and a stream with entries really removed give the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kvbench.inference.layout_session import MaskedSession
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS, Layout, LayoutMethod, TextStructure, make_layout
from kvbench.methods.layouts.chunked import chunk_layout
from kvbench.methods.layouts.chunks import Chunked
from kvbench.methods.layouts.layout import Tokens
from kvbench.methods.memories.memory import Memory
from tests.helpers.cases import CASES, Case, N, label
from tests.helpers.models import VOCABULARY, adapter_for
from tests.helpers.sessions import layout_method, read_all

TOLERANCE = 1e-5
ONE_BY_ONE = ("llama", "gpt2")


def reader(model: nn.Module, method: LayoutMethod) -> Reader:
    return Reader(model, adapter_for(model, method))


def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, N), generator=torch.Generator().manual_seed(3))


def expected_peak(layout: Layout, chunk: int) -> int:
    """The most entries ever held, counted from the rule that an entry dies after its last query."""
    last = layout.last_query
    starts = range(0, len(layout), chunk)
    return max(
        int((last[:s] >= s).sum()) + min(s + chunk, len(layout)) - s for s in starts
    )


def test_every_method_is_tried() -> None:
    assert {case.name for case in CASES} == {name for name, kind in METHODS.items() if issubclass(kind, LayoutMethod)}


@pytest.mark.parametrize("case", CASES, ids=label)
@torch.inference_mode()
def test_streamed_equals_one_pass(model: nn.Module, family: str, case: Case) -> None:
    """In chunks of any size; token by token in two families (test_decoding.py writes so in all of them)."""
    method = case.method
    layout = make_layout(method, N, 0, 5)
    held = len(layout.held_after(len(layout))) if case.held is None else case.held
    run = reader(model, method)
    with run.ready():
        masked = run.one_pass(ids(), layout)
        for chunk in (1 if family in ONE_BY_ONE else 3, 7, 64):
            read = read_all(run, ids(), layout, chunk)
            session, parts = read
            cache, streamed = session.cache, read.logits
            assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
            assert (streamed - masked).abs().max() < TOLERANCE
            assert session.kept == cache.entries() == held
            assert session.peak == expected_peak(layout, chunk)
            assert cache.logical_bytes() == cache.physical_bytes()
            assert len(cache.layers) == 3
            assert all(layer.keys.shape[-2] == held for layer in cache.layers)


TURNS = (7, 3, 20, 1, 34, 15)


@pytest.mark.parametrize(
    "name", ["none", "full", "local", "ccm-concat", "ccm-merge", "gist", "meanpool", "pic", "prompt"]
)
@torch.inference_mode()
def test_turns_of_any_length_and_what_follows(model: nn.Module, name: str) -> None:
    """A dialogue, compressed turn by turn, and what follows it: at once, one by one, and masked."""
    context, more = sum(TURNS), N - sum(TURNS)
    method = layout_method(name, "0.5")
    layout = make_layout(method, context, 0, 5, TextStructure(TURNS))
    expected = {"none": 0, "full": context, "local": 40, "ccm-merge": 2}.get(name, 2 * len(TURNS))
    run, text = reader(model, method), ids()
    held = layout.held_after(len(layout))
    assert len(held) == expected
    with run.ready():
        at_once, one_by_one = (read_all(run, text[:, :context], layout, 7).session for _ in range(2))
        (together,) = at_once.extend(text[:, context:])
        steps = [next(one_by_one.extend(text[:, context + i : context + i + 1])).logits for i in range(more)]
        after_one_pass = MaskedSession(run, layout, context)
        for _ in after_one_pass.prefill(text[:, :context]):
            pass
        (masked,) = after_one_pass.extend(text[:, context:])
    assert (torch.cat(steps, 1) - together.logits).abs().max() < TOLERANCE
    assert (together.logits - masked.logits).abs().max() < TOLERANCE
    assert one_by_one.cache.entries() == one_by_one.kept == len(held) + more


@torch.inference_mode()
def test_what_follows_a_context_is_masked_by_hand(llama: nn.Module) -> None:
    """The same logits from one forward pass with a hand-made mask and nothing removed."""
    context, more = N - 16, 16
    method = layout_method("sentinel", "0.7")
    layout = make_layout(method, context, 0, 5)
    run, text = reader(llama, method), ids()
    held, size = layout.held_after(len(layout)), len(layout)
    mask = torch.zeros(size + more, size + more, dtype=torch.bool)
    mask[:size, :size] = layout.mask
    mask[size:, held] = True
    mask[size:, size:] = torch.ones(more, more, dtype=torch.bool).tril()
    with run.ready():
        (together,) = read_all(run, text[:, :context], layout, 7).session.extend(text[:, context:])
        assert run.adapter is not None
        run.adapter.open_gate(layout.special_slots)
        embeddings = llama.get_input_embeddings()(text[:, context:])
        inputs = torch.cat([run.inputs(text[:, :context], layout), embeddings], 1)
        position = torch.cat([layout.position, torch.arange(context, context + more)])
        out = llama(inputs_embeds=inputs, attention_mask=mask[None, None], position_ids=position[None])
    assert (together.logits - out.logits[:, size:]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "name", [name for name, kind in METHODS.items() if kind.compresses() and issubclass(kind, LayoutMethod)]
)
@torch.inference_mode()
def test_nothing_removed_is_the_base_model_exactly(model: nn.Module, name: str) -> None:
    """At ratio 0, or with no chunk yet full, a gated method is the base model bit for bit."""
    method = layout_method(name, "0")
    if isinstance(method, Chunked):
        layout = chunk_layout(N, [], method.n_comp, method.visibility(0), method.merge_rule())
    elif isinstance(method, Memory):
        layout = method.layout_of(N, [])
    else:
        layout = make_layout(method, N, 0, 5)
    run = reader(model, method)
    base = model(ids()).logits
    with run.ready():
        found = run.one_pass(ids(), layout)
        if run.adapter is not None and run.adapter.card.gate not in ("gated", "writer"):
            assert torch.equal(found, model(ids()).logits)
        else:
            assert torch.equal(found, base)


@torch.inference_mode()
def test_the_test_sees_a_wrong_mask(model: nn.Module) -> None:
    """A visibility that shows one entry too few is far outside the tolerance."""
    right = make_layout(layout_method("local", "0.7"), N, 0, 0)

    def wrong_visibility(queries: Tokens, keys: Tokens) -> Tensor:
        return right.visibility(queries, keys) & (keys.raw != queries.raw - 3)

    wrong = Layout(right.tokens, right.position, wrong_visibility, N)
    run = Reader(model)
    assert (run.one_pass(ids(), right) - run.one_pass(ids(), wrong)).abs().max() > 100 * TOLERANCE


@torch.inference_mode()
def test_rows_do_not_depend_on_their_batch(model: nn.Module) -> None:
    method = layout_method("sentinel", "0.7")
    layout = make_layout(method, N, 0, 5)
    run = reader(model, method)
    with run.ready():
        both = run.one_pass(ids(), layout)
        alone = run.one_pass(ids()[1:], layout)
    assert (both[1:] - alone).abs().max() < TOLERANCE
