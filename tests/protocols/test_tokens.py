"""A context and what follows it are one text: tokenised once, then split."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from kvbench.data.documents import Document, load_corpus
from kvbench.data.tasks import OnlineSpec, RecallSpec, load_task
from kvbench.judges.fluency import Scorer
from kvbench.methods import make_method
from kvbench.models.references import assets
from kvbench.protocols.base import settings_of
from kvbench.protocols.generate import Generate, cut_for_generation
from kvbench.protocols.online import online_trials
from kvbench.protocols.pieces import Piece, Tokenizer, make_tokenizer
from kvbench.protocols.recall import recall_trials
from kvbench.protocols.scoring import score_pieces
from kvbench.training.data import encode_in_context
from tests.helpers.models import small_model

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:'\"!?()-\n\u2581"
PAIRS = ("s\u2581", "re", "\u2581t", ".\n")
PROSE = " ".join(f"The old mill number {i} stands by the bridge; nobody visits it, said Ruth." for i in range(60))


def fast(backend: Any, **marks: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks)


@pytest.fixture(scope="module")
def pieces_with_a_dummy() -> Any:
    """As SentencePiece makes them: a space before the text, words not apart, and some pairs that reach across."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    vocabulary = {token: i for i, token in enumerate([*LETTERS, *PAIRS])}
    backend = Backend(models.BPE(vocabulary, [(pair[0], pair[1]) for pair in PAIRS]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return fast(backend)


def by_hand(text: str) -> list[str]:
    """The tokens of that tokenizer, by its merges in order of rank."""
    tokens = list("\u2581" + text.replace(" ", "\u2581"))
    for pair in PAIRS:
        at = 0
        while at < len(tokens) - 1:
            if (tokens[at], tokens[at + 1]) == (pair[0], pair[1]):
                tokens[at : at + 2] = [pair]
            at += 1
    return tokens


@cache
def bytes_with_trimmed_offsets() -> Any:
    """Byte-level tokens whose offsets leave out the spaces at their ends, as those of GPT-NeoX do."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u0120"), ("\u0120", "a")]  # a line break and a space; a space and a letter
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(m) for m in merges)])}
    backend = Backend(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


class Doubles:
    """A slow tokenizer: equal letters in a row are one token."""

    is_fast, bos_token_id = False, None

    def __call__(self, text: str, **_: Any) -> Any:
        found = [m.group() for m in re.finditer(r"(.)\1*", text, re.DOTALL)]
        return type("Ids", (), {"input_ids": [1000 * len(token) + ord(token[0]) for token in found]})()

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i % 1000) * (i // 1000) for i in ids)


def test_a_dummy_space_stands_before_the_text_and_not_before_its_parts(pieces_with_a_dummy: Any) -> None:
    tokenizer = Tokenizer(pieces_with_a_dummy, None)
    names = {i: token for token, i in pieces_with_a_dummy.get_vocab().items()}
    context, query, target = tokenizer.split(("He has a hat.", "\n\nThe coat of Ruth is", " red"))
    whole = by_hand("He has a hat.\n\nThe coat of Ruth is red")
    assert [names[i] for part in (context, query, target) for i in part.ids] == whole
    assert [names[i] for i in target.ids] == ["s\u2581", "re", "d"]  # reaches over the border: of what follows
    assert target.n_bytes == len("s red")
    assert query.n_bytes == len(".\n\nThe coat of Ruth i")  # so does the token that begins it
    assert [names[i] for i in tokenizer.apart((" red",))[0]][:2] == ["\u2581", "\u2581"]  # the stray space


@given(st.lists(st.text("ab s.\n\u00e9\u2014\U0001F600", max_size=8), min_size=1, max_size=5))
def test_every_token_is_in_one_part_and_reaches_over_no_border_before_it(parts: list[str]) -> None:
    for hf in (bytes_with_trimmed_offsets(), tiny()):
        found = Tokenizer(hf, None).split(parts)
        ids = [i for part in found for i in part.ids]
        text = "".join(parts)
        assert ids == hf(text, add_special_tokens=False).input_ids
        assert sum(part.n_bytes for part in found) == len(text.encode())
        lengths = [len(raw(hf, ids[:k])) for k in range(len(ids) + 1)]  # bytes of the first k tokens
        for i in range(1, len(parts)):
            border = len("".join(parts[:i]).encode())
            assert sum(len(part.ids) for part in found[:i]) == max(k for k, n in enumerate(lengths) if n <= border)


def raw(hf: Any, ids: list[int]) -> str:
    """The bytes of byte-level tokens, a character each."""
    return "".join(hf.convert_ids_to_tokens(ids))


@cache
def tiny() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(assets() / "kvbench-tiny"))


def test_spaces_that_offsets_leave_out_belong_to_their_token() -> None:
    hf = bytes_with_trimmed_offsets()
    first, second = Tokenizer(hf, None).split(("b\n", "  a"))
    assert (hf.decode(first.ids), hf.decode(second.ids)) == ("b", "\n  a")
    assert (first.n_bytes, second.n_bytes) == (1, 4)


@cache
def bytes_with_a_dummy(trims: bool) -> Any:
    """A token for each byte, and a space before the text, as GPT-2's with ``add_prefix_space``."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


@pytest.mark.parametrize("trims", [True, False])
@given(text=st.text("a \n\u00e9", min_size=1, max_size=8))
def test_tokens_end_in_order_and_no_further_than_their_text(trims: bool, text: str) -> None:
    """A space that was put before the text is none of its own."""
    hf = bytes_with_a_dummy(trims)
    ids, ends = Tokenizer(hf, None).encode(text)
    assert ends is not None
    assert ends == sorted(ends)
    assert ends[-1] == len(text)
    dummy = len(ids) - len(text.encode())
    assert dummy == int(text[0] != " ")
    expected = [i for i, character in enumerate(text, start=1) for _ in character.encode()]
    assert ends[dummy:] == expected


def test_a_letter_that_byte_level_tokens_write_a_space_with_is_a_letter_elsewhere() -> None:
    """Maltese has it; a tokenizer of whole words does not leave spaces out of where its tokens are."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    backend = Backend(models.WordLevel({"a\u0120": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    assert Tokenizer(fast(backend), None).encode("a\u0120 b") == ([0, 1], [2, 4])


@pytest.mark.parametrize(("parts", "expected"), [
    (("abb", "bc"), ("a", "bbbc")), (("aa", "", "b"), ("aa", "", "b")), (("", "aab"), ("", "aab")),
    (("a", "aa", "ab"), ("", "", "aaaab")), (("aab",), ("aab",)), (("", ""), ("", "")),
])
def test_a_slow_tokenizer_is_asked_for_the_text_up_to_the_border(
    parts: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    found = Tokenizer(Doubles(), None).split(parts)
    assert tuple(Doubles().decode(list(part.ids)) for part in found) == expected
    assert [part.n_bytes for part in found] == [len(text) for text in expected]


@torch.inference_mode()
def test_an_answer_costs_what_a_plain_loop_over_the_one_text_says(pieces_with_a_dummy: Any) -> None:
    model = small_model("llama")
    turns = ("He has a hat.", "She has a red coat.", "The coat of Ruth is", "red")
    spec = OnlineSpec(steps=(1, 2), query="last", before_answer=" ")
    trials = online_trials([Document("d", "d", "", turns)], Tokenizer(pieces_with_a_dummy, None), spec)
    vocabulary = pieces_with_a_dummy.get_vocab()
    for (_, cut), shown in zip(trials, (1, 2), strict=True):
        (piece,) = cut.pieces
        text = "\n\n".join([*turns[:shown], turns[2]])
        tokens, border = by_hand(f"{text} red"), 1 + len(text)  # the space before the text
        ids = [vocabulary[token] for token in tokens]
        ends = list(accumulate(map(len, tokens)))
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        expected = -sum(float(logits[k - 1, ids[k]]) for k, end in enumerate(ends) if end > border)
        score, _ = score_pieces(model, make_method("full", Fraction(0)), [piece], chunk=16)
        assert float(score.nll.sum()) == pytest.approx(expected, abs=1e-4)
        assert piece.version == 2


def test_a_chunk_without_a_token_of_its_own_is_a_trial_that_is_skipped(pieces_with_a_dummy: Any) -> None:
    spec, slow = OnlineSpec(steps=(1, 2), query="last", between="", before_answer=""), Tokenizer(Doubles(), None)
    talk = Document("d", "d", "", ("ab", "bb", "bc", "d"))
    found = {document.id: cut.pieces for document, cut in online_trials([talk], slow, spec)}
    assert [len(pieces) for pieces in found.values()] == [1, 0]  # the second chunk has no token


def versions(pieces: list[Piece]) -> set[int]:
    return {piece.version for piece in pieces}


def pieces_of(name: str, hf: Any) -> list[Piece]:
    task, tokenizer = load_task(name), make_tokenizer(hf, "auto")
    documents = load_corpus(task, None).documents[:6]
    if task.online is not None:
        return [p for _, cut in online_trials(documents, tokenizer, task.online) for p in cut.pieces]
    assert task.generation is not None
    writing = Generate.resolve(task, settings_of(Generate, {"preset": "paper"}), 1024, "model")
    return [p for document in documents for p in cut_for_generation(document, tokenizer, writing).pieces]


@pytest.mark.parametrize(("name", "of_tiny", "of_pieces"), [
    ("online-profiles", 1, 2), ("online-demonstrations", 1, 2), ("minidocs-gen", 1, 2), ("online", 2, 2),
])
def test_the_version_is_raised_where_tokens_are_others_and_nowhere_else(
    name: str, of_tiny: int, of_pieces: int, tiny_tokenizer: Any, pieces_with_a_dummy: Any
) -> None:
    assert versions(pieces_of(name, tiny_tokenizer)) == {of_tiny}
    assert versions(pieces_of(name, pieces_with_a_dummy)) == {of_pieces}


def test_prefix_and_reference_in_words_are_one_text(pieces_with_a_dummy: Any) -> None:
    document = load_corpus(load_task("minidocs-gen"), None).documents[0]
    (piece, *_) = pieces_of("minidocs-gen", pieces_with_a_dummy)
    ids = (*piece.ids, *piece.after)
    assert list(ids) == pieces_with_a_dummy(document.text, add_special_tokens=False).input_ids[: len(ids)]


def test_a_text_that_joins_its_prefix_is_scored_as_one_text(llama_4096: nn.Module, tiny_tokenizer: Any) -> None:
    prefix, text = "The mill by the brid", "ge was old"
    ids = tiny_tokenizer(prefix + text, add_special_tokens=False).input_ids
    before = max(k for k in range(len(ids)) if len(tiny_tokenizer.decode(ids[:k])) <= len(prefix))
    assert len(tiny_tokenizer.decode(ids[:before])) < len(prefix)  # a token reaches over
    labels = torch.tensor([[-100] * before + ids[before:]])
    loss = float(llama_4096(torch.tensor([ids]), labels=labels).loss) * (len(ids) - before)  # type: ignore[operator]
    (found,) = Scorer(llama_4096, tiny_tokenizer, 256).score([(prefix, text)])
    assert (found.tokens, found.nll) == (len(ids) - before, pytest.approx(loss, rel=1e-5))


def test_facts_of_training_text_stand_within_it(pieces_with_a_dummy: Any, tiny_tokenizer: Any) -> None:
    fact = "\n\nThe key of Ruth is 4821.\n\n"
    names = {i: token for token, i in pieces_with_a_dummy.get_vocab().items()}
    assert [names[i] for i in encode_in_context(pieces_with_a_dummy, fact)] == by_hand("a" + fact)[2:]
    assert encode_in_context(tiny_tokenizer, fact) == tiny_tokenizer(fact, add_special_tokens=False).input_ids


# --- recall --------------------------------------------------------------------------------------------------------

SPEC = RecallSpec(distances=(30, 61), trials=4, context=200)


def of_doubles(text: str) -> list[int]:
    return list(Doubles()(text).input_ids)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("which", ["tiny", "pieces", "slow"])
def test_recall_is_one_text_with_exact_lengths(
    which: str, known: bool, tiny_tokenizer: Any, pieces_with_a_dummy: Any
) -> None:
    hf = {"tiny": tiny_tokenizer, "pieces": pieces_with_a_dummy, "slow": Doubles()}[which]
    encode: Callable[[str], list[int]] = of_doubles if which == "slow" else (
        lambda text: list(hf(text, add_special_tokens=False).input_ids)
    )
    trials = list(recall_trials((Document("d", "d", PROSE),), Tokenizer(hf, None), SPEC, 0, known))
    assert len(trials) == 8
    for document, cut in trials:
        (piece,) = cut.pieces
        ids, text = list(piece.ids), hf.decode(list(piece.ids))
        assert encode(text) == ids  # what a tokenizer makes of the whole text
        found = re.fullmatch(r"(.*)(\n\nThe \w+ of \w+ is)( \d+)\.\n\n(.*)\2\3", text, re.DOTALL)
        assert found is not None
        before, question, answer, after = found.groups()
        assert f"{before.strip()}{after.strip()}".replace(" ", "") in PROSE.replace(" ", "")
        ends = [len(hf.decode(ids[:k])) for k in range(len(ids) + 1)]
        asked = len(text) - len(question + answer)
        first = max(k for k, end in enumerate(ends) if end <= asked - len(after))
        last = max(k for k, end in enumerate(ends) if end <= asked)
        assert last - first == int(document.id.split("-")[1])
        assert piece.scored == max(k for k, end in enumerate(ends) if end <= len(text) - len(answer))
        assert piece.context == (piece.scored - 1 if known else last)
        assert piece.context % 20 == 0
        assert piece.context >= 200
        assert (piece.ahead, piece.version) == (int(known), 2)
        assert piece.n_bytes == len(text) - ends[piece.scored]


def test_both_questions_ask_for_the_same_facts(tiny_tokenizer: Any) -> None:
    tokenizer, prose = Tokenizer(tiny_tokenizer, None), (Document("d", "d", PROSE),)
    hidden, known = (recall_trials(prose, tokenizer, SPEC, 0, known) for known in (False, True))
    for (one, first), (other, second) in zip(hidden, known, strict=True):
        (a,), (b,) = first.pieces, second.pieces
        assert (one.id, a.ids[a.scored :], a.layout) == (other.id, b.ids[b.scored :], b.layout)


def test_prose_that_is_just_too_short_for_exact_lengths_leaves_the_trial_to_another(tiny_tokenizer: Any) -> None:
    """A text of exactly as many tokens as prose is wanted when the fact is counted by itself."""
    spec = RecallSpec(distances=(30,), trials=6, context=200)
    ids = tiny_tokenizer(PROSE, add_special_tokens=False).input_ids
    short = [Document(str(n), str(n), tiny_tokenizer.decode(ids[:n])) for n in range(184, 190)]
    trials = list(recall_trials((*short, Document("d", "d", PROSE)), Tokenizer(tiny_tokenizer, None), spec, 0))
    assert {cut.pieces[0].context for _, cut in trials} == {200}
    assert "d" in {document.group for document, _ in trials}
