"""Memories that are computed from text: what the proofs of every writer and of the layout require."""

from __future__ import annotations

import gc
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM

from kvbench.errors import UserError
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.memory_session import MemorySession
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS, TextStructure, make_layout, make_method
from kvbench.methods.adapters import fresh_adapter, load_adapter
from kvbench.methods.layouts.chunked import equal_chunks
from kvbench.methods.layouts.layout import COMP, TEXT
from kvbench.methods.memories.comprexit import TransportWriter, transport
from kvbench.methods.memories.gradual_forgetting import FadingWriter, kernel
from kvbench.methods.memories.ic_former import DigestWriter
from kvbench.methods.memories.icae import SlotWriter
from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.recurrent import RecurrentWriter
from kvbench.methods.memories.writer import ParallelWriter, embedded
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded
from kvbench.training.adapter_recipe import _check_model
from tests.helpers.models import VOCABULARY, adapter_for, small_card, small_model

N = 96
NAMES = [name for name, kind in METHODS.items() if issubclass(kind, Memory)]
RECURRENT = {"rmt", "autocompressors", "gradual-forgetting"}


def ids(rows: int = 2, n: int = N, seed: int = 3) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, n), generator=torch.Generator().manual_seed(seed))


def memory(name: str, **options: str) -> Memory:
    """A memory of 4 entries per chunk of 16 tokens."""
    of_ratio = "ratio" in METHODS[name].budgets
    given = {"n_comp": "4", **({} if of_ratio else {"segment": "16"}), **options}
    method = make_method(name, Fraction("0.75") if of_ratio else Fraction(0), given)
    assert isinstance(method, Memory)
    return method


def reader_of(model: nn.Module, method: Memory) -> Reader:
    return Reader(model, adapter_for(model, method))


def rows_of(reader: Reader, text: Tensor, chunks: list[int]) -> Tensor:
    with torch.inference_mode(), reader.ready():
        return reader.write(text, chunks, reader.begin(len(text)))[0]


class Identity(ParallelWriter):
    """Gives back the embeddings of the chunk itself."""

    def read(self, model: nn.Module, ids: Tensor) -> Tensor:
        return embedded(model, ids)


@pytest.mark.parametrize("name", [name for name in NAMES if "ratio" in METHODS[name].budgets])
@torch.inference_mode()
def test_a_memory_of_the_text_itself_is_the_full_cache(model: nn.Module, name: str) -> None:
    """A row per token, each its embedding, at its place: chunk by chunk the text is in the cache again."""
    method = make_method(name, Fraction(0), {"n_comp": "16"})
    adapter = fresh_adapter(small_card("writer", name, 0, n_comp="16"), model)
    adapter.writer = Identity()
    text = ids()
    layout = make_layout(method, N, 0, 0, TextStructure(is_continued=True))
    assert layout.unread == 80
    assert layout.written == (16,) * 5, "the last chunk is not full without its last token"
    session = MemorySession(Reader(model, adapter), layout, N, 7)
    with session.reader.ready():
        (*_, last) = session.prefill(text, N - 16)
        (more,) = session.extend(ids(n=20, seed=4))
    full = model(torch.cat([text, ids(n=20, seed=4)], 1)).logits
    assert (last.logits[:, -1] - full[:, N - 1]).abs().max() < 1e-5
    assert (more.logits - full[:, N:]).abs().max() < 1e-5
    assert session.kept == N + 20


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_chunks_that_are_not_read_leave_later_logits_as_they_are(model: nn.Module, name: str) -> None:
    run, found = None, []
    for unread in ("true", "false"):
        method = memory(name, unread=unread)
        run = run or reader_of(model, method)
        text = Text(N, N, (0, 0), has_continuation=True)
        with prepared(model, run.adapter, N + 20):
            session = open_session(model, method, text, adapter=run.adapter, chunk=7)
            assert isinstance(session, MemorySession)
            parts = list(session.prefill(ids(), N - 1))
            (more,) = session.extend(ids(n=20, seed=4))
        assert parts[-1].stop == N
        assert session.layout.unread == (95 if unread == "true" else 0)
        found.append((torch.cat([parts[-1].logits[:, -1:], more.logits], 1), session.kept, session.bytes().logical))
    (skipped, held, size), (read, *same) = found
    assert (skipped - read).abs().max() < 1e-5
    assert [held, size] == same
    # Five chunks, the remaining 15 tokens as one more, and the token that what follows is predicted from.
    assert held == (4 if method.is_latest else 4 * 6) + 1 + 20


