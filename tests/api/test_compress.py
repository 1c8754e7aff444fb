"""``compress``: a method around a model's own ``generate`` gives what kvbench's own loop gives, row by row."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StoppingCriteriaList

from kvbench.api.compress import compress
from kvbench.errors import UserError
from kvbench.inference.compressed_cache import seed_of
from kvbench.inference.generation import generate, greedy, read_prompt
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.sampling import Sampling
from kvbench.methods import METHODS, CachePolicy, Method, make_method
from kvbench.models.adapter import Adapter
from kvbench.models.attention import register
from tests.helpers.dense import dense_logits
from tests.helpers.models import FAMILIES, VOCABULARY, adapter_for, small_model

N, NEW = 60, 12
OPTIONS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 4}, "pyramidkv": {"window": 4}, "adakv": {"window": 4}, "chunkkv": {"window": 4},
    "expected-attention": {"future": 16}, "kivi": {"group": 8, "recent": 8}, "think": {"recent": 8, "window": 4},
    "h2o": {}, "refreshkv": {"window": 4},
}
POLICIES = [name for name, kind in METHODS.items() if issubclass(kind, CachePolicy) and not kind.adapter_kinds]
LAYOUTS = ["full", "none", "window", "sinks", "local", "scattered"]
GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": 10_000, "pad_token_id": 0}


def ids_of(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random rows, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in lengths]
    width = max(lengths)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
    return ids, mask


def given_to(name: str) -> dict[str, Any]:
    known = METHODS[name].options()
    return {key: value for key, value in OPTIONS.get(name, {}).items() if key in known}


def ratio_of(name: str) -> str:
    return "0" if not make_method(name, Fraction(0), {}).uses_ratio(False) else "0.3" if name == "think" else "0.5"


def ours(model: nn.Module, name: str, ids: Tensor, during: str) -> Tensor:
    """What the loop of kvbench writes after a row, ``[1, NEW]``."""
    options = {key: str(value) for key, value in given_to(name).items()}
    return written(model, make_method(name, Fraction(ratio_of(name)), options), None, ids, during)


def written(model: nn.Module, method: Method, adapter: Adapter | None, ids: Tensor, during: str) -> Tensor:
    planned = ids.shape[1] + (NEW if during == "both" else 0)
    with torch.no_grad(), prepared(model, adapter, ids.shape[1] + NEW):
        text = Text(ids.shape[1], planned, (seed_of(ids[0]),), has_continuation=True)
        session = open_session(model, method, text, adapter=adapter, chunk=ids.shape[1], at_once=True)
        logits = read_prompt(session, ids)
        if during == "both":
            return torch.stack(list(generate(session, logits, greedy(1, NEW), Sampling())), 1)
        found = [logits.argmax(-1)]
        while len(found) < NEW:
            *_, part = session.extend(found[-1][:, None])
            found.append(part.logits[:, -1].argmax(-1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("during", ["prefill", "both"])
@pytest.mark.parametrize("name", [*LAYOUTS, *POLICIES])
def test_generate_equals_our_loop_row_by_row(llama: nn.Module, name: str, during: str) -> None:
    ids, mask = ids_of(N, 41, N, 33)
    asked = None if ratio_of(name) == "0" else ratio_of(name)
    with compress(llama, name, asked, during=during, **given_to(name)) as run:
        out: Tensor = llama.generate(ids, attention_mask=mask, **GENERATE)  # type: ignore[operator]
    for row in range(len(ids)):
        alone = ids[row, mask[row].bool()][None]
        assert torch.equal(out[row, N:], ours(llama, name, alone, during)[0]), (name, row)
    assert run.report.tokens == int(mask.sum()) + len(ids) * (NEW - 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_removed_is_the_models_own_generate(kind: str, attention: str) -> None:
    """Token by token, with and without padding; afterwards the model is as it was."""
    model: Any = small_model(kind)
    model.set_attn_implementation(attention)
    for lengths in ((N, N), (N, 33, 47)):
        ids, mask = ids_of(*lengths)
        stock = model.generate(ids, attention_mask=mask, **GENERATE)
        for name in ("full", "knorm"):
            with compress(model, name, None if name == "full" else 0):
                assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATE), stock)
        assert model.config._attn_implementation == attention
        assert not {"generate", "forward"} & set(vars(model))
        assert torch.equal(model.generate(ids, attention_mask=mask, **GENERATE), stock)


def test_it_is_the_loop_of_transformers(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = type(llama)._sample
    monkeypatch.setattr(type(llama), "_sample", lambda *args, **more: calls.append(1) or own(*args, **more))
    with compress(llama, "knorm", 0.5):
        llama.generate(ids_of(N)[0], **GENERATE)
    assert calls == [1]


def block(model: Any, name: str = "knorm", **more: Any) -> Any:
    return compress(model, name, None if ratio_of(name) == "0" else ratio_of(name), **given_to(name), **more)


def test_going_on_with_a_returned_cache_is_one_long_reading(llama: Any) -> None:
    """Full ids are given again, and only what is new is read, from behind the whole text."""
    ids, mask = ids_of(N, 41)
    more = ids_of(7, 7)[0]
    for during in ("prefill", "both"):
        with block(llama, "snapkv", during=during):
            first = llama.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GENERATE)
            whole = torch.cat([first.sequences, more], 1)
            both = torch.cat([mask, torch.ones(2, NEW + 7, dtype=torch.long)], 1)
            second = llama.generate(whole, attention_mask=both, past_key_values=first.past_key_values, **GENERATE)
            alone = []
            for row in range(2):
                one = ids[row, mask[row].bool()][None]
                found = llama.generate(one, return_dict_in_generate=True, **GENERATE)
                text = torch.cat([found.sequences, more[row][None]], 1)
                again = {"attention_mask": torch.ones_like(text), "past_key_values": found.past_key_values}
                alone.append(llama.generate(text, **again, **GENERATE)[0, -NEW:])
        assert torch.equal(second[:, -NEW:], torch.stack(alone))


@pytest.mark.parametrize(
    "name", ["snapkv", "adakv", "kivi", "think", "refreshkv", "expected-attention", "sinks", "d2o", "subgen", "lorc"]
)
def test_a_context_is_compressed_once_and_asked_often(llama: Any, tmp_path: Path, name: str) -> None:
    """Answers do not depend on what was asked before, nor on whether the snapshot was stored."""
    ids, mask = ids_of(N, 41)
    questions = [ids_of(length)[0] for length in (5, 9, 1)]
    asked = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": 10_000, "pad_token_id": 0}
    with block(llama, name) as run:
        snapshot = run.prefill(ids, mask)
        held = snapshot.cache.usage()
        answers = [run.ask(snapshot, question, **asked) for question in questions]
        assert snapshot.cache.usage() == held
        for question, answer in zip(reversed(questions), reversed(answers), strict=True):
            assert torch.equal(run.ask(snapshot, question, **asked), answer)
        snapshot.save(tmp_path / "context.safetensors")
        apart = run.load(tmp_path / "context.safetensors")
        assert replace(apart.cache.usage(), physical=held.physical) == held  # spare room is not stored
        assert torch.equal(run.ask(apart, questions[1], **asked), answers[1])
        alone = run.ask(run.prefill(ids[1:, N - 41 :]), questions[0], **asked)
        assert torch.equal(alone[0], answers[0][1])
    with block(llama, "tova") as other, pytest.raises(UserError, match="was made with method"):
        other.load(tmp_path / "context.safetensors")


def test_chunked_prefill_and_samples_are_those_of_the_rows(llama: Any) -> None:
    ids, mask = ids_of(N, 41)
    with block(llama, "snapkv") as run:
        whole = llama.generate(ids, attention_mask=mask, **GENERATE)
        chunked = llama.generate(ids, attention_mask=mask, prefill_chunk_size=16, **GENERATE)
        assert torch.equal(chunked, whole)
        several = llama.generate(
            ids, attention_mask=mask, num_return_sequences=3, **{**GENERATE, "do_sample": True, "top_k": 1}
        )
        assert torch.equal(several, whole.repeat_interleave(3, 0))
        assert run.report.entries == pytest.approx(run.reports[0].entries)


def test_stock_samples_under_one_seed(llama: Any) -> None:
    """Sampling, streamers and stopping criteria are transformers' own."""
    ids, mask = ids_of(N, 41)
    seen: list[Any] = []
    streamer = type("S", (), {"put": lambda _, ids: seen.append(ids), "end": lambda _: seen.append("end")})()
    settings = {**GENERATE, "do_sample": True}
    torch.manual_seed(3)
    stock = llama.generate(ids, attention_mask=mask, **settings)
    with compress(llama, "full"):
        torch.manual_seed(3)
        assert torch.equal(llama.generate(ids, attention_mask=mask, **settings), stock)
        stop = StoppingCriteriaList([lambda ids, _, **more: torch.full((len(ids),), ids.shape[1] > N + 3)])
        short = llama.generate(ids[:1], streamer=streamer, stopping_criteria=stop, **GENERATE)
    assert short.shape[1] == N + 4
    assert len(seen) == 6
    assert seen[-1] == "end"


