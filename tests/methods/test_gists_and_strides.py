"""UniGist, Activation Beacon and strided windows against rules stated token by token, and a loop of its own."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.opening import check_method
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS, TextStructure, kept, make_layout, make_method
from kvbench.methods.layouts.layout import COMP, OPEN, SUM, TEXT, Layout
from kvbench.methods.layouts.unigist import gist_layout
from kvbench.models.facts import ModelFacts
from tests.helpers.models import VOCABULARY, small_adapter, small_model
from tests.helpers.sessions import layout_method

ratios = st.integers(1, 96).map(lambda percent: Fraction(percent, 100))


def names(layout: Layout) -> list[tuple[str, int]]:
    """Every slot as its kind and a number: of the token, of the token before, or of the learnt row."""
    kind, raw, row = (layout.tokens[i].tolist() for i in (1, 2, 4))
    called = {TEXT: "text", COMP: "gist", OPEN: "sink", SUM: "copy"}
    return [(called[k], r if k != OPEN else w) for k, r, w in zip(kind, raw, row, strict=True)]


@given(n=st.integers(1, 60), sinks=st.integers(0, 3), every=st.integers(1, 20), window=st.integers(1, 30))
def test_unigist_is_the_rule(n: int, sinks: int, every: int, window: int) -> None:
    """Sinks, all gists before, and the last ``window`` tokens of text; text is numbered as if gists did not exist."""
    layout = gist_layout(n, sinks, every, window)
    expected: list[tuple[str, int]] = [("sink", i + 1) for i in range(sinks)]
    for token in range(n):
        expected += [("text", token)] + [("gist", token)] * ((token + 1) % every == 0)
    assert names(layout) == expected
    for place, (kind, number) in enumerate(expected):
        assert int(layout.position[place]) == (number - 1 if kind == "sink" else sinks + number + (kind == "gist"))
        read = number + 1 if kind == "gist" else number  # tokens of text before it
        for other, (what, which) in enumerate(expected):
            sees = other <= place and (what != "text" or other == place or which >= read - window)
            assert bool(layout.mask[place, other]) == (sees if kind != "sink" else other <= place)
    for token in range(n):
        fed = int(layout.raw_slots[token + 1]) if token + 1 < n else len(layout)
        assert len(layout.held_after(fed)) == sinks + (token + 1) // every + min(token + 1, window)


@given(n=st.integers(64, 700), ratio=ratios)
def test_unigists_gists_are_as_close_as_its_window_allows(n: int, ratio: Fraction) -> None:
    layout = make_layout(layout_method("unigist", str(float(ratio))), n, 0, 0)
    gists = torch.nonzero(layout.tokens.kind == COMP).flatten()
    room = kept(n, ratio) - 4 - 32
    assert len(gists) <= max(0, room)
    if room > 0:
        every = n // max(1, len(gists)) if len(gists) else n + 1
        closest = next(g for g in range(1, n + 2) if n // g <= room)
        assert len(gists) == n // closest, every


def test_unigist_without_gists_is_sinks_and_a_window() -> None:
    layout = gist_layout(40, 2, 41, 10)
    for query in range(40):
        seen = layout.tokens.raw[layout.mask[2 + query]].tolist()
        assert seen == [-1, -1, *range(max(0, query - 10), query + 1)]


def test_unigist_says_what_does_not_fit() -> None:
    with pytest.raises(UserError, match="keeps 26 of 512 tokens, and needs 4 sinks and a window of 32"):
        make_method("unigist", Fraction("0.95")).check(512, in_chunks=False)
    make_method("unigist", Fraction("0.95"), {"window": "16"}).check(512, in_chunks=False)


@given(n=st.integers(1, 80), ratio=ratios, window=st.integers(8, 30), sinks=st.integers(0, 3))
def test_beacon_is_the_rule(n: int, ratio: Fraction, window: int, sinks: int) -> None:
    """Held at every window's end: kept(n, r) entries, sinks and beacons; positions are those of a cache so small."""
    method = layout_method("beacon", str(float(ratio)), window=str(window), sinks=str(sinks))
    layout = make_layout(method, n, 0, 0)
    memory: list[int] = []  # the copies' slots
    for begin in range(0, n, window):
        tokens = range(begin, min(begin + window, n))
        slots = torch.nonzero((layout.tokens.raw >= tokens[0]) & (layout.tokens.raw <= tokens[-1])).flatten().tolist()
        size = (min(sinks, begin)) + len(memory)
        own = names(layout)[slots[0] : slots[-1] + 1]
        beacons = [slot for slot, (kind, _) in zip(slots, own, strict=True) if kind == "gist"]
        copies = [slot for slot, (kind, _) in zip(slots, own, strict=True) if kind == "copy"]
        assert copies == slots[len(slots) - len(beacons) :]  # at the end, one each
        first = [int(layout.raw_slots[i]) for i in range(min(sinks, n))]
        for slot, (kind, number) in zip(slots, own, strict=True):
            seen = torch.nonzero(layout.mask[slot]).flatten().tolist()
            if kind == "copy":
                assert int(layout.position[slot]) == min(sinks, n) + len(memory) + copies.index(slot)
                continue
            assert int(layout.position[slot]) == size + number - begin + (kind == "gist")
            before = [s for s in slots if s <= slot]
            assert seen == sorted({*(s for s in first if s < slot), *memory, *before})
        memory += copies
        held = layout.held_after(slots[-1] + 1).tolist()
        assert held == sorted({*[s for s in first if s <= slots[-1]], *memory})
        assert len(held) == max(min(sinks, tokens[-1] + 1), kept(tokens[-1] + 1, ratio))


