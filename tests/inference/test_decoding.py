"""The decoding loop: the same texts with entries removed and masked, alone and in a batch, as generate writes."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvbench.data.documents import Document
from kvbench.data.tasks import GenerationSpec
from kvbench.errors import UserError
from kvbench.inference import generation as decoding
from kvbench.inference import sampling
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.reader import Reader
from kvbench.inference.sampling import Sampling, choose
from kvbench.methods import Layout, TextStructure, kept, make_layout
from kvbench.protocols.base import settings_of
from kvbench.protocols.generate import Generate, cut_for_generation, uniforms
from kvbench.protocols.pieces import make_tokenizer
from tests.helpers.cases import CASES, STREAM, Case, label
from tests.helpers.models import VOCABULARY, adapter_for
from tests.helpers.sessions import layout_method, session_kind, texts

P, G = 60, 36
WRITING = [case for case in CASES if case.options.get("sampler") != "published"]


def prefix(rows: int = 2, tokens: int = P) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))


def drawn(rows: int, outputs: int = 2, tokens: int = G) -> Tensor:
    """The last output of each row is greedy."""
    found = torch.rand(rows, outputs, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found[:, -1] = torch.nan
    return found


def layout_of(case: Case, tokens: int = P, more: int = G) -> Layout:
    return make_layout(case.method, tokens + more, 0, 5, TextStructure(prefix=tokens, is_continued=True))


def session_of(reader: Reader, layout: Layout, chunk: int = 64, evicts: bool = True) -> LayoutSession:
    return session_kind(layout)(reader, layout, P, chunk, evicts)


def written(session: LayoutSession, text: Tensor, numbers: Tensor, ends: tuple[int, ...] = ()) -> Tensor:
    """int64 ``[rows, tokens]``, -1 after the end."""
    with torch.inference_mode(), session.reader.ready():
        return texts(session, text, numbers, ends)


def reader_of(model: nn.Module, case: Case) -> Reader:
    return Reader(model, adapter_for(model, case.method))


@pytest.mark.parametrize("case", WRITING, ids=label)
def test_logits_while_writing_are_those_of_one_masked_pass(
    model: nn.Module, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token is chosen from the logits that one pass over the whole text gives, with entries removed."""
    layout, reader, seen = layout_of(case), reader_of(model, case), []

    def noted(logits: Tensor, *rest: Any) -> Tensor:
        seen.append(logits)
        return choose(logits, *rest)

    monkeypatch.setattr(decoding, "choose", noted)
    session = session_of(reader, layout, chunk=7)
    ids = written(session, prefix(), drawn(2))
    rows = torch.cat([prefix().repeat_interleave(2, 0), ids], 1)
    with torch.inference_mode(), reader.ready():
        masked = reader.one_pass(rows, layout, slice(P - 1, -1))
    assert (torch.stack(seen, 1) - masked).abs().max() < 1e-5
    alive, per_entry = session.kept, session.cache.entry_bytes()
    assert alive <= session.cache.entries()
    assert session.cache.physical_bytes() <= per_entry * (alive + max(1, alive // 32))


@pytest.mark.parametrize("case", WRITING, ids=label)
def test_masked_and_removed_write_the_same(llama: nn.Module, case: Case) -> None:
    removed, masked = (
        written(session_of(reader_of(llama, case), layout_of(case), evicts=evicts), prefix(), drawn(2))
        for evicts in (True, False)
    )
    assert torch.equal(removed, masked)


@pytest.mark.parametrize("name", ["full", "adapted"])
@pytest.mark.parametrize("chunk", [1, 64])
def test_greedy_with_nothing_removed_is_what_generate_writes(model: nn.Module, name: str, chunk: int) -> None:
    case = Case(name, "0", {})
    reader = reader_of(model, case)
    ends = (int(model.config.eos_token_id),)
    ours = written(session_of(reader, layout_of(case), chunk=chunk), prefix(4), drawn(4, 1), ends)
    with torch.inference_mode(), reader.ready():
        if reader.adapter is not None:
            reader.adapter.open_gate(torch.empty(0, dtype=torch.long))
        theirs = model.generate(  # type: ignore[operator]
            prefix(4), attention_mask=torch.ones_like(prefix(4)), max_new_tokens=G, do_sample=False, pad_token_id=0,
        )[:, P:]
    for mine, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        stop = other.index(ends[0]) + 1 if ends[0] in other else len(other)
        assert [i for i in mine if i >= 0] == other[:stop]


@pytest.mark.parametrize("name", ["window", "sinks", "local", "scattered", "sentinel"])
def test_ratio_zero_writes_what_the_full_cache_does(llama: nn.Module, name: str) -> None:
    full = written(session_of(Reader(llama), layout_of(Case("full", "0", {}))), prefix(), drawn(2))
    case = Case(name, "0", {})
    assert torch.equal(written(session_of(reader_of(llama, case), layout_of(case)), prefix(), drawn(2)),
                       full)


@pytest.mark.parametrize("name", ["full", "local", "sentinel"])
def test_alone_or_in_a_batch_in_any_order(model: nn.Module, name: str) -> None:
    case = Case(name, "0.5" if name != "full" else "0", {})
    layout, text, numbers = layout_of(case), prefix(8), drawn(8)
    together = written(session_of(reader_of(model, case), layout), text, numbers).view(8, 2, -1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    shuffled = written(session_of(reader_of(model, case), layout), text[order], numbers[order])
    assert torch.equal(shuffled.view(8, 2, -1), together[order])
    for row in (0, 3, 7):
        alone = written(session_of(reader_of(model, case), layout), text[row, None], numbers[row, None])
        assert torch.equal(alone.view(1, 2, -1), together[row, None])


def test_a_row_that_has_ended_stays_ended_and_changes_no_other(llama: nn.Module) -> None:
    case = Case("full", "0", {})
    without = written(session_of(Reader(llama), layout_of(case)), prefix(4), drawn(4, 1))
    end = int(without[0, 5])
    ended = written(session_of(Reader(llama), layout_of(case)), prefix(4), drawn(4, 1), (end,))
    assert ended.shape[1] == G or bool((ended[:, -1] == end).any())
    for row, free in zip(ended.tolist(), without.tolist(), strict=True):
        stop = free.index(end) + 1 if end in free else len(free)
        assert row[:stop] == free[: len(row)][:stop]
        assert set(row[stop:]) <= {-1}


@given(
    st.sampled_from(["window", "local", "scattered", "sentinel", "sinks"]), st.integers(32, 300), st.integers(1, 90),
    st.integers(0, 92), st.integers(0, 15),
)
def test_the_ratio_is_met_exactly_at_the_end_of_the_prefix(
    name: str, tokens: int, more: int, percent: int, which: int
) -> None:
    ratio = Fraction(percent, 100)
    layout = make_layout(layout_method(name, str(ratio)), tokens + more, 0, which, TextStructure(prefix=tokens))
    held = len(layout.held_after(LayoutSession(Reader(nn.Identity()), layout, tokens)._stop(tokens - 1)))
    assert held == (max(min(5, tokens), kept(tokens, ratio)) if name == "sinks" else kept(tokens, ratio))
    whole = len(layout.held_after(len(layout)))
    if name in ("window", "sinks") and percent:
        assert whole == max(min(5, tokens + more), held) if name == "sinks" else whole == held
    elif name != "sentinel":
        assert whole == kept(tokens + more, ratio)
    else:  # a short text cannot always close as many spans as the ratio asks for
        assert whole >= kept(tokens + more, ratio)


@pytest.mark.parametrize("case", [
    Case("ccm-concat", "0.8", {}), Case("meanpool", "0.8", {}), Case("pic", "0.8", {}),
    Case("ccm-merge", "0", {"segment": "16"}), Case("ccm-concat", "0", STREAM),
], ids=label)
def test_memory_goes_on_growing_by_the_same_rule(case: Case) -> None:
    before = make_layout(case.method, P, 0, 0)
    after = layout_of(case)
    read = LayoutSession(Reader(nn.Identity()), after, P)._stop(P - 1)
    assert len(after.held_after(read)) == len(before.held_after(len(before)))
    if case.name == "ccm-merge":
        assert len(after.held_after(len(after))) <= 2 + 16
    else:
        assert len(after.held_after(len(after))) < P + G - (P - len(before.held_after(len(before))))


# --- choosing ----------------------------------------------------------------------------------------------------

def reference_nucleus(p: np.ndarray[Any, Any], top_p: float) -> np.ndarray[Any, Any]:
    """By hand: tokens in falling order until they have top_p of the probability, renormalised."""
    inside, total = np.zeros(len(p), dtype=bool), 0.0
    for token in sorted(range(len(p)), key=lambda i: (-p[i], i)):
        inside[token] = True
        total += p[token]
        if total >= top_p:
            break
    return np.where(inside, p, 0) / p[inside].sum()


@given(st.integers(0, 10_000), st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.7, 1.0]))
def test_tokens_are_drawn_from_the_nucleus_by_inverting_its_distribution(seed: int, p: float, t: float) -> None:
    logits = torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) * 2
    wanted = reference_nucleus((logits[0].double() / t).softmax(-1).numpy(), p)
    grid = (np.arange(400) + 0.5) / 400
    tokens = choose(logits.expand(400, -1), torch.from_numpy(grid), Sampling(p, t)).numpy()
    edges = np.cumsum(wanted)
    assert all(edges[i] >= u - 1e-9 and edges[i] - wanted[i] <= u + 1e-9 for i, u in zip(tokens, grid, strict=True))
    assert set(tokens) <= set(np.flatnonzero(wanted))