@pytest.mark.parametrize(("settings", "words"), [
    ({"num_beams": 2}, "beams"), ({"prompt_lookup_num_tokens": 2}, "prompt lookup"),
    ({"cache_implementation": "static"}, "cache implementation"), ({"use_cache": False}, "not to use a cache"),
    ({"past_key_values": DynamicCache()}, "not made inside this block"),
    ({"output_attentions": True}, "attention weights"),
    ({"guidance_scale": 1.5}, "guidance"), ({"assistant_model": nn.Linear(1, 1)}, "assisted decoding"),
])
def test_what_cannot_be_right_is_refused(llama: Any, settings: dict[str, Any], words: str) -> None:
    ids = ids_of(N)[0]
    stock = llama.generate(ids, **GENERATE)
    with block(llama), pytest.raises(UserError, match=words):
        llama.generate(ids, **{**GENERATE, **settings})
    assert torch.equal(llama.generate(ids, **GENERATE), stock)


def test_what_is_not_generate_is_refused(llama: Any) -> None:
    ids, mask = ids_of(N, 41)
    with block(llama) as run:
        with pytest.raises(UserError, match="without its cache"):
            llama(ids)
        with pytest.raises(UserError, match="padded on the right"):
            llama.generate(ids.flip(1), attention_mask=mask.flip(1), **GENERATE)
        with pytest.raises(UserError, match="Nothing has been generated"):
            _ = run.report
        with pytest.raises(UserError, match="replaced already"), block(llama):
            pass
        kept = llama.generate(ids[:1], return_dict_in_generate=True, **GENERATE)
    with block(llama), pytest.raises(UserError, match="not made inside this block"):
        llama.generate(kept.sequences, past_key_values=kept.past_key_values, **GENERATE)
    assert not {"generate", "forward"} & set(vars(llama))


