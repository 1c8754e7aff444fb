"""Memory made chunk by chunk, against entry-by-entry statements of who sees whom."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvbench.cache.evicting import EvictingCache
from kvbench.errors import UserError
from kvbench.inference.reader import Reader
from kvbench.methods import Layout, TextStructure, make_layout, make_method
from kvbench.methods.layouts.chunks import chunk_length
from kvbench.methods.layouts.layout import COMP, SUM, TEXT
from kvbench.models.attention import register
from kvbench.models.rope import inv_freq_by_layer, rotated
from tests.helpers.models import VOCABULARY, adapter_for, small_model
from tests.helpers.sessions import read_all
from tests.helpers.zoo import zoo_model

CHUNKED = ("ccm-concat", "ccm-merge", "gist", "meanpool", "pic", "prompt")
chunk_lists = st.lists(st.integers(1, 12), min_size=1, max_size=6)


def slow_mask(layout: Layout, name: str, recurrent: bool, memory_sees: bool) -> list[list[bool]]:
    """Section by section of the paper: own chunk, memory of earlier chunks, nothing else."""
    kind, segment = layout.tokens.kind.tolist(), layout.tokens.segment.tolist()
    after, memory_kind = layout.next_segment, SUM if name in ("ccm-merge", "meanpool") else COMP
    size = len(kind)
    mask = [[False] * size for _ in range(size)]
    for q in range(size):
        for k in range(q + 1):
            own = segment[k] == segment[q]
            latest = name != "ccm-merge" or segment[k] == segment[q] - 1
            memory = kind[k] == memory_kind and segment[k] < segment[q] and latest
            if q == k:
                seen = True
            elif kind[q] == TEXT:
                seen = (own and kind[k] == TEXT) or (memory and (recurrent or segment[q] == after))
            elif kind[q] == COMP:
                reads = kind[k] == COMP or (kind[k] == TEXT and name != "prompt")
                seen = (own and reads) or (memory and memory_sees)
            else:  # an address: sees what it is made of
                seen = (own and kind[k] in (TEXT, COMP)) or (memory and segment[k] == segment[q] - 1)
            mask[q][k] = seen
    return mask


@pytest.mark.parametrize(("name", "options", "recurrent", "memory_sees"), [
    ("ccm-concat", {}, True, True), ("ccm-concat", {"recurrent": "false"}, False, False),
    ("ccm-merge", {}, True, True), ("ccm-merge", {"recurrent": "false"}, False, False),
    ("gist", {}, True, False), ("pic", {}, True, False), ("pic", {"sees": "memory"}, True, True),
    ("meanpool", {}, True, False), ("prompt", {}, True, True),
])
@given(chunks=chunk_lists, n_comp=st.sampled_from([1, 2, 4, 8]))
def test_masks_equal_the_pairwise_rule(
    name: str, options: dict[str, str], recurrent: bool, memory_sees: bool, chunks: list[int], n_comp: int
) -> None:
    method = make_method(name, Fraction(0), {**options, "n_comp": str(n_comp)})
    layout = make_layout(method, sum(chunks), 0, 0, TextStructure(tuple(chunks)))
    assert layout.mask.tolist() == slow_mask(layout, name, recurrent, memory_sees)
    held = n_comp * (1 if name == "ccm-merge" else len(chunks))
    assert len(layout.held_after(len(layout))) == held


@given(n=st.integers(32, 600), n_comp=st.sampled_from([1, 2, 4, 8]), percent=st.integers(0, 99))
def test_ratio_sets_the_chunk(n: int, n_comp: int, percent: int) -> None:
    """round(n_comp / (1 - r)), 8 to 128, or a sentence."""
    method = make_method("ccm-concat", Fraction(percent, 100), {"n_comp": str(n_comp)})
    wanted = math.floor(100 * n_comp / (100 - percent) + 0.5)
    if not 8 <= wanted <= 128:
        with pytest.raises(UserError, match="needs chunks of"):
            chunk_length(method, n_comp)
        return
    assert chunk_length(method, n_comp) == wanted
    layout = make_layout(method, n, 0, 0)
    assert len(layout.held_after(len(layout))) == n_comp * (n // wanted) + min(n % wanted, n_comp)


def test_pooled_entries_take_the_place_of_the_last_token() -> None:
    layout = make_layout(make_method("meanpool", Fraction(0)), 5, 0, 0, TextStructure((3, 2)))
    assert layout.position.tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 4]


def test_positions_skip_the_memory_tokens() -> None:
    """Text is numbered as if they did not exist; they go on from their chunk's last token."""
    method = make_method("ccm-merge", Fraction(0), {"n_comp": "2"})
    layout = make_layout(method, 5, 0, 0, TextStructure((3, 2)))
    assert layout.tokens.kind.tolist() == [TEXT] * 3 + [COMP] * 2 + [SUM] * 2 + [TEXT] * 2 + [COMP] * 2 + [SUM] * 2
    assert layout.position.tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4, 5, 6, 5, 6]
    assert layout.tokens.row.tolist() == [-1, -1, -1, 0, 1, 0, 1, -1, -1, 0, 1, 0, 1]