def test_the_nucleus_is_that_of_transformers() -> None:
    from transformers import TopPLogitsWarper

    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0)) * 3
    kept_there = TopPLogitsWarper(0.9)(None, logits).isfinite()  # type: ignore[arg-type]
    ours = sampling._nucleus(logits.double().softmax(-1), 0.9) > 0
    assert torch.equal(ours, kept_there)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_are_tokens_of_the_nucleus(uniform: float) -> None:
    logits = torch.randn(8, 97, generator=torch.Generator().manual_seed(1)) * 5
    tokens = choose(logits, torch.full((8,), uniform, dtype=torch.float64), Sampling(0.5))
    p = sampling._nucleus(logits.double().softmax(-1), 0.5)
    assert bool((p.gather(1, tokens[:, None]) > 0).all())


def test_greedy_is_the_most_probable_token() -> None:
    logits = torch.randn(8, 97, generator=torch.Generator().manual_seed(1))
    nothing = torch.full((8,), torch.nan, dtype=torch.float64)
    assert torch.equal(choose(logits, nothing, Sampling()), logits.argmax(-1))


# --- cutting -----------------------------------------------------------------------------------------------------

def writing(context: int = 1024, **given: str) -> Any:
    spec = GenerationSpec(prefix=64, new_tokens=16)
    return Generate.of(spec, settings_of(Generate, given), context, "model")