@pytest.mark.parametrize("name", NAMES)
def test_written_one_by_one_or_at_once(llama: nn.Module, name: str) -> None:
    reader, text, chunks = reader_of(llama, memory(name)), ids(), [16, 16, 9, 16, 3]
    at_once, found, begin = rows_of(reader, text, chunks), [], 0
    with torch.inference_mode(), reader.ready():
        state = reader.begin(2)
        for length in chunks:
            rows, state = reader.write(text[:, begin : begin + length], [length], state)
            found.append(rows)
            begin += length
    assert (torch.cat(found, 1) - at_once).abs().max() < 1e-6
    assert at_once.shape == (2, 4 * len(chunks), 64)
    alone = torch.cat([rows_of(reader, row[None], chunks) for row in text])
    assert (alone - at_once).abs().max() < 1e-5, "rows of a batch are those of its texts"


@pytest.mark.parametrize("name", NAMES)
def test_a_token_changes_the_memory_of_its_chunk_and_of_later_ones_only_if_recurrent(
    llama: nn.Module, name: str
) -> None:
    reader, chunks = reader_of(llama, memory(name)), [16] * 5
    other = ids().clone()
    other[:, 37] = other[:, 37] % (VOCABULARY - 1) + 1
    moved = (rows_of(reader, ids(), chunks) - rows_of(reader, other, chunks)).abs().amax((0, 2)).view(5, 4).amax(1)
    changed = [bool(one > 0) for one in moved]
    assert changed == [False, False, True, *([name in RECURRENT] * 2)]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_nothing_of_the_writers_own_cache_is_kept(llama: nn.Module, name: str) -> None:
    """What is alive after reading is what the session says it holds, and its size is the closed form."""
    method, text = memory(name), ids()
    run = reader_of(llama, method)
    layout = make_layout(method, N, 0, 0, TextStructure(is_continued=True))
    before = {id(thing) for thing in gc.get_objects() if isinstance(thing, Tensor)}
    session = MemorySession(run, layout, N, 7)
    with run.ready():
        for _ in session.prefill(text, N - 1):
            pass
    _ = layout.last_query
    gc.collect()
    entries = [layer.keys for layer in session.cache.layers] + [layer.values for layer in session.cache.layers]
    known = {t.untyped_storage().data_ptr() for t in (*entries, *session.state, text)}
    known |= {t.untyped_storage().data_ptr() for t in vars(layout).values() if isinstance(t, Tensor)}
    alive = [
        thing for thing in gc.get_objects()
        if isinstance(thing, Tensor) and id(thing) not in before and thing.numel()
        and thing.is_floating_point() and thing.dim() > 1
    ]
    assert all(thing.untyped_storage().data_ptr() in known for thing in alive)
    held, entry = (4 if method.is_latest else 24) + 1, 3 * 2 * 2 * 16 * 4
    state = {"rmt": 4 * 64 * 4, "autocompressors": 24 * 64 * 4, "gradual-forgetting": 95 * 4}.get(name, 0)
    assert session.bytes().logical == session.bytes().physical == 2 * (held * entry + state)
    assert session.bytes().full == 2 * N * entry
    assert sum(t.numel() * t.element_size() for t in session.tensors()) == session.bytes().logical


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_both_executions_count_the_same_bytes(llama: nn.Module, name: str) -> None:
    """Entries and the writer's state; of what is not read, no logits are given."""
    sizes, starts = [], []
    for execution in ("streamed", "onepass"):
        method = memory(name)
        run = reader_of(llama, method)
        with prepared(llama, run.adapter, N):
            text = Text(N, N, (0, 0), has_continuation=True)
            session = open_session(llama, method, text, adapter=run.adapter, execution=execution, chunk=7)
            parts = list(session.prefill(ids(), 0))
            starts.append(parts[0].start)
            list(session.extend(ids(n=3, seed=4)))
        sizes.append((session.bytes().logical, session.kept))
    assert sizes[0] == sizes[1]
    assert starts == [95, 95]


