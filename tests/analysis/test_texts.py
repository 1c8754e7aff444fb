"""Metrics of written text against their libraries' own numbers, independent code, and sums by hand."""

from __future__ import annotations

import itertools
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kvbench.errors import UserError
from kvbench.judges import encoder as encoder_module
from kvbench.judges.encoder import SentenceEncoder, StateEncoder, packed
from kvbench.judges.fluency import Scorer
from kvbench.metrics import GENERATION_NAMES, TEXT_METRICS
from kvbench.metrics import distinct as distinct_metric
from kvbench.metrics import mauve as mauve_metric
from kvbench.metrics.bleu import _library as bleu_library
from kvbench.metrics.bleu import bleu_of
from kvbench.metrics.chrf import _library as chrf_library
from kvbench.metrics.chrf import chrf_of
from kvbench.metrics.prefix_match import common_prefix
from kvbench.metrics.texts import Sample, cosine, unpacked
from kvbench.statistics import exchanged_p_values
from kvbench.store.records import Output

BY_NAME = {metric.name: metric for metric in TEXT_METRICS}
WRITTEN = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
PEOPLE = ["The dog bit the man.", "It was not unexpected.", "The man bit him first."]
OTHERS = ["The dog had bit the man.", "No one was surprised.", "The man had bitten the dog."]


def output(text: str, **more: Any) -> Output:
    return Output(**{"decode": "nucleus", "draw": 0, "ids": (1, 2), "text": text, "ended": False, **more})


def sample(text: str, reference: str = "", **more: Any) -> Sample:
    return Sample(**{
        "outputs": (output(text),), "reference": reference, "reference_vector": None, "prefix_vector": None,
        "full": (), **more,
    })


def value(name: str, samples: list[Sample]) -> float:
    """A metric over documents, one group each, summed as a report does it."""
    metric = BY_NAME[name]
    found = [metric.columns(s) for s in samples]
    assert all(f is not None for f in found)
    names = found[0].keys()  # type: ignore[union-attr]
    totals = {n: np.sum([np.asarray(f[n], dtype=float) for f in found], axis=0)[None] for n in names}  # type: ignore[index]
    return float(metric.value(totals)[0])


def test_bleu_and_chrf_are_those_of_sacrebleus_readme() -> None:
    """BLEU 48.53 and chrF2 59.73 are printed there, for two references; we count with its code."""
    counts = bleu_library()._extract_corpus_statistics(WRITTEN, [PEOPLE, OTHERS])
    assert bleu_of(np.sum(counts, 0, dtype=float)) == pytest.approx(48.530827, abs=1e-6)
    counts = chrf_library()._extract_corpus_statistics(WRITTEN, [PEOPLE, OTHERS])
    assert chrf_of(np.sum(counts, 0, dtype=float)) == pytest.approx(59.73, abs=5e-3)


@pytest.mark.parametrize("written", [
    WRITTEN, ["", "", ""], ["x", "y", "z"], ["The dog", "", "him first. The man bit him first. The man"], PEOPLE,
    ["The", "It was", "The man bit"],
])
def test_bleu_and_chrf_of_a_corpus_are_sacrebleus(written: list[str]) -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    samples = [sample(w, p) for w, p in zip(written, PEOPLE, strict=True)]
    assert value("bleu", samples) == pytest.approx(BLEU().corpus_score(written, [PEOPLE]).score, abs=1e-9)
    assert value("chrf", samples) == pytest.approx(CHRF().corpus_score(written, [PEOPLE]).score, abs=1e-9)


def test_signatures_of_bleu_and_chrf_are_sacrebleus() -> None:
    for name, library in (("bleu", bleu_library()), ("chrf", chrf_library())):
        library.corpus_score(WRITTEN, [PEOPLE])
        theirs = str(library.get_signature()).rpartition("|version")[0]
        assert theirs in BY_NAME[name].signature


def test_rouge_is_that_of_the_readme() -> None:
    """rouge-score prints F1 0.7059 (ROUGE-1) and 0.5882 (ROUGE-L) for this pair."""
    pair = [sample("The quick brown dog jumps on the log.", "The quick brown fox jumps over the lazy dog")]
    assert value("rouge1", pair) == pytest.approx(0.705882, abs=1e-6)
    assert value("rougeL", pair) == pytest.approx(0.588235, abs=1e-6)
    assert value("rouge2", [*pair, sample("", "a b")]) == pytest.approx(value("rouge2", pair) / 2)


