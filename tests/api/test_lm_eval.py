"""lm-evaluation-harness on a compressed model: its own model if nothing is removed, else what a dense pass gives."""

from __future__ import annotations

import importlib
import json
import random
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from kvbench.api.compress import compress
from kvbench.errors import UserError
from kvbench.inference.compressed_cache import seed_of
from kvbench.integrations.lm_eval import KVBenchLM
from kvbench.integrations.split import SplitRule
from kvbench.methods import RUNNING, kept, make_layout, make_method
from tests.helpers.command import Call, refused
from tests.helpers.dense import dense_logits
from tests.helpers.harness import without_surroundings
from tests.helpers.zoo import zoo_model

WORDS = ("the", "mill", "by", "the", "old", "bridge", "had", "nine", "flat", "stones", "and", "an", "otter", "kept")
CHOICES = [" The mill", " An otter kept", " Nobody on the old bridge at all", " nine"]
LENGTHS = (90, 20, 120, 90)
"""Words of the prompts; 20 are too few to be compressed."""


@pytest.fixture(autouse=True)
def _only_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    without_surroundings(monkeypatch)


def told(words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + "."


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")

    def data(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")}
        return {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}

    asked = [{"q": told(n, place), "choices": CHOICES, "gold": place % 4} for place, n in enumerate(LENGTHS)]
    mean = {"aggregation": "mean", "higher_is_better": True}
    return [
        data("choice", asked) | {
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}", "target_delimiter": "", "metric_list": [{"metric": "acc", **mean}],
        },
        data("written", asked) | {
            "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["~~~"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
        data("rolling", [{"text": told(n, n)} for n in (300, 40, 150)]) | {
            "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
        },
    ]


def evaluated(lm: Any, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """The results, with what the model answered to every request of a task under ``answers``."""
    found: Any = lm_eval.simple_evaluate(
        model=lm, tasks=[dict(task) for task in tasks], task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    answers = {task: [sample["resps"] for sample in samples] for task, samples in found["samples"].items()}
    return {**found, "answers": answers}


def numbers(answers: Any) -> list[float]:
    if isinstance(answers, (list, tuple)):
        return [number for one in answers for number in numbers(one)]
    return [float(answers)]


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    assert one["answers"]["written"] == other["answers"]["written"]
    for task in ("choice", "rolling"):
        assert numbers(one["answers"][task]) == pytest.approx(numbers(other["answers"][task]), abs=tolerance, rel=1e-7)


def lm_of(model: Any, tokenizer: Any, **given: Any) -> KVBenchLM:
    return KVBenchLM(model, tokenizer=tokenizer, max_length=200, **given)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_nothing_removed_is_the_harness_own_model(
    llama_4096: Any, tiny_tokenizer: Any, tasks: list[dict[str, Any]], attention: str
) -> None:
    llama_4096.set_attn_implementation(attention)
    stock = evaluated(HFLM(llama_4096, tokenizer=tiny_tokenizer, max_length=200, batch_size=2), tasks)
    assert len({str(text) for text in stock["answers"]["written"]}) > 1
    for given in ({"method": "full"}, {"method": "knorm", "ratio": 0, "batch_size": 3}):
        found = evaluated(lm_of(llama_4096, tiny_tokenizer, **given), tasks)
        same(found, stock, 1e-4)
        assert found["results"]["choice"]["acc,none"] == stock["results"]["choice"]["acc,none"]
    assert llama_4096.config._attn_implementation == attention


@pytest.mark.parametrize(("method", "split"), [
    ("snapkv:window=8", "none"), ("h2o", "last:3"), ("sinks", "regex:otter"), ("random", "none"), ("scattered", "none"),
])
def test_batches_change_nothing(
    llama_4096: Any, tiny_tokenizer: Any, tasks: list[dict[str, Any]], method: str, split: str
) -> None:
    given = {"method": method, "ratio": 0.5, "split": split}
    one, four = (evaluated(lm_of(llama_4096, tiny_tokenizer, batch_size=n, **given), tasks) for n in (1, 4))
    same(one, four, 1e-4)
    info = one["config"]["kvbench"]
    assert four["config"]["kvbench"] == info
    assert info["split"] == split
    assert 0 < info["compressed"] < info["requests"]
    assert info["ratio_realised"]["mean"] == pytest.approx(0.5, abs=0.02)
    assert info["bytes"] == pytest.approx(info["bytes_full"] * info["entries"] / info["context_tokens"])


def answer(logits: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """From logits whose last are those after the continuation without its last token."""
    likelihood = logits[-len(continuation) :].log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(likelihood.gather(-1, targets[:, None]).sum()), bool((likelihood.argmax(-1) == targets).all())


@pytest.mark.parametrize("split", ["none", "last:7"])
def test_a_window_is_a_dense_pass_of_the_model_itself_under_a_4d_mask(
    llama_4096: Any, tiny_tokenizer: Any, split: str
) -> None:
    """What is kept is known beforehand: of the prompt up to the question always the last kept(n, r) tokens."""
    lm = lm_of(llama_4096, tiny_tokenizer, method="window", ratio=0.6, split=split, batch_size=2)
    asked = [(told(n, n), choice) for n in (90, 120) for choice in CHOICES]
    encoded = [(pair, *lm._encode_pair(*pair)) for pair in asked]
    found = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    for (_, context, continuation), (value, is_greedy) in zip(encoded, found, strict=True):
        text = torch.tensor([context + continuation[:-1]])
        n, read = text.shape[1], len(context) - (1 if split == "none" else 7)
        ahead = torch.arange(n)[:, None].clamp(max=read) - torch.arange(n)  # of the query, or of the question's first
        mask = torch.ones(n, n, dtype=torch.bool).tril() & (ahead <= kept(read, Fraction(3, 5)))
        llama_4096.set_attn_implementation("sdpa")
        with torch.no_grad():
            dense = llama_4096(text, attention_mask=mask[None, None], use_cache=False).logits[0]
        assert (value, is_greedy) == (pytest.approx(answer(dense, continuation)[0], abs=1e-4),
                                      answer(dense, continuation)[1])
        assert value != pytest.approx(answer(llama_4096(text).logits[0], continuation)[0], abs=1e-3)


@pytest.mark.parametrize("method", ["snapkv", "tova", "adakv", "knorm"])
def test_scores_are_those_of_a_dense_pass_under_what_each_head_has_kept(
    llama_4096: Any, tiny_tokenizer: Any, method: str
) -> None:
    given: dict[str, Any] = {"method": method, "ratio": 0.5}
    lm = lm_of(llama_4096, tiny_tokenizer, split="last:5", **given)
    asked = [(told(90, 3), choice) for choice in CHOICES]
    encoded = [(pair, *lm._encode_pair(*pair)) for pair in asked]
    found = lm._loglikelihood_tokens(encoded, disable_tqdm=True)
    for (_, context, continuation), (value, _) in zip(encoded, found, strict=True):
        before = context[:-5]
        with compress(llama_4096, **given) as run:
            session = run.prefill(torch.tensor([before])).cache.groups[0].session
            held = [layer.positions[0] for layer in session.cache.layers]
            text = torch.tensor([context + continuation[:-1]])
        token = llama_4096.config._attn_implementation
        with compress(llama_4096, "full") as run:
            llama_4096.forward = run.original["forward"]
            dense = dense_logits(llama_4096, text, held, len(before))
        assert llama_4096.config._attn_implementation == token
        assert value == pytest.approx(answer(dense, continuation)[0], abs=1e-4)


@pytest.mark.parametrize("method", ["sinks", "local", "scattered"])
def test_windows_of_a_long_text_are_read_as_blocks(llama_4096: Any, tiny_tokenizer: Any, method: str) -> None:
    """Each window is compressed while it is read: one dense pass under the mask of the layout gives the same."""
    lm = lm_of(llama_4096, tiny_tokenizer, method=method, ratio=0.5, batch_size=2)
    text = told(300, 9)
    [found] = lm.loglikelihood_rolling([_Request((text,))], disable_tqdm=True)
    ids, expected, start = lm.tok_encode(text), 0.0, 0
    while start < len(ids):  # each token is scored once; the last window begins early enough to be full
        stop = min(start + 200, len(ids))
        first = max(stop - 200, 0) - 1
        fed = torch.tensor([[lm.prefix_token_id, *ids][first + 1 : stop]])
        if start:
            fed = torch.tensor([ids[first:stop]])[:, :-1]
        layout = make_layout(make_method(method, Fraction(1, 2), {}), fed.shape[1], 0, seed_of(fed[0]), RUNNING)
        llama_4096.set_attn_implementation("sdpa")
        with torch.no_grad():
            dense = llama_4096(fed, attention_mask=layout.mask[None, None], use_cache=False).logits[0]
        expected += answer(dense, ids[start:stop])[0]
        start = stop
    assert found == pytest.approx(expected, abs=1e-3)


class _Request:
    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args


def test_the_question_begins_where_the_rule_says(tiny_tokenizer: Any) -> None:
    def encode(text: str) -> list[int]:
        return list(tiny_tokenizer.encode(text))

    prompt = "Question: one? Answer: two. Question: three? Answer:"
    assert SplitRule.parse("none").tokens(prompt, encode) == 1
    assert SplitRule.parse("last:9").tokens(prompt, encode) == 9
    found = SplitRule.parse("regex:Question").tokens(prompt, encode)
    assert tiny_tokenizer.decode(encode(prompt)[-found:]).strip() == "Question: three? Answer:"
    assert SplitRule.parse("regex:$").tokens(prompt, encode) == 1  # at least the last token is read afterwards
    with pytest.raises(UserError, match="does not match the prompt that ends in"):
        SplitRule.parse("regex:Passage").tokens(prompt, encode)
    for wrong in ("last", "last:0", "last:-3", "last:x", "regex:", "regex:(", "first:3", ""):
        with pytest.raises(UserError, match="split rule"):
            SplitRule.parse(wrong)


def test_what_cannot_be_right_is_refused(llama_4096: Any, tiny_tokenizer: Any, tasks: list[dict[str, Any]]) -> None:
    for given, words in (
        ({"batch_size": "auto"}, "batch_size=auto"), ({"parallelize": True}, "several devices"),
        ({"mixed_precision_dtype": "bfloat16"}, "mixed precision"), ({"backend": "seq2seq"}, "decoders only"),
        ({"method": "snapvk"}, "snapkv"), ({"method": "snapkv"}, "without a ratio"),
        ({"method": "sentinel", "ratio": 0.5}, "needs an adapter"), ({"options": {"widow": 3}}, "option of full"),
        ({"method": "snapkv", "ratio": 0.5, "options": {"widow": 3}}, "widow"), ({"min_context": 0}, "min_context"),
        ({"method": "knorm", "ratio": 0.5, "budget_tokens": 9}, "Leave one of them out"),
    ):
        with pytest.raises(UserError, match=words):
            lm_of(llama_4096, tiny_tokenizer, **given)
    with pytest.raises(UserError, match="no model folder"):
        KVBenchLM("./nothing")
    lm = lm_of(llama_4096, tiny_tokenizer)
    with pytest.raises(UserError, match="request cache"):
        lm.set_cache_hook(type("Hook", (), {"dbdict": {}}))


@pytest.mark.parametrize("given", [
    {"batch_size": 0}, {"batch_size": "x"}, {"batch_size": -1}, {"split": "last:" + "9" * 5000},
    {"split": "regex:a{99999999999999999999}"}, {"ratio": ""}, {"ratio": 0.5}, {"budget_tokens": 40},
])
def test_wrong_arguments_are_sentences(llama_4096: Any, tiny_tokenizer: Any, given: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        lm_of(llama_4096, tiny_tokenizer, **given)  # a ratio without a method would be the full cache


def test_edges_of_requests(llama_4096: Any, tiny_tokenizer: Any) -> None:
    stock = HFLM(llama_4096, tokenizer=tiny_tokenizer, max_length=200)
    lm = lm_of(llama_4096, tiny_tokenizer, split="regex:bridge")
    text = told(300, 3)
    with pytest.raises(UserError, match="A continuation has"):
        lm._loglikelihood_tokens([(("a", text), [5], lm.tok_encode(text))], disable_tqdm=True)
    one, other = (
        lm._loglikelihood_tokens([(pair, *lm._encode_pair(*pair))], disable_tqdm=True)
        for pair in ((told(90, 2) + " The bridge? ", "nine"), (told(90, 2) + " The bridge?", " nine"))
    )
    assert one == other  # a blank before the answer is no part of the question
    asked = [_Request((text, {"until": ["~"], "max_gen_toks": 4, "do_sample": False})) for text in ("", "the bridge")]
    lm = lm_of(llama_4096, tiny_tokenizer, batch_size=2)
    stock.batch_size_per_gpu = 2
    assert lm.generate_until(asked, disable_tqdm=True) == stock.generate_until(asked, disable_tqdm=True)


def test_a_prefix_token_that_the_model_pads_with_is_text(
    llama_4096: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = HFLM(llama_4096, tokenizer=tiny_tokenizer, max_length=200)
    monkeypatch.setattr(llama_4096.generation_config, "pad_token_id", stock.prefix_token_id)
    asked = [_Request((told(150, 4),))]
    ours = lm_of(llama_4096, tiny_tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours == pytest.approx(stock.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-6)


def test_what_a_failed_evaluation_counted_is_forgotten(llama_4096: Any, tiny_tokenizer: Any) -> None:
    lm = lm_of(llama_4096, tiny_tokenizer, method="knorm", ratio=0.5)
    beams = {"until": ["~"], "max_gen_toks": 4, "num_beams": 2}
    with pytest.raises(UserError, match="beams"):
        lm.generate_until([_Request((told(120, 1), beams))], disable_tqdm=True)
    lm.loglikelihood_rolling([_Request((told(60, 1),))], disable_tqdm=True)
    assert lm.get_model_info()["kvbench"]["requests"] == 1


def test_rows_are_read_apart_where_rotations_depend_on_their_length(tiny_tokenizer: Any) -> None:
    model: Any = zoo_model(
        "llama", vocab_size=4100, max_position_embeddings=128,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    settings = {"until": ["~"], "max_gen_toks": 4, "do_sample": False}
    asked = [_Request((told(n, n), settings)) for n in (60, 70, 60)]
    one, four = (
        KVBenchLM(model, tokenizer=tiny_tokenizer, method="knorm", ratio=0.5, batch_size=n, max_length=120)
        for n in (1, 4)
    )
    assert one.generate_until(asked, disable_tqdm=True) == four.generate_until(asked, disable_tqdm=True)


def test_counts_begin_anew_with_every_evaluation(
    llama_4096: Any, tiny_tokenizer: Any, tasks: list[dict[str, Any]]
) -> None:
    lm = lm_of(llama_4096, tiny_tokenizer, method="knorm", ratio=0.5)
    first, second = (evaluated(lm, tasks[:1])["config"]["kvbench"] for _ in range(2))
    assert first == second
    assert (first["requests"], first["compressed"]) == (16, 12)
    assert lm.get_model_info()["kvbench"] == second
    assert evaluated(lm, tasks[1:2])["config"]["kvbench"]["requests"] == 4


def test_the_command_passes_on_what_is_not_its_own(
    called: Call, tasks: list[dict[str, Any]], tmp_path: Path
) -> None:
    folder = Path(tasks[0]["dataset_kwargs"]["cache_dir"]).parent / "yaml"
    folder.mkdir()
    for task in tasks:
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    asked: list[str | Path] = ["lm-eval", "--include_path", folder, "--ratio", "0.5"]
    refused(called, ["lm-eval", "--ratio", "0.5"], "No task is named")
    refused(called, [*asked, "--tasks", "choice", "--use_cache", "x"], "request cache", "--use_cache")
    refused(called, [*asked, "--tasks", "choice", "--method", "snapvk"], "snapkv")
    refused(called, [*asked, "--tasks", "choice", "--limt", "2"], "--limt")
    refused(called, [*asked, "--tasks", "choice", "--metadata", "{bad"], "Invalid JSON")
    refused(called, [*asked, "--tasks", "choice", "--output_path", "/proc/x/y"], "cannot be written")
    refused(called, [*asked, "--tasks", "choice", "--budget-tokens", "9"], "Leave one of them out")
    found = called([*asked, "--tasks", "choice,written", "--method", "snapkv:window=8", "--split", "last:4",
                    "--limit", "2", "--output_path", tmp_path / "out.json", "--threads", "1"])
    assert found.code == 0, found.err
    assert "'split': 'last:4'" in found.out
    assert "5 of 10 requests were compressed; realised ratio 0.496" in found.err
    [path] = tmp_path.glob("out*.json")
    info = json.loads(path.read_text())["config"]["kvbench"]
    assert (info["method"], info["options"]["window"], info["ratio"], info["requests"]) == ("snapkv", "8", "0.5", 10)


def test_without_the_harness_the_line_that_installs_it_is_named(
    called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "kvbench.integrations.lm_eval")
    with pytest.raises(ImportError, match=r"pip install 'kvbench\[lm-eval\]'"):
        importlib.import_module("kvbench.integrations.lm_eval")
    refused(called, ["lm-eval", "--tasks", "choice"], "not installed", "pip install 'kvbench[lm-eval]'")