def test_a_prefix_ends_a_window_of_beacons() -> None:
    """The ratio is met at the end of the prefix; what is written after it is compressed as well."""
    layout = layout_method("beacon", "0.5", window="16").layout(60, np.random.default_rng(0), TextStructure(prefix=40))
    ends = [int(layout.raw_slots[i]) for i in (16, 32, 40, 56)]
    assert [len(layout.held_after(end)) for end in ends] == [8, 16, 20, 28]


def rotated(keys: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary embedding of ``[batch, heads, n, width]`` in halves, written out."""
    half = keys.shape[-1] // 2
    angle = positions[:, None].double() * base ** (-torch.arange(half).double() / half)
    cos, sin = torch.cos(angle).float(), torch.sin(angle).float()
    a, b = keys[..., :half], keys[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@torch.inference_mode()
def test_beacons_are_a_loop_over_windows(llama: nn.Module) -> None:
    """Transformers' own cache, window by window: beacons' keys are turned back and rotated to their place in it."""
    from transformers import DynamicCache

    n, window, sinks, ratio = 90, 20, 2, Fraction("0.7")
    ids = torch.randint(0, VOCABULARY, (2, n), generator=torch.Generator().manual_seed(3))
    adapter = small_adapter(llama, "gated", 1)
    for pair in adapter.by_path.values():
        nn.init.zeros_(pair.b)  # beacons are their embedding alone
    with torch.no_grad():
        adapter.rows.normal_()
    layout = make_layout(layout_method("beacon", "0.7", window=str(window), sinks=str(sinks)), n, 0, 0)
    reader = Reader(llama, adapter)
    with reader.ready():
        found = reader.one_pass(ids, layout)
    embed: Any = llama.get_input_embeddings()  # type: ignore[operator]
    memory: list[tuple[Tensor, Tensor]] = []
    parts, held = [], 0
    for begin in range(0, n, window):
        stop = min(begin + window, n)
        inputs, places, is_text, is_sink = [], [], [], []
        size = held
        for token in range(begin, stop):
            inputs.append(embed(ids[:, token]))
            is_sink.append(token < sinks)
            places.append(size + token - begin)
            is_text.append(True)
            marks = max(0, kept(token + 1, ratio) - sinks) > (max(0, kept(token, ratio) - sinks) if token else 0)
            if marks:
                inputs.append(adapter.rows[0].expand(2, -1))
                places.append(size + token - begin + 1)
                is_text.append(False)
                is_sink.append(False)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(memory):
            cache.update(keys, values, layer)
        at = torch.tensor(places)
        logits = llama(
            inputs_embeds=torch.stack(inputs, 1), position_ids=at[None], past_key_values=cache
        ).logits
        parts.append(logits[:, torch.tensor(is_text)])
        stays = torch.tensor([s or not t for s, t in zip(is_sink, is_text, strict=True)])
        fresh = []
        place = torch.cumsum(stays, 0)[stays] - 1 + held
        for layer in cache.layers:
            keys, values = layer.keys[:, :, held:][:, :, stays], layer.values[:, :, held:][:, :, stays]
            fresh.append((rotated(rotated(keys, -at[stays]), place), values))
        old = memory or [(keys[:, :, :0], values[:, :, :0]) for keys, values in fresh]
        memory = [
            (torch.cat([k, a], 2), torch.cat([v, b], 2)) for (k, v), (a, b) in zip(old, fresh, strict=True)
        ]
        held += int(stays.sum())
        assert held == kept(stop, ratio)
    assert float((torch.cat(parts, 1) - found).abs().max()) < 1e-4


@given(n=st.integers(1, 150), ratio=st.integers(0, 96).map(lambda p: Fraction(p, 100)), share=st.integers(0, 100))
def test_strided_is_the_rule(n: int, ratio: Fraction, share: int) -> None:
    """Token by token: what leaves is the oldest that is not one of the spaced; kept(m, r) are held after every m."""
    layout = make_layout(layout_method("strided", str(float(ratio)), share=str(share)), n, 0, 0)
    rate = (1 - ratio) * (100 - share) / 100
    held: list[int] = []
    for token in range(n):
        seen = torch.nonzero(layout.mask[token]).flatten().tolist()
        assert seen == [*held, token]
        held.append(token)
        for old in list(held):
            if len(held) <= kept(token + 1, ratio):
                break
            if int((old + 1) * rate) == int(old * rate):
                held.remove(old)
        assert len(held) == kept(token + 1, ratio)


def test_strided_is_scouts_tenth_tokens_and_local() -> None:
    """At 0.8 half of the entries are tokens 9, 19, ...; with all of them in the window it is ``local``."""
    mask = make_layout(layout_method("strided", "0.8"), 200, 0, 0).mask
    assert torch.nonzero(mask[199]).flatten().tolist() == [*range(9, 176, 10), *range(176, 200)]
    local = make_layout(layout_method("local", "0.8"), 200, 0, 0).mask
    assert torch.equal(make_layout(layout_method("strided", "0.8", share="100"), 200, 0, 0).mask, local)
    sinks = make_layout(layout_method("strided", "0.8", sinks="3"), 200, 0, 0)
    assert bool(sinks.mask[3:, :3].all())
    assert len(sinks.held_after(200)) == 40
    make_method("strided", Fraction("0.8"), {"sinks": "3"}).check_kept(20)
    with pytest.raises(UserError, match="keeps 40 of 200 entries, and --set sinks=60 keeps more"):
        make_method("strided", Fraction("0.8"), {"sinks": "60"}).check_kept(200)


@pytest.mark.parametrize("name", ["unigist", "beacon", "ccm-concat"])
@pytest.mark.parametrize("length", [40, 48, 59])
@torch.inference_mode()
def test_text_behind_a_context_is_numbered_as_if_it_were_written(llama: nn.Module, name: str, length: int) -> None:
    """The first token after a compressed context, read or written: the same logits, while nothing is due."""
    ratio = "0.8" if name == "ccm-concat" else "0.5"
    options = {"window": "16"} if name in ("unigist", "beacon") else {}
    method = layout_method(name, ratio, **options)
    ids = torch.randint(0, VOCABULARY, (2, length + 1), generator=torch.Generator().manual_seed(3))
    reader = Reader(llama, small_adapter(llama, "gated", method.n_rows))
    with reader.ready():
        alone = make_layout(method, length, 0, 0)
        run = LayoutSession(reader, alone, length)
        list(run.prefill(ids[:, :length]))
        after = next(iter(run.extend(ids[:, length:]))).logits[:, 0]
        both = make_layout(method, length + 1, 0, 0, TextStructure(prefix=length))
        written = LayoutSession(reader, both, length)
        list(written.prefill(ids[:, :length]))
        assert float((written.step(ids[:, length]) - after).abs().max()) < 1e-5


def test_beacons_are_not_counted_anew_where_positions_are_learnt() -> None:
    model, facts = small_model("gpt2"), ModelFacts("GPT2LMHeadModel")
    with pytest.raises(UserError, match="learned positions, which cannot be counted anew"):
        check_method(make_method("beacon", Fraction("0.5")), model, "gpt2", facts)
    check_method(make_method("beacon", Fraction("0.5"), {"positions": "absolute"}), model, "gpt2", facts)


@pytest.mark.parametrize("name", ["unigist", "unigist-tuned", "beacon", "strided-tuned"])
def test_training_draws_layouts_of_every_kind(name: str) -> None:
    rng = np.random.default_rng(0)
    drawn = [METHODS[name].training_layout(256, rng, {}) for _ in range(40)]
    assert len({len(layout.held_after(len(layout))) for layout in drawn}) >= 5
    assert all(layout.n_raw == 256 for layout in drawn)