@torch.inference_mode()
def test_rows_that_were_fed_are_dropped(llama: nn.Module) -> None:
    """Also where runs of slots end within a memory; while text is written, ids that are waited for are counted."""
    method = memory("icae", n_comp="3")
    run = reader_of(llama, method)
    layout = make_layout(method, N + 20, 0, 0, TextStructure(prefix=N, is_continued=True))
    session = MemorySession(run, layout, N, 7)
    with run.ready():
        for _ in session.prefill(ids(), N - 1):
            assert session.rows.shape[1] < 3
        assert session.rows.numel() == 0
        open_ = N - sum(layout.written[: session.written])
        assert session.pending.shape == (2, open_)
        assert session.pending.untyped_storage().nbytes() == 2 * open_ * 8
        entries = session.cache.logical_bytes()
        assert session.bytes().logical == entries + 2 * open_ * 8


@pytest.mark.parametrize("name", ["rmt", "autocompressors", "icae"])
def test_what_a_writer_reads_must_have_a_place(name: str) -> None:
    """A model with a table of 256 positions: refused before anything is read, in runs and in training."""
    model = small_model("gpt2")
    many = {"segment": "120", "n_comp": "100"} if name == "rmt" else {"n_comp": "60"}
    method = make_method(name, Fraction("0" if name == "rmt" else "0.3"), many)
    assert isinstance(method, Memory)
    adapter = adapter_for(model, method)
    layouts = [METHODS[name].training_layout(256, np.random.default_rng(i), method.trained_options) for i in range(20)]
    worst = max(method.positions_read(layout.written) for layout in layouts)
    assert worst <= method.positions_trained(256)
    if name == "icae":
        assert worst <= 256
        return
    with pytest.raises(UserError, match="learned positions"):
        open_session(model, method, Text(250, 250, (0,), has_continuation=True), adapter=adapter)
    with pytest.raises(UserError, match="learned positions"):
        _check_model("gpt2", Loaded(model, None, 256, VOCABULARY), ModelFacts("gpt2", None), 256, method)


def test_rows_are_as_wide_as_what_layers_are_fed() -> None:
    """A model that multiplies its embeddings by a number where they are looked up."""
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    )
    model = GemmaForCausalLM(config).eval()
    fed = model.get_input_embeddings()(torch.arange(VOCABULARY)).std()
    for name in ("icae", "comprexit", "ic-former", "rmt"):
        adapter = fresh_adapter(small_card("writer", name, 0, **memory(name).trained_options), model)
        rows = rows_of(Reader(model, adapter), ids(), [16, 16])
        assert 0.5 < rows.std() / fed < 2, name
    constant = fresh_adapter(small_card("gated", "prompt", 64, n_comp="64"), model).rows
    assert 0.3 < constant.std() / fed < 2


@pytest.mark.parametrize("changed", [
    {"gate": "gated"}, {"options": {"n_comp": 5}}, {"rank": None}, {"options": {"n_comp": "x"}},
])
def test_a_card_that_cannot_be_is_a_sentence(llama: nn.Module, tmp_path: Path, changed: dict[str, object]) -> None:
    adapter = adapter_for(llama, memory("icae"))
    assert adapter is not None
    adapter.save(tmp_path / "adapter", "small")
    card = tmp_path / "adapter" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), **changed}))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_adapter(tmp_path / "adapter", llama)