TEXT = " ".join(f"word{i} and then," for i in range(300))


def test_a_document_is_cut_into_prefix_reference_and_what_follows(tiny_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(tiny_tokenizer, "auto")
    piece, = cut_for_generation(Document("d", "g", TEXT), tokenizer, writing()).pieces
    assert (piece.context, len(piece.ids), len(piece.after)) == (64, 80, 16)
    assert tiny_tokenizer.decode([*piece.ids, *piece.after]) == TEXT[: len(tiny_tokenizer.decode(
        [*piece.ids, *piece.after]))]
    assert cut_for_generation(Document("d", "g", "short"), tokenizer, writing()).pieces == ()


def test_the_paper_preset_cuts_at_words(tiny_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(tiny_tokenizer, "auto")
    piece, = cut_for_generation(Document("d", "g", TEXT), tokenizer, writing(preset="paper")).pieces
    assert tiny_tokenizer.decode(piece.ids[: piece.context]).split() == TEXT.split()[:128]
    assert tiny_tokenizer.decode(piece.ids[piece.context :]).split() == TEXT.split()[128:192]
    assert tiny_tokenizer.decode(piece.after).split() == TEXT.split()[192:256]
    signature = writing(preset="paper").signature("streamed", False, "t")
    assert "64 words" in signature
    assert "recalled, not verified" in signature


@pytest.mark.parametrize(("given", "lengths"), [
    ({}, (64, 16)), ({"context": "64"}, (48, 16)), ({"context": "48"}, (36, 12)),
    ({"preset": "standard"}, (512, 128)), ({"preset": "standard", "new_tokens": "8"}, (512, 8)),
])
def test_presets_and_lengths(given: dict[str, str], lengths: tuple[int, int]) -> None:
    found = writing(int(given.pop("context", "1024")), **given)
    assert (found.prefix, found.new_tokens) == lengths


def test_what_does_not_fit_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="1024 tokens and 256 to write do not fit") as error:
        writing(preset="long")
    assert "--set prefix=768" in error.value.hint


def test_luck_belongs_to_the_prefix_not_to_its_name_or_place(tiny_tokenizer: Any) -> None:
    tokenizer, plan = make_tokenizer(tiny_tokenizer, "auto"), writing(draws="2")
    one, = cut_for_generation(Document("a", "g", TEXT), tokenizer, plan).pieces
    same, = cut_for_generation(Document("b", "h", TEXT), tokenizer, plan).pieces
    other, = cut_for_generation(Document("c", "h", TEXT[7:]), tokenizer, plan).pieces
    assert one.layout == same.layout
    np.testing.assert_array_equal(uniforms(one, plan, 0), uniforms(same, plan, 0))
    assert not np.array_equal(uniforms(one, plan, 0)[0], uniforms(other, plan, 0)[0])
    assert not np.array_equal(uniforms(one, plan, 0)[0], uniforms(one, plan, 1)[0])
    draws = uniforms(one, plan, 0)
    assert draws.shape == (3, 16)
    assert not np.array_equal(draws[0], draws[1])
    assert np.isnan(draws[2]).all()


def test_a_generation_config_that_a_model_ships_is_not_used(tmp_path: Path, llama: nn.Module) -> None:
    """Sampling and penalties of a checkpoint must not leak in: the loop never reads them."""
    case = Case("full", "0", {})
    before = written(session_of(Reader(llama), layout_of(case)), prefix(), drawn(2))
    kept_config = llama.generation_config
    try:
        llama.generation_config = type(kept_config)(do_sample=True, temperature=9.0, repetition_penalty=3.0, top_k=1)
        after = written(session_of(Reader(llama), layout_of(case)), prefix(), drawn(2))
    finally:
        llama.generation_config = kept_config
    assert torch.equal(before, after)