def test_repetition_by_hand() -> None:
    looped = sample("a b a b a b")  # bigrams: ab ba ab ba ab; trigrams: aba bab aba bab; 4-grams: abab baba abab
    assert value("rep2", [looped]) == pytest.approx(1 - 2 / 5)
    assert value("rep3", [looped]) == pytest.approx(1 - 2 / 4)
    assert value("rep4", [looped]) == pytest.approx(1 - 2 / 3)
    fresh = sample("one two three four five")
    assert value("diversity", [fresh]) == 1
    rep2, rep3, rep4 = (value(f"rep{n}", [looped, fresh]) for n in (2, 3, 4))
    assert rep2 == pytest.approx(0.3)
    assert value("diversity", [looped, fresh]) == pytest.approx((1 - rep2) * (1 - rep3) * (1 - rep4))
    assert value("rep4", [looped, sample("too short")]) == pytest.approx(1 / 3), "the short text does not count"


def test_length_empty_texts_and_loops() -> None:
    samples = [sample("go on and on " * 3), sample(" \n"), sample("a text that does not loop at all, it seems")]
    assert value("empty_share", samples) == pytest.approx(1 / 3)
    assert value("loop_share", samples) == pytest.approx(1 / 3)
    assert value("loop_share", [sample("go on and on " * 2)]) == 0
    assert value("gen_length", samples) == 2


def test_agreement_with_the_full_cache() -> None:
    full = (output("", decode="greedy", ids=(1, 2, 3, 4)),)

    def greedy(*ids: int) -> Sample:
        return sample("", outputs=(output("", decode="greedy", ids=ids),), full=full)

    assert common_prefix((1, 2, 9), (1, 2, 3)) == 2
    assert value("prefix_match", [greedy(1, 2, 3, 4)]) == 1
    assert value("prefix_match", [greedy(1, 2, 9, 4)]) == 0.5
    assert value("prefix_match", [greedy(1, 2)]) == 0.5, "a text that ended early differs there"
    assert BY_NAME["prefix_match"].columns(sample("drawn")) is None


def test_distinct_and_its_jackknife() -> None:
    groups = [["a b c", "a b d"], ["a b c d e"], ["x y"]]

    def distinct(of: list[list[str]]) -> distinct_metric.Jackknifed:
        texts = [(str(i), text) for i, group in enumerate(of) for text in group]
        counted = distinct_metric.counts(texts, 4)
        return distinct_metric.distinct(np.stack([
            counted[[at == str(i) for at, _ in texts]].sum(0) for i in range(len(of))
        ]))

    found = distinct(groups)
    # bigrams: ab bc ab bd | ab bc cd (the fifth word is beyond the budget) | xy
    assert found.value == pytest.approx(5 / 8)
    for i in range(3):
        rest = [texts for j, texts in enumerate(groups) if j != i]
        assert found.without[i] == pytest.approx(distinct(rest).value)
    low, high, error = distinct_metric.interval(found)
    spread = found.without - found.without.mean()
    assert error == pytest.approx(math.sqrt(2 / 3 * float(spread @ spread)))
    assert low == pytest.approx(found.value - 1.959964 * error)
    assert high > found.value
    assert distinct_metric.p_value(distinct_metric.difference(found, found)) == 1


# --- judges ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shared_up_to", [0, 256])
def test_fluency_is_the_models_own_loss(llama_4096: nn.Module, tiny_tokenizer: Any, shared_up_to: int) -> None:
    pairs = [("The mill by the", " old bridge had nine"), ("The mill by the", " stones"), ("Once upon", ""),
             ("A longer prefix than the others, it is", " said."), ("The mill by the", "ory of it"),
             ("A longer prefix than the others, it is", " not")]
    found = Scorer(llama_4096, tiny_tokenizer, 256, shared_up_to).score(pairs)
    for (prefix, text), fluency in zip(pairs, found, strict=True):
        before, after = (tiny_tokenizer(part, add_special_tokens=False).input_ids for part in (prefix, text))
        assert fluency.tokens == len(after)
        if after:
            ids = torch.tensor([[*before, *after]])
            labels = torch.tensor([[-100] * len(before) + after])
            loss = float(llama_4096(ids, labels=labels).loss) * len(after)  # type: ignore[operator]
            assert fluency.nll == pytest.approx(loss, rel=1e-5)