@pytest.mark.parametrize(("name", "more", "words"), [
    ("snapvk", {"ratio": 0.5}, "snapkv"), ("snapkv", {}, "without a ratio"), ("snapkv", {"ratio": 1.5}, "outside"),
    ("snapkv", {"ratio": 0.5, "widow": 3}, "widow"), ("snapkv", {"ratio": 0.5, "window": 0}, "window=0"),
    ("snapkv", {"ratio": 0.5, "budget_tokens": 9}, "both say"), ("sentinel", {"ratio": 0.5}, "needs an adapter"),
    ("knorm", {"ratio": 0.5, "during": "later"}, "later"), ("sinks", {"ratio": 0.5, "interval": 4}, "step"),
])
def test_bad_requests_are_sentences(llama: Any, name: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as found, compress(llama, name, **more):
        pass
    assert "--" not in str(found.value)
    assert not {"generate", "forward"} & set(vars(llama))


def test_models_that_cannot_be_followed_are_refused() -> None:
    model: Any = small_model("llama")
    with pytest.raises(UserError, match=r"model.eval\(\)"), block(model.train()):
        pass
    with pytest.raises(UserError, match="no language model"), block(nn.Linear(2, 2)):
        pass
    model.eval()
    model.model.layers[0].to("meta")
    with pytest.raises(UserError, match="several devices"), block(model):
        pass
    assert model.config._attn_implementation == register()


def test_a_fault_inside_leaves_the_model_as_it_was() -> None:
    model: Any = small_model("llama")
    model.set_attn_implementation("sdpa")
    ids = ids_of(N)[0]
    stock = model.generate(ids, **GENERATE)
    with pytest.raises(IndexError), block(model, "snapkv"):
        model.generate(ids + VOCABULARY, **GENERATE)
    with block(model, "snapkv") as run:
        first = model.generate(ids, **GENERATE)
    with block(model, "snapkv"):
        assert torch.equal(model.generate(ids, **GENERATE), first)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(ids, **GENERATE), stock)
    assert run.report.evictions == 1