def test_whole_numbers_of_a_writer_are_stored_as_they_are(llama: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(llama, memory("icae"))
    assert adapter is not None
    assert adapter.writer is not None
    adapter.writer.register_buffer("counts", torch.tensor([70_001]))
    adapter.save(tmp_path / "adapter", "small", dtype=torch.bfloat16)
    saved = load_file(tmp_path / "adapter" / "writer.safetensors")
    assert saved["counts"].tolist() == [70_001]
    assert saved["slots"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
@given(n=st.integers(20, 300), prefix=st.integers(0, 200), ratio=st.sampled_from(["0", "0.5", "0.7", "0.9"]))
def test_what_is_held_is_the_closed_form(name: str, n: int, prefix: int, ratio: str) -> None:
    of_ratio = "ratio" in METHODS[name].budgets
    method = make_method(name, Fraction(ratio) if of_ratio else Fraction(0), {"n_comp": "8"})
    assert isinstance(method, Memory)
    read = make_layout(method, n, 0, 0)
    chunk = method.chunk()
    whole, rest = divmod(n, chunk)
    chunks, rest = (whole + 1, 0) if rest > 8 else (whole, rest)
    held = (8 * min(chunks, 1) if method.is_latest else 8 * chunks) + rest
    assert len(read.held_after(len(read))) == held
    if not 20 <= prefix < n:
        return
    layout = make_layout(method, n, 0, 0, TextStructure(prefix=prefix, is_continued=True))
    fed = layout.tokens.raw[layout.tokens.kind == TEXT].tolist()
    assert fed == list(range(layout.unread, n)), "every token that is read is fed once"
    assert layout.unread < prefix, "what follows a prefix is predicted from its last token"
    ends = torch.cumsum(torch.tensor([0, *layout.written]), 0).tolist()
    assert prefix not in ends
    assert int((layout.tokens.kind == COMP).sum()) == 8 * len(layout.written)
    assert bool((layout.raw_slots[layout.unread :].diff() > 0).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_adapter_writes_the_same(llama: nn.Module, name: str, tmp_path: Path) -> None:
    method = memory(name)
    adapter = adapter_for(llama, method)
    assert adapter is not None
    adapter.save(tmp_path / "adapter", "small")
    torch.manual_seed(99)
    again = load_adapter(tmp_path / "adapter", llama)
    chunks = [16, 16, 9]
    assert torch.equal(rows_of(Reader(llama, adapter), ids(), chunks), rows_of(Reader(llama, again), ids(), chunks))
    (tmp_path / "adapter" / "writer.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(tmp_path / "adapter", llama)


def test_the_writer_of_another_model_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    adapter = adapter_for(llama, memory("icae"))
    assert adapter is not None
    adapter.save(tmp_path / "adapter", "small")
    wider = small_model("llama")
    config = type(llama.config)(**{**llama.config.to_dict(), "hidden_size": 32, "head_dim": 8})
    wider = type(llama)(config)
    with pytest.raises(UserError, match="does not fit this model"):
        load_adapter(tmp_path / "adapter", wider)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_writer(llama: nn.Module, name: str) -> None:
    """Every parameter of the writer has a gradient from the loss on the text behind its memory."""
    adapter = adapter_for(llama, memory(name))
    assert adapter is not None
    adapter.requires_grad_(True)
    layout = memory(name).layout_of(N, equal_chunks(64, 16, 4))
    reader = Reader(llama, adapter)
    with reader.ready():
        reader.one_pass(ids(), layout).log_softmax(-1)[..., 5].mean().backward()
    assert adapter.writer is not None
    for which, parameter in adapter.writer.named_parameters():
        assert parameter.grad is not None, which
        assert parameter.grad.abs().sum() > 0, which
    for pair in adapter.pairs.parameters():
        assert pair.grad is not None
    assert all(parameter.grad is None for parameter in llama.parameters())


# What each writer computes.


@torch.inference_mode()
def test_icae_is_the_models_own_pass_over_chunk_and_slots(model: nn.Module) -> None:
    """The last hidden states of a pass of the model under LoRA, at the learnt tokens behind the chunk."""
    reader = reader_of(model, memory("icae", raw="true"))
    assert reader.adapter is not None
    assert isinstance(reader.adapter.writer, SlotWriter)
    rows = rows_of(reader, ids(), [16, 16])
    with reader.ready(), reader.adapter.opened():
        slots = reader.adapter.writer.slots.expand(2, -1, -1)
        inputs = torch.cat([model.get_input_embeddings()(ids()[:, 16:32]), slots], 1)  # type: ignore[operator]
        out = model(inputs_embeds=inputs, output_hidden_states=True).hidden_states[-1]
    assert (rows[:, 4:] - out[:, -4:]).abs().max() < 1e-5


@torch.inference_mode()
def test_recurrent_memory_of_one_segment_is_that_of_icae(llama: nn.Module) -> None:
    reader = reader_of(llama, memory("rmt"))
    assert reader.adapter is not None
    assert isinstance(reader.adapter.writer, RecurrentWriter)
    rows = rows_of(reader, ids(), [16])
    with reader.ready(), reader.adapter.opened():
        assert torch.equal(reader.adapter.writer.slots.read(llama, ids()[:, :16]), rows)


@torch.inference_mode()
def test_the_model_is_not_called_by_ic_former(llama: nn.Module) -> None:
    reader, calls = reader_of(llama, memory("ic-former")), []
    hook = llama.model.layers[0].register_forward_hook(lambda *args: calls.append(1))  # type: ignore[union-attr,index]
    try:
        rows_of(reader, ids(), [16, 16])
        assert not calls
        rows_of(reader_of(llama, memory("ic-former", encode="true")), ids(), [16, 16])
        assert calls
    finally:
        hook.remove()


@torch.inference_mode()
def test_digests_without_layers_are_the_digests(llama: nn.Module) -> None:
    """With values and feed-forward at zero, nothing of the text arrives."""
    writer = DigestWriter(llama, 4, 2, encodes=False)
    for layer in writer.layers:
        layer.value.weight.zero_()  # type: ignore[union-attr,operator]
        layer.down.weight.zero_()  # type: ignore[union-attr,operator]
    rows = writer.read(llama, ids())
    expected = writer.scale * nn.functional.rms_norm(writer.digests, (64,))
    assert (rows - expected).abs().max() < 1e-5


def test_transport_moves_the_masses() -> None:
    generator = torch.Generator().manual_seed(0)
    cost = torch.rand(2, 24, 6, generator=generator)
    source = torch.rand(2, 24, generator=generator).softmax(1)
    target = torch.full((2, 6), 1 / 6)
    plan = transport(cost, source, target)
    assert (plan.sum(1) - target).abs().max() < 1e-5
    assert (plan.sum(2) - source).abs().max() < 1e-4
    even = transport(torch.zeros(1, 8, 2), torch.full((1, 8), 1 / 8), torch.full((1, 2), 1 / 2))
    assert (even - 1 / 16).abs().max() < 1e-6, "without costs every token goes everywhere"


@torch.inference_mode()
def test_comprexit_moves_constant_values_to_constant_slots(llama: nn.Module) -> None:
    torch.manual_seed(0)
    writer = TransportWriter(llama, 4)
    constant = torch.randn(2, 1, 64).expand(2, 24, 64)
    assert (writer.moved(constant) - constant[:, :4]).abs().max() < 1e-4
    values = torch.randn(2, 24, 64)
    plan = writer.plan(values)
    within = torch.arange(24)
    within[[0, 5]] = within[[5, 0]]  # two tokens of the first run
    assert (writer.plan(values[:, within]) - plan[:, within]).abs().max() < 1e-5
    assert plan.sum((1, 2)).allclose(torch.ones(2))


def test_the_kernel_has_mass_one_and_no_scale_of_its_own() -> None:
    age = torch.arange(1, 1537, dtype=torch.float64)
    for tau in (8.0, 64.0, 512.0):
        weights = kernel(age, torch.tensor(tau, dtype=torch.float64), 8)
        assert weights.sum() == pytest.approx(1, abs=0.01)
        assert age[weights.argmax()] == tau
        wider = kernel(3 * age, torch.tensor(3 * tau, dtype=torch.float64), 8)
        assert torch.allclose(3 * wider, weights)


@torch.inference_mode()
def test_fading_rows_are_sums_over_all_past_text(llama: nn.Module) -> None:
    """Against a loop over ages, and text of one token gives its embedding."""
    writer = FadingWriter(3, 2, 8, 4)
    table: Tensor = llama.get_input_embeddings().weight  # type: ignore[operator]
    rows, _ = writer.write_all(llama, ids(1), [16, 9], writer.begin(1))
    for number, tau in enumerate((8.0, 4.0, 2.0)):
        expected, past = torch.zeros(64), ids(1)[0, :25].tolist()
        for age, token in enumerate(reversed(past[-24:]), 1):
            expected += float(kernel(torch.tensor(float(age)), torch.tensor(tau), 4)) * table[token]
        assert (rows[0, 3 + number] - expected).abs().max() < 1e-5
    same, _ = FadingWriter(1, 8, 8, 8).write_all(llama, torch.full((1, 24), 7), [24], (torch.zeros(1, 0).int(),))
    assert (same[0, 0] - table[7]).abs().max() < 0.01 * table[7].abs().max()


@pytest.mark.parametrize("place", ["spread", "end", "own"])
def test_places_of_memory(place: str) -> None:
    layout = make_layout(memory("icae", place=place), 40, 0, 0)
    memories = layout.position[layout.tokens.kind == COMP].view(-1, 4).tolist()
    text = layout.position[layout.tokens.kind == TEXT].tolist()
    if place == "own":
        assert memories == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
        assert text == [*range(16), *range(4, 20), *range(8, 16)]
        assert layout.text_positions(40, 2).tolist() == [12, 13]
    else:
        assert text == list(range(40))
        ends = [[15] * 4, [31] * 4, [39] * 4]
        assert memories == (ends if place == "end" else [[3, 7, 11, 15], [19, 23, 27, 31], [33, 35, 37, 39]])


@pytest.mark.parametrize("place", ["spread", "end", "own"])
@pytest.mark.parametrize("prefix", [0, 40])
def test_the_control_has_the_layout_of_the_memory(place: str, prefix: int) -> None:
    """Constant rows at the same places, seen by the same tokens."""
    text = TextStructure(prefix=prefix, is_continued=bool(prefix))
    ours = make_layout(memory("icae", place=place, unread="false"), 90, 0, 0, text)
    control = make_layout(make_method("prompt", Fraction("0.75"), {"n_comp": "4", "place": place}), 90, 0, 0, text)
    assert torch.equal(ours.mask, control.mask)
    assert torch.equal(ours.position, control.position)
    assert torch.equal(ours.last_query, control.last_query)
    assert not control.written
    assert sorted(set(control.tokens.row.tolist())) == [-1, 0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("rmt", {"segment": "8"}, "compress nothing"), ("gradual-forgetting", {"nearest": "600"}, "lies before"),
        ("icae", {"n_comp": "200"}, "n_comp"), ("icae", {"place": "middle"}, "place"),
        ("ic-former", {"layers": "0"}, "layers"), ("prompt", {"budget": "160", "place": "spread"}, "streaming form"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_method(name, Fraction(0), options).check(512, in_chunks=False)


@torch.inference_mode()
def test_a_memory_needs_its_writer(llama: nn.Module) -> None:
    layout = make_layout(memory("icae"), N, 0, 0)
    with pytest.raises(UserError, match="needs an adapter"):
        Reader(llama).one_pass(ids(), layout)
    assert isinstance(open_session(llama, memory("icae"), Text(8, 8, (0,))), LayoutSession)