def test_a_prefix_is_read_once_for_all_its_texts(llama_4096: nn.Module, tiny_tokenizer: Any) -> None:
    """And by itself where the model does not attend the whole text in full: there a cache would hold too much."""
    prefix, texts = "The mill by the old bridge had nine stones. " * 5, [" An otter kept", " them", " all of the time"]
    before, *after = (len(tiny_tokenizer(part, add_special_tokens=False).input_ids) for part in (prefix, *texts))
    read: list[int] = []
    hook = llama_4096.get_input_embeddings().register_forward_pre_hook(lambda _, ids: read.append(ids[0].numel()))  # type: ignore[operator]
    with hook:
        scorer = Scorer(llama_4096, tiny_tokenizer, 256, before + max(after))
        shared = [scorer.score([(prefix, text)])[0] for text in texts]
        assert sum(read) == before + sum(after)  # the prefix, its last token again, and no text's last
        read.clear()
        alone = Scorer(llama_4096, tiny_tokenizer, 256, before + max(after) - 1).score([(prefix, t) for t in texts])
        assert sum(read) == 2 * before + sum(after)  # the longest with its prefix
    assert [found.nll for found in shared] == pytest.approx([found.nll for found in alone], rel=1e-5)


def test_a_prefix_beyond_the_scorers_context_loses_its_beginning(llama_4096: nn.Module, tiny_tokenizer: Any) -> None:
    text, end = "The mill by the old bridge had nine stones. " * 40, " and an otter"
    short = Scorer(llama_4096, tiny_tokenizer, 64)
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    after = tiny_tokenizer(end, add_special_tokens=False).input_ids
    same = tiny_tokenizer.decode(ids[-(64 - len(after)) :])
    assert short.score([(text, end)])[0].nll == pytest.approx(short.score([(same, end)])[0].nll, rel=1e-5)


@pytest.fixture(scope="module")
def sentences() -> SentenceEncoder:
    return SentenceEncoder.load("cpu")


def test_meaning_is_sentence_transformers_cosine(sentences: SentenceEncoder) -> None:
    from sentence_transformers import util

    texts = ["An otter kept nine stones in the river.", "The stones were guarded by an otter.", "Taxes rose."]
    vectors = [packed(v) for v in sentences.encode(texts)]
    theirs = util.cos_sim(sentences.model.encode(texts), sentences.model.encode(texts)).numpy()
    for i, j in itertools.product(range(3), repeat=2):
        assert cosine(vectors[i], vectors[j]) == pytest.approx(theirs[i, j], abs=5e-4)
    near, far = (
        value("semantic", [replace(sample("x"), outputs=(output("x", vector=vectors[0]),), reference_vector=v)])
        for v in vectors[1:]
    )
    assert near > 0.6
    assert far < 0.3
    empty = Sample((output("  ", vector=vectors[0]),), "", vectors[0], vectors[0], ())
    assert value("semantic", [empty]) == value("prefix_coherence", [empty]) == 0


def test_long_texts_are_read_to_their_end(sentences: SentenceEncoder) -> None:
    """The encoder itself stops at its window without a word."""
    start = "The otter of Anselbrook kept nine flat stones below the mill. " * 40
    other, same = start + "Interest rates were raised by the central bank. " * 40, start + start
    plain = sentences.model.encode([other, same])
    assert np.abs(plain[0] - plain[1]).max() < 1e-5
    ours = sentences.encode([other, same])
    assert np.abs(ours[0] - ours[1]).max() > 0.01
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, rtol=1e-5)


def test_an_encoder_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "other_encoder"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model" / "model.safetensors").write_bytes(b"not these")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoder_module, "PACKAGE", "other_encoder")
    with pytest.raises(UserError, match="SHA-256"):
        encoder_module.encoder_folder()
    monkeypatch.setattr(encoder_module, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="not installed"):
        encoder_module.encoder_folder()