@pytest.mark.parametrize(("ema", "shares"), [("mean", (1 / 3, 1 / 3, 1 / 3)), ("ema", (1 / 4, 1 / 4, 1 / 2))])
@torch.inference_mode()
def test_merged_entries_are_means_of_keys_and_of_values(
    llama: nn.Module, ema: str, shares: tuple[float, ...]
) -> None:
    """Values come from values: the streamed memory after three chunks equals the mean of what
    side-by-side memory would hold, where nothing reads the memory in between."""
    ids = torch.randint(0, VOCABULARY, (1, 30), generator=torch.Generator().manual_seed(0))
    held = {}
    for name in ("ccm-concat", "ccm-merge"):
        options = {"recurrent": "false", "n_comp": "2", "merge": ema}
        method = make_method(name, Fraction(0), options)
        layout = make_layout(method, 30, 0, 0, TextStructure((10, 10, 10)))
        run = Reader(llama, adapter_for(llama, method))
        with run.ready():
            session, _ = read_all(run, ids, layout, 4)
        held[name] = [(layer.keys, layer.values) for layer in session.cache.layers]
    for side_by_side, merged in zip(held["ccm-concat"], held["ccm-merge"], strict=True):
        for many, one in zip(side_by_side, merged, strict=True):
            expected = sum(share * many[..., 2 * i : 2 * i + 2, :] for i, share in enumerate(shares))
            assert (one - expected).abs().max() < 1e-5


@torch.inference_mode()
def test_mean_pool_is_the_mean_of_each_half(llama: nn.Module) -> None:
    ids = torch.randint(0, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(0))
    whole = EvictingCache()
    full = make_layout(make_method("full", Fraction(0)), 16, 0, 0)
    layout = make_layout(make_method("meanpool", Fraction(0)), 16, 0, 0, TextStructure((16,)))
    reader = Reader(llama)
    reader.one_pass(ids, full, cache=whole)
    pooled = read_all(reader, ids, layout, 5).session.cache
    for many, few in zip(whole.layers, pooled.layers, strict=True):
        assert (few.values[:, :, 0] - many.values[:, :, :8].mean(2)).abs().max() < 1e-5
        assert (few.keys[:, :, 1] - many.keys[:, :, 8:].mean(2)).abs().max() < 1e-5


@pytest.mark.parametrize("family_name", ["llama", "qwen3", "mistral", "neox"])
def test_turning_keys_is_what_the_model_does(family_name: str) -> None:
    """Our rotation by position differences equals the model's own rotary embedding."""
    import sys

    model = small_model(family_name)
    (speeds, *others) = inv_freq_by_layer(model) or ()
    assert speeds is not None
    assert all(other is not None and torch.equal(other, speeds) for other in others)
    rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
    apply = sys.modules[type(model).__module__].apply_rotary_pos_emb
    keys = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([3, 7, 0, 50, 12, 4, 4, 90, 1])
    cosine, sine = rotary(keys, place[None])
    theirs = apply(keys, keys, cosine, sine)[1]
    angles = place[:, None] * speeds
    assert (rotated(keys, angles.cos(), angles.sin()) - theirs).abs().max() < 1e-5
    assert (rotated(theirs, angles.cos(), -angles.sin()) - keys).abs().max() < 1e-5