@pytest.mark.parametrize("name", ["sentinel", "ccm-concat", "gist", "beacon"])
def test_trained_methods_go_with_their_adapter(llama: Any, tmp_path: Path, name: str) -> None:
    ratio = "0.5" if name == "sentinel" else "0.9"
    method = make_method(name, Fraction(ratio), {})
    adapter = adapter_for(llama, method)
    assert adapter is not None
    adapter.card = replace(adapter.card, method=name)
    adapter.save(tmp_path / "adapter", "small")
    ids, mask = ids_of(N, 41)
    for during in ("prefill", "both"):
        with compress(llama, name, ratio, adapter=tmp_path / "adapter", during=during):
            out = llama.generate(ids, attention_mask=mask, **GENERATE)
        for row in range(2):
            alone = ids[row, mask[row].bool()][None]
            assert torch.equal(out[row, N:], written(llama, method, adapter, alone, during)[0])


ONLY_REMOVE = [
    name for name in POLICIES
    if name not in ("cam", "d2o", "kivi", "fp8", "think", "lorc", "refreshkv", "streaming-llm", "cascading", "subgen")
]
"""Those that neither merge, store in another form, attend less, nor rotate again."""


@pytest.mark.parametrize("name", ONLY_REMOVE)
def test_logits_are_those_of_a_dense_pass_under_a_mask_of_what_was_kept(llama: Any, name: str) -> None:
    """From the positions that each layer and head holds at the end, in rows of unequal length."""
    ids, mask = ids_of(N, 41)
    with block(llama, name):
        out = llama.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GENERATE
        )
    logits = torch.stack(out.logits, 1)
    for group in out.past_key_values.groups:
        for place, row in enumerate(group.rows.tolist()):
            n = int(mask[row].sum())
            text = torch.cat([ids[row, mask[row].bool()], out.sequences[row, N:-1]])[None]
            held = [layer.positions[place] for layer in group.session.cache.layers]
            assert max(int((positions >= 0).sum(-1).min()) for positions in held) < text.shape[1]
            dense = dense_logits(llama, text, held, n)
            assert float((dense[n - 1 :] - logits[row]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["knorm", "adakv", "refreshkv", "streaming-llm", "kivi", "sinks"])
def test_scores_behind_a_context_are_those_of_one_token_after_the_other(llama: Any, name: str) -> None:
    """Of several texts behind one context, which is repeated, and of what generate writes."""
    ids, texts = ids_of(N)[0], ids_of(20, 20)[0]
    with block(llama, name) as run:
        context = run.prefill(ids)
        found = run.score(texts, after=context)
        for row in range(2):
            step = context.cache.copy()
            with run._session(N + 20):
                logits = torch.cat([step.feed(token[None, None], None, 1) for token in texts[row]], 1)[0, :-1]
            expected = logits.log_softmax(-1).gather(-1, texts[row, 1:, None])[:, 0].double()
            assert float((found.log_likelihood[row, :-1] - expected).abs().max()) < 1e-5
        answer = run.ask(context, texts[:1], **GENERATE)
        whole = torch.cat([texts[:1], answer], 1)
        assert bool(run.score(whole, after=context).is_best[0, 19:-1].all())
        assert float(found.log_likelihood[0, -1]) == 0
    with block(llama, "snapkv") as other, pytest.raises(UserError, match="not made inside this block"):
        other.score(texts, after=context)
    with block(llama, "knorm", during="both") as run, pytest.raises(UserError, match="during='prefill'"):
        run.score(texts)


def test_texts_scored_alone_are_those_of_the_protocol_block(llama: Any) -> None:
    from kvbench.protocols.pieces import Piece
    from kvbench.protocols.scoring import score_pieces

    ids = ids_of(N, N)[0]
    for name in ("full", "knorm", "sinks", "scattered"):
        made = make_method(name, Fraction(ratio_of(name)), {})
        with block(llama, name) as run:
            found = run.score(ids)
        for row in range(2):
            text = tuple(ids[row].tolist())
            llama.set_attn_implementation(register())
            expected, _ = score_pieces(llama, made, [Piece("a", text, N, 1, 0, seed_of(ids[row]))])
            assert float((found.log_likelihood[row, :-1] + expected.nll[0]).abs().max()) < 1e-5
        assert found.usage.tokens == 2 * N