def test_every_file_of_the_encoder_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer or another pooling would be another metric, with the same weights."""
    real = encoder_module.encoder_folder()
    package = tmp_path / "changed_encoder"
    package.mkdir()
    (package / "__init__.py").write_text("")
    shutil.copytree(real, package / "model", copy_function=os.symlink)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(encoder_module, "PACKAGE", "changed_encoder")
    assert encoder_module.encoder_folder() == package / "model"
    for name in ("config.json", "tokenizer.json", "vocab.txt", "1_Pooling/config.json", "sentence_bert_config.json"):
        path = package / "model" / name
        path.unlink()
        path.write_text((real / name).read_text() + " ")
        with pytest.raises(UserError, match=f"{name} has SHA-256"):
            encoder_module.encoder_folder()
        path.unlink()
        with pytest.raises(UserError, match=f"{name} is not there"):
            encoder_module.encoder_folder()
        path.symlink_to(real / name)


def test_last_states_for_mauve(llama_4096: nn.Module, tiny_tokenizer: Any) -> None:
    found = StateEncoder(llama_4096, tiny_tokenizer, 256).encode(["An otter.", ""])
    ids = torch.tensor([tiny_tokenizer("An otter.").input_ids])
    states = llama_4096(ids, output_hidden_states=True).hidden_states[-1][0, -1]  # type: ignore[operator]
    np.testing.assert_allclose(found[0], states.numpy(), atol=1e-5)
    assert found.shape == (2, 64)


def test_mauve_is_the_librarys_and_sees_what_differs() -> None:
    from mauve import compute_mauve

    rng = np.random.default_rng(0)
    people, like, unlike = rng.normal(size=(200, 16)), rng.normal(size=(200, 16)), rng.normal(1.5, 1, size=(200, 16))
    near, far = (mauve_metric.measure(people, written, (25, 26)) for written in (like, unlike))
    direct = compute_mauve(p_features=people, q_features=like, num_buckets=20, seed=25, verbose=False).mauve
    assert near[0] == pytest.approx(direct)
    assert min(near) > 0.8
    assert max(far) < 0.2
    mean, low, high = mauve_metric.over_seeds([0.5, 0.6, 0.7])
    assert (mean, low) == (pytest.approx(0.6), pytest.approx(0.6 - 4.302653 * 0.1 / math.sqrt(3)))
    assert high - mean == pytest.approx(mean - low)
    assert "few texts" in mauve_metric.signature(200, "x")
    assert "few texts" not in mauve_metric.signature(1000, "x")


def test_vectors_survive_storage() -> None:
    vector = np.linspace(-1, 1, 384).astype(np.float32)
    np.testing.assert_allclose(unpacked(packed(vector)), vector, atol=1e-3)


# --- statistics --------------------------------------------------------------------------------------------------

def test_exchanging_within_groups_is_the_exact_test() -> None:
    """Against every one of the 2^8 exchanges, for a ratio of sums."""
    rng = np.random.default_rng(0)
    full = np.stack([rng.normal(3, 0.3, 8), np.ones(8)], 1)
    method = full + np.array([0.15, 0]) + np.stack([rng.normal(0, 0.2, 8), np.zeros(8)], 1)

    def apart(one: Any, other: Any) -> Any:
        return np.stack([np.exp(one[:, 0] / one[:, 1]) - np.exp(other[:, 0] / other[:, 1])])

    def exact() -> float:
        observed = abs(float(apart(method.sum(0)[None], full.sum(0)[None])[0, 0]))
        hits = 0
        for kept in itertools.product((0, 1), repeat=8):
            k = np.array(kept, dtype=float)[None]
            exchange_test = apart(k @ method + (1 - k) @ full, k @ full + (1 - k) @ method)
            hits += abs(float(exchange_test[0, 0])) >= observed - 1e-12
        return hits / 2**8

    assert exchanged_p_values(method, full, apart, 0)[0] == pytest.approx(exact(), abs=0.015)
    assert exchanged_p_values(full, full, apart, 0) == [1.0]
    assert exchanged_p_values(full[:1], method[:1], apart, 0) == [None]


def test_every_metric_of_text_has_a_name_of_the_contract() -> None:
    contract = {
        "gen_ppl", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "semantic", "mauve", "rep2", "rep3", "rep4",
        "distinct", "diversity", "gen_length", "loop_share", "prefix_coherence", "prefix_match",
    }
    assert set(GENERATION_NAMES) == contract | {"empty_share"}