def slow_stream(n: int, budget: int, memory: int, compress: int, sink: int, n_comp: int) -> list[int]:
    """Entries held after each token, counted one by one."""
    raw, kept, held = 0, 0, []
    for i in range(n):
        if i >= sink:
            raw += 1
        if min(i + 1, sink) + kept + raw >= budget:
            raw -= compress
            kept = min(memory, kept + n_comp)
        held.append(min(i + 1, sink) + kept + raw)
    return held


@given(
    n=st.integers(20, 300), steps=st.integers(1, 4), n_comp=st.sampled_from([1, 2]), compress=st.integers(4, 30),
    sink=st.integers(0, 4), slack=st.integers(0, 20),
)
def test_a_budget_is_never_passed_and_rivals_hold_as_much(
    n: int, steps: int, n_comp: int, compress: int, sink: int, slack: int
) -> None:
    memory = steps * n_comp
    budget = sink + memory + compress + slack
    options = {
        "budget": str(budget), "memory": str(memory), "compress": str(compress), "sink": str(sink),
        "n_comp": str(n_comp),
    }
    ours, rival = (
        make_layout(make_method(name, Fraction(0), options), n, 0, 0) for name in ("ccm-concat", "sinks")
    )
    expected = slow_stream(n, budget, memory, compress, sink, n_comp)
    for i in range(n):
        last = ours.raw_slots[i + 1] if i + 1 < n else len(ours)
        assert len(ours.held_after(int(last))) == expected[i]
        assert len(rival.held_after(i + 1)) == expected[i]
    # What is compressed was read before, and only once.
    made = ours.tokens.kind == COMP
    for slot in ours.tokens.slot[made].tolist():
        seen = ours.visible(torch.tensor([slot]), torch.arange(slot))[0]
        raws = ours.tokens.raw[:slot][seen & (ours.tokens.kind[:slot] == TEXT)]
        assert int((raws >= sink).sum()) == compress


def test_memory_tokens_of_a_stream_read_sinks_memory_and_the_oldest_tokens() -> None:
    options = {"budget": "12", "memory": "2", "compress": "6", "sink": "1", "n_comp": "1"}
    layout = make_layout(make_method("ccm-concat", Fraction(0), options), 30, 0, 0)
    second = layout.tokens.slot[layout.tokens.kind == COMP][1]
    seen = layout.visible(second[None], torch.arange(int(second)))[0]
    raws = layout.tokens.raw[: int(second)][seen & (layout.tokens.kind[: int(second)] == TEXT)]
    assert raws.tolist() == [0, 7, 8, 9, 10, 11, 12]
    assert int((seen & (layout.tokens.kind[: int(second)] == COMP)).sum()) == 1


@pytest.mark.parametrize(("options", "words"), [
    ({"budget": "40"}, "less than sinks, memory and tokens to compress"),
    ({"budget": "160", "memory": "3"}, "no multiple"),
    ({"budget": "160", "compress": "2"}, "save nothing"),
])
def test_budgets_without_room_are_refused(options: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_method("ccm-concat", Fraction(0), options).check(512, in_chunks=False)


@pytest.mark.parametrize("name", ["ccm-concat", "ccm-merge", "sinks"])
def test_a_budget_is_for_running_text(name: str) -> None:
    with pytest.raises(UserError, match="for running text"):
        make_method(name, Fraction(0), {"budget": "160"}).check(512, in_chunks=True)


def test_keys_that_cannot_be_turned_are_refused() -> None:
    with pytest.raises(UserError, match="cannot be undone"):
        inv_freq_by_layer(zoo_model("cohere", register()))
    assert inv_freq_by_layer(small_model("gpt2")) is None


def test_chunks_longer_than_the_text_are_refused() -> None:
    with pytest.raises(UserError, match="does not fit"):
        make_method("ccm-merge", Fraction(0), {"segment": "64"}).check(40, in_chunks=False)
    make_method("ccm-merge", Fraction(0), {"segment": "64"}).check(40, in_chunks=True)


def test_chunked_methods_are_all_tried_here() -> None:
    from kvbench.methods import METHODS
    from kvbench.methods.layouts.chunks import Chunked

    assert {name for name, kind in METHODS.items() if issubclass(kind, Chunked)} == set(CHUNKED)
