"""Cuts, scores and their sums, against naive computations."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvbench.data.documents import Document
from kvbench.data.tasks import RecallSpec, load_task
from kvbench.errors import UserError
from kvbench.methods import make_method
from kvbench.protocols.base import settings_of
from kvbench.protocols.block import cut_blocks
from kvbench.protocols.pieces import (
    MIN_TOKENS,
    Piece,
    Tokenizer,
    make_tokenizer,
)
from kvbench.protocols.prefix import cut_prefix
from kvbench.protocols.recall import recall_trials
from kvbench.protocols.registry import protocol_of
from kvbench.protocols.scoring import kl_histogram, score_pieces
from kvbench.protocols.stream import cut_stream
from tests.helpers.models import VOCABULARY, small_adapter

TEXT = "The mill at Anselbrook — nine flat stones, an otter named Brindle. " * 40


class Characters:
    """A tokenizer whose tokens are the characters of the text, without offsets or BOS."""

    is_fast, bos_token_id = False, None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Ids", (), {"input_ids": [ord(c) for c in text]})()

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@given(st.integers(0, 700), st.integers(32, 200), st.booleans())
def test_blocks_score_every_token_once(n: int, length: int, with_bos: bool) -> None:
    text = "".join(chr(97 + i % 26) for i in range(n))
    tokenizer = Tokenizer(Characters(), 0 if with_bos else None)
    cut = cut_blocks(Document("d", "d", text), tokenizer, length)
    lead = int(with_bos)
    scored = sum(len(piece.ids) - piece.scored for piece in cut.pieces)
    firsts = len(cut.pieces) * (1 - lead)  # context only, where there is no BOS
    assert scored + firsts + cut.dropped == n
    assert cut.dropped < MIN_TOKENS
    assert all(MIN_TOKENS <= len(piece.ids) <= length for piece in cut.pieces)
    assert sum(piece.n_bytes for piece in cut.pieces) == scored
    rebuilt = "".join("".join(map(chr, piece.ids[lead:])) for piece in cut.pieces)
    assert text.startswith(rebuilt)


def test_bytes_are_those_of_the_scored_text(tiny_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(tiny_tokenizer, "auto")
    cut = cut_blocks(Document("d", "d", TEXT), tokenizer, 10_000)
    first = tiny_tokenizer(TEXT, return_offsets_mapping=True).offset_mapping[0][1]
    assert cut.pieces[0].n_bytes == len(TEXT[first:].encode())
    assert len(TEXT[first:]) < cut.pieces[0].n_bytes  # the dash takes three bytes


def test_stream_is_one_passage_and_prefix_is_split(tiny_tokenizer: Any) -> None:
    tokenizer, document = make_tokenizer(tiny_tokenizer, "auto"), Document("d", "d", TEXT)
    ids = tokenizer.encode(TEXT)[0]
    stream = cut_stream(document, tokenizer, 300)
    assert [len(piece.ids) for piece in stream.pieces] == [300]
    assert stream.dropped == len(ids) - 300
    prefix = cut_prefix(document, tokenizer, 96, 32)
    (piece,) = prefix.pieces
    assert (len(piece.ids), piece.context, piece.scored) == (128, 96, 96)
    assert not cut_prefix(Document("s", "s", "too short"), tokenizer, 96, 32).pieces


def test_bos_only_when_the_tokenizer_emits_one(tiny_tokenizer: Any) -> None:
    assert make_tokenizer(tiny_tokenizer, "auto").bos is None
    with pytest.raises(UserError, match="no BOS"):
        make_tokenizer(tiny_tokenizer, "true")


def test_recall_trials_hide_the_fact_at_its_distance(tiny_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(tiny_tokenizer, "auto")
    spec = RecallSpec(distances=(30, 120), trials=3, context=200)
    trials = list(recall_trials((Document("d", "d", TEXT),), tokenizer, spec, 0))
    assert len(trials) == 6
    for document, cut in trials:
        (piece,) = cut.pieces
        distance = int(document.id.split("-")[1])
        assert piece.bin == f"distance={distance}"
        assert document.group == "d"
        assert piece.context >= 200
        assert piece.context % 20 == 0
        answer = tiny_tokenizer.decode(piece.ids[piece.scored :])
        question = tiny_tokenizer.decode(piece.ids[piece.context : piece.scored])
        context = tiny_tokenizer.decode(piece.ids[: piece.context])
        assert answer.strip().isdigit()
        statement = question + answer + ".\n\n"
        assert statement in context
        after = context.split(statement)[1]
        assert abs(len(tokenizer.encode(after)[0]) - distance) <= 3  # by itself; exactly: test_tokens.py


def naive_nll(model: nn.Module, ids: tuple[int, ...], scored: int) -> list[float]:
    logits = model(torch.tensor([ids])).logits[0].double()
    return [
        float(-torch.log_softmax(logits[t - 1], 0)[ids[t]]) for t in range(scored, len(ids))
    ]


def piece_of(n: int, context: int | None = None, scored: int = 1, seed: int = 0) -> Piece:
    ids = torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Piece("d", tuple(ids), context or n, scored, n, 3)


@torch.inference_mode()
@pytest.mark.parametrize(("context", "scored"), [(None, 1), (60, 60), (60, 70)])
@pytest.mark.parametrize("execution", ["streamed", "onepass"])
def test_full_scores_are_those_of_a_plain_forward(
    model: nn.Module, execution: str, context: int | None, scored: int
) -> None:
    pieces = [piece_of(80, context, scored, seed) for seed in (0, 1)]
    full = make_method("full", Fraction(0))
    score, _ = score_pieces(model, full, pieces, execution=execution, chunk=16)
    for row, piece in enumerate(pieces):
        assert score.nll[row].tolist() == pytest.approx(naive_nll(model, piece.ids, scored), abs=1e-4)
    assert score.visible / score.queries == pytest.approx(1.0)
    assert score.held == pieces[0].context
    assert score.full == score.logical == score.physical


@torch.inference_mode()
@pytest.mark.parametrize("name", ["sentinel", "sinks", "scattered", "none"])
@pytest.mark.parametrize(("context", "scored"), [(None, 1), (60, 60), (60, 70)])
def test_executions_agree_and_kl_is_the_naive_one(
    llama: nn.Module, name: str, context: int | None, scored: int
) -> None:
    pieces = [piece_of(80, context, scored, seed) for seed in (0, 1)]
    adapter = small_adapter(llama) if name == "sentinel" else None
    _, reference = score_pieces(llama, make_method("full", Fraction(0)), pieces, chunk=16, keep_reference=True)
    streamed, masked = (
        score_pieces(
            llama, make_method(name, Fraction("0.5")), pieces, reference, adapter=adapter, execution=execution,
            chunk=16,
        )[0] for execution in ("streamed", "onepass")
    )
    assert (streamed.nll - masked.nll).abs().max() < 1e-5
    assert (streamed.held, streamed.visible, streamed.queries) == (masked.held, masked.visible, masked.queries)
    assert streamed.kl is not None
    assert masked.kl is not None
    assert (streamed.kl - masked.kl).abs().max() < 1e-4
    assert streamed.kl.mean() > 0.01
    assert masked.physical > streamed.physical == streamed.logical
    full = torch.stack([llama(torch.tensor([p.ids])).logits[0, scored - 1 : -1] for p in pieces]).log_softmax(-1)
    assert reference is not None
    assert (reference.probabilities - full.exp()).abs().max() < 1e-5


@torch.inference_mode()
def test_mean_ratio_is_the_share_that_queries_do_not_see(llama: nn.Module) -> None:
    piece = piece_of(64)
    score, _ = score_pieces(llama, make_method("window", Fraction("0.5")), [piece], chunk=16)
    expected = [min(i, 32) / i for i in range(1, 63)]
    assert score.queries == len(expected)
    assert score.visible == pytest.approx(sum(expected))


def test_kl_histogram_counts_everything() -> None:
    values = torch.tensor([0.0, 1e-9, 1e-3, 0.5, 0.5, 1e5], dtype=torch.float64)
    counts = kl_histogram(values)
    assert sum(counts.values()) == 6
    assert counts["0"] == 2
    assert counts["999"] == 1
    assert counts[str(int(math.log(0.5 / 1e-8) / math.log(1e10) * 1000))] == 2


def test_protocol_lengths() -> None:
    def resolved(name: str, context: int, **given: str) -> Any:
        protocol = protocol_of(load_task("minidocs"), name)
        return protocol.resolve(load_task("minidocs"), settings_of(protocol, given), context, "model")

    assert resolved("block", 1024).length == 512
    assert resolved("block", 1024, preset="paper").length == 256
    assert resolved("stream", 1024).length == 1024
    assert resolved("stream", 1024, tokens="2000").beyond_context
    prefix = resolved("prefix", 1024)
    assert (prefix.length, prefix.continuation) == (768, 256)
    prefix = resolved("prefix", 100_000)
    assert (prefix.length, prefix.continuation) == (960, 320)
    with pytest.raises(UserError, match="do not fit"):
        resolved("block", 256)
    with pytest.raises(UserError, match="chunk=0"):
        resolved("block", 1024, chunk="0")
    with pytest.raises(UserError, match="preset"):
        resolved("block", 1024, preset="papr")
    signature = resolved("block", 1024).signature("streamed", False, "abc")
    assert signature == "block|L:512|chunk:64|bos:none|reset:piece|tok:abc|v:1"
