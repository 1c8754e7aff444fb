"""Models that are not what the two executions assume: the number of their own forward pass, or a refusal by name."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kvbench.cache.shape import cache_shape
from kvbench.data.documents import embedded_documents
from kvbench.errors import UserError
from kvbench.execution.channel import Channel
from kvbench.execution.job import Job, Order
from kvbench.execution.worker import Worker
from kvbench.inference.generation import greedy
from kvbench.inference.opening import Text, open_session
from kvbench.inference.opening import prepared as model_prepared
from kvbench.inference.policy_session import PolicySession
from kvbench.judges.fluency import Scorer
from kvbench.methods import make_method
from kvbench.methods.policies.knorm import KNorm
from kvbench.models.attention import register
from kvbench.models.facts import ModelFacts
from kvbench.models.rope import find_rotations, fixed_rotations, inv_freq_by_layer, rotated
from kvbench.planning.quality import Request, build_plan
from kvbench.probe import cached, probing
from kvbench.probe.masks import attention_span
from kvbench.probe.probing import examine
from kvbench.protocols.pieces import Piece
from kvbench.protocols.scoring import BatchScore, score_pieces
from kvbench.store.folder import RunFolder
from tests.helpers.command import Outcome
from tests.helpers.records import CELL, record
from tests.helpers.sessions import texts
from tests.helpers.zoo import zoo_model, zoo_text

Call = Callable[..., Outcome]
N = 16
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 100, "factor": 5.0,
        "long_factor": [1.0 + i / 7 for i in range(8)], "short_factor": [1.0] * 8}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
BY_LENGTH = {
    "longrope": {"rope_parameters": LONG}, "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 100},
}
"""The same Llama, with rotations that depend on how long the text is."""


def own_nll(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats of every token but the first, by a plain loop over transformers' own forward pass."""
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="none").double()


def piece_of(ids: Tensor, context: int | None = None, scored: int = 1) -> Piece:
    return Piece("text", tuple(ids[0].tolist()), context or ids.shape[1], scored, 0, 3)


def scored(model: nn.Module, ids: Tensor, method: str, ratio: str = "0", execution: str = "streamed", **options: str,
           ) -> BatchScore:
    made, piece = make_method(method, Fraction(ratio), options), piece_of(ids)
    return score_pieces(model, made, [piece], execution=execution)[0]


@pytest.fixture(params=list(BY_LENGTH))
def stretching(request: pytest.FixtureRequest) -> tuple[nn.Module, Callable[[], nn.Module]]:
    """A model whose rotations depend on the length of the text, and a way to have it anew, nothing remembered."""
    more = BY_LENGTH[str(request.param)]
    return zoo_model("llama", register(), **more), lambda: zoo_model("llama", **more)


def test_rotations_are_those_of_the_whole_text(stretching: tuple[nn.Module, Callable[[], nn.Module]]) -> None:
    """Longer and shorter texts in any order, in both executions, under a policy: the same nats as in transformers."""
    model, anew = stretching
    for length in (180, 60, 100, 101, 240, 99):
        ids = zoo_text(length, length)
        own = own_nll(anew(), ids)
        ways = (("full", "streamed"), ("full", "onepass"), ("h2o", "streamed"), ("sinks", "streamed"))
        for method, execution in ways:
            found = scored(model, ids, method, execution=execution).nll[0]
            assert float((found - own).abs().max()) < 1e-4, (method, execution, length)


def test_what_follows_a_prefix_has_its_rotations_too(stretching: tuple[nn.Module, Callable[[], nn.Module]]) -> None:
    model, anew = stretching
    ids = zoo_text(150, 2)
    own = own_nll(anew(), ids)[79:]
    piece = piece_of(ids, 80, 80)
    for name in ("full", "knorm"):
        found, _ = score_pieces(model, make_method(name, Fraction(0)), [piece])
        assert float((found.nll[0] - own).abs().max()) < 1e-4


def test_texts_are_written_with_the_rotations_of_the_whole_text(
    stretching: tuple[nn.Module, Callable[[], nn.Module]]
) -> None:
    """Each word is the most probable one after all before it, in a pass that knows how long the text will be."""
    model, anew = stretching
    ids, new = zoo_text(90, 4), 20
    with torch.inference_mode(), model_prepared(model, None, 110):
        session = open_session(model, make_method("full", Fraction(0)), Text(90, 110, (0,)))
        written = texts(session, ids, greedy(1, new))
    whole, other = torch.cat([ids, written], 1), anew()
    with torch.inference_mode():
        wanted = other(input_ids=whole, use_cache=False).logits[0, 89:-1].argmax(-1)
    assert torch.equal(written[0], wanted)


def test_turned_keys_turn_by_the_rotations_of_the_whole_text() -> None:
    model = zoo_model("llama", register(), **BY_LENGTH["longrope"])
    speeds = []
    for length in (50, 200):
        with fixed_rotations(model, length):
            found = inv_freq_by_layer(model)
            assert found is not None
            assert found[0] is not None
            speeds.append(found[0].clone())
    assert torch.allclose(speeds[0] / speeds[1], torch.tensor(LONG["long_factor"]))


def test_a_scorer_does_not_depend_on_what_it_scores_beside(tiny_tokenizer: Any) -> None:
    """Texts of different lengths side by side; each as if it were alone, and as a plain loop has it."""
    more = {"vocab_size": 4096, "rope_parameters": {**LONG, "original_max_position_embeddings": 30}}
    model = zoo_model("llama", register(), **more)
    words = embedded_documents()[0].text.split()
    pairs = [(" ".join(words[:n]), " " + " ".join(words[n : n + 8])) for n in (4, 12, 40, 41)]
    scorer = Scorer(model, tiny_tokenizer, 512)
    for pair, found in zip(pairs, scorer.score(pairs), strict=True):
        whole = torch.tensor([tiny_tokenizer("".join(pair)).input_ids])
        first = len(tiny_tokenizer(pair[0]).input_ids)
        own = own_nll(zoo_model("llama", **more), whole)[first - 1 :]
        assert found.nll == pytest.approx(float(own.sum()), abs=1e-3)


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_where_nothing_is_turned_positions_change_nothing(kind: str) -> None:
    """Without rotations in any layer; with them, they do."""
    more: dict[str, Any] = {"no_rope_layers": [0] * 4} if kind == "smollm3" else {}
    model, ids = zoo_model(kind, register(), **more), zoo_text(120)
    one, other = (
        scored(model, ids, "streaming-llm", "0.8", positions=p, step="8").nll for p in ("cache", "absolute")
    )
    assert torch.equal(one, other) is (kind == "smollm3")
    near, far = (scored(model, ids, "expected-attention", "0.8", future=f, step="8").nll for f in ("1", "64"))
    assert torch.equal(near, far) is (kind == "smollm3")
    both = [scored(model, ids, "cascading", "0.8", positions=p, step="8").nll for p in ("cache", "absolute")]
    assert torch.equal(*both) is (kind == "smollm3")
    pooled = [scored(model, ids, "meanpool", "0.8", merge_at=m).nll for m in ("rotated", "unrotated")]
    assert torch.allclose(*pooled, atol=1e-5) is (kind == "smollm3")


@pytest.mark.parametrize("kind", ["smollm3", "exaone4", "gemma3_text", "gpt_neox"])
def test_each_layer_is_turned_by_its_own_rotation(kind: str) -> None:
    """Keys of a token alone at one place, turned, are its keys at another, in a cache of transformers."""
    model = zoo_model(kind, register())
    speeds, caches = inv_freq_by_layer(model), [DynamicCache(), DynamicCache()]
    with torch.inference_mode():
        for cache, place in zip(caches, (2, 31), strict=True):
            model(input_ids=torch.tensor([[5]]), position_ids=torch.tensor([[place]]), past_key_values=cache)
    assert speeds is not None
    assert kind != "smollm3" or [speed is None for speed in speeds] == [False, False, False, True]
    for speed, here, there in zip(speeds, *(cache.layers for cache in caches), strict=True):
        angle = 29 * (torch.zeros(1) if speed is None else speed)[None]
        assert float((rotated(here.keys, angle.cos(), angle.sin()) - there.keys).abs().max()) < 1e-4


def test_a_way_of_turning_that_is_not_known_is_refused() -> None:
    """Pairs of neighbours (Cohere), queries scaled by their place (Llama 4)."""
    for kind in ("cohere", "llama4_text"):
        with pytest.raises(UserError, match="turns its keys in a way that cannot be undone here"):
            inv_freq_by_layer(zoo_model(kind, register()))


def test_models_that_need_ids_are_fed_ids() -> None:
    """Embeddings per layer are looked up by id: every method that feeds text alone reads as the model does."""
    model, ids = zoo_model("gemma3n_text", register()), zoo_text(90)
    own, facts = own_nll(zoo_model("gemma3n_text"), ids), examine(model, zoo_text(48))
    assert facts.needs_ids
    assert facts.mark == "|input:ids"
    for method, execution in (("full", "streamed"), ("full", "onepass"), ("h2o", "streamed"), ("window", "streamed")):
        assert float((scored(model, ids, method, execution=execution).nll[0] - own).abs().max()) < 1e-4
    with pytest.raises(UserError, match="the special tokens of sentinel have none"):
        facts.check_embeddings("gemma3n", "sentinel")


@pytest.mark.parametrize("kind", ["deepseek_v3", "gemma4_text", "llama"])
def test_budgets_in_bytes_are_of_what_is_cached(kind: str) -> None:
    """Latents, layers with heads of different width: what is held after reading takes no more than was given."""
    more: dict[str, Any] = {"global_head_dim": 32} if kind == "gemma4_text" else {}
    model, ids, cache = zoo_model(kind, register(), **more), zoo_text(100), DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=cache)
    per_entry = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / 100
    shape = cache_shape(model)
    assert shape.entry_bytes == per_entry
    given = int(per_entry * 30.5)
    made = make_method("window", Fraction(0), {"budget_bytes": str(given)})
    score, _ = score_pieces(model, made, [piece_of(ids)])
    assert 0.9 * given < score.logical <= given
    assert score.full == 100 * per_entry
    for name in () if kind == "deepseek_v3" else ("knorm", "kivi"):
        made = make_method(name, Fraction(0), {"budget_bytes": str(given)})
        assert 0.6 * given < score_pieces(model, made, [piece_of(ids)])[0].logical <= given


def test_attention_of_the_plain_code_is_computed_here() -> None:
    """Capped logits and learned sinks, in blocks of queries and with stored entries, masked or not."""
    for kind in ("gemma2", "gpt_oss"):
        ids, model = zoo_text(120), zoo_model(kind, register())
        own = own_nll(zoo_model(kind), ids)
        for execution in ("streamed", "onepass"):
            assert float((scored(model, ids, "full", execution=execution).nll[0] - own).abs().max()) < 1e-4
        masked = scored(model, ids, "sinks", "0.6", execution="onepass").nll
        assert float((scored(model, ids, "sinks", "0.6").nll - masked).abs().max()) < 1e-4


def test_the_sight_of_a_layer_is_read_off_its_mask() -> None:
    from transformers.masking_utils import causal_mask_function, chunked_causal_mask_function
    from transformers.masking_utils import sliding_window_causal_mask_function as sliding

    chunked = chunked_causal_mask_function(48, torch.zeros(1, dtype=torch.long))
    assert attention_span([causal_mask_function], 1 << 16) is None
    assert attention_span([causal_mask_function, sliding(100)], 1 << 16) == 100
    assert attention_span([chunked, sliding(1000)], 1 << 16) == 48
    assert attention_span([sliding(1 << 20)], 1 << 16) is None


def run(called: Call, folder: Path, *more: str) -> Outcome:
    return called(["run", "--model", folder, "--task", "minidocs", "--limit", "2", "--no-baselines", "--json",
                   "--threads", "1", "--out", "out", *more])


def prepared(folder: Path, *methods: str, block: int = 256, ratio: str = "0.5") -> Worker:
    """What a process does before it says that it is ready, in this one.

    Raises:
        UserError: it refuses; nothing has been written.
    """
    request = Request(
        model=str(folder), revision=None, adapters=(), methods=methods, ratios=(ratio,), tasks=("minidocs",),
        data=None, protocol=None, execution="streamed", limit=2, seed=0, options={"block": str(block)}, out=None,
        reports=Path("reports"), baselines=False, device="cpu", dtype="float32", threads=1,
    )
    plan = build_plan(request)
    job = Job(plan.cells, plan.model.location, plan.task_files, None, 2, 1)
    worker = Worker(job, Channel(io.StringIO()))
    worker.prepare()
    return worker


def perplexity_of(worker: Worker, method: str = "full") -> float:
    """Of what a process measures of the first two embedded documents."""
    (work,) = worker.works
    worker.run(Order(work.name, tuple(document.id for document, _ in work.documents), {}))
    (key,) = [cell.key for cell in work.cells if cell.method == method]
    assert isinstance(worker.channel.events, io.StringIO)
    events = [json.loads(line) for line in worker.channel.events.getvalue().splitlines()]
    mine = [event for event in events if event["event"] == "records" and event["cell"] == key]
    records = [record for event in mine for record in event["records"]]
    return math.exp(sum(r["nll"] for r in records) / sum(r["tokens"] for r in records))


@pytest.mark.parametrize(("kind", "more", "words", "arguments"), [
    ("llama4_text", {"attention_chunk_size": 64}, "attention_chunk_size 64", ["--method", "full"]),
    ("mistral", {"sliding_window": 64}, "sliding_window 64", ["--method", "full"]),
    ("bert", {"is_decoder": False}, "attends tokens that come later (is_decoder: false)", ["--method", "full"]),
    ("diffllama", {}, "attention is computed 2 times", ["--method", "h2o"]),
    ("lfm2", {}, "in some of its layers (conv)", ["--method", "full"]),
    ("granitemoehybrid", {}, "in some of its layers (linear_attention)", ["--method", "full"]),
    ("bloom", {}, "in a way of its own (bloom)", ["--method", "full"]),
    ("cohere", {}, "turns its keys", ["--method", "streaming-llm", "--ratio", "0.5"]),
])
def test_what_cannot_be_right_is_refused_before_anything_is_written(
    zoo_folder: Callable[..., Path], kind: str, more: dict[str, Any], words: str, arguments: list[str]
) -> None:
    methods = [name for name in arguments if not name.startswith("-") and not name[0].isdigit()]
    with pytest.raises(UserError, match=re.escape(words)) as refusal:
        prepared(zoo_folder(kind, **more), *methods)
    assert refusal.value.exit_code == 2


@pytest.mark.heavy
def test_a_refusal_is_a_sentence_of_the_command(called: Call, zoo_folder: Callable[..., Path]) -> None:
    for kind, words in (("bert", "attends tokens that come later"), ("lfm2", "(conv)")):
        found = run(called, zoo_folder(kind), "--method", "full", "--set", "block=64")
        assert found.code == 2, found.err
        assert words in found.err
        assert "Traceback" not in found.err
        assert not Path("out").exists()


def test_what_is_not_used_is_not_refused(zoo_folder: Callable[..., Path]) -> None:
    """A window in the configuration that no layer has; a window as long as the text; capped logits; learned sinks."""
    for kind, more in (
        ("qwen2", {"sliding_window": 32, "use_sliding_window": False}), ("gpt_oss", {}), ("gemma2", {}),
        ("llama4_text", {"attention_chunk_size": 128}),
    ):
        folder = zoo_folder(kind, **more)
        found = perplexity_of(prepared(folder, "full", block=128))
        assert found == pytest.approx(plain_perplexity(folder, 128), rel=1e-4)


def plain_perplexity(folder: Path, block: int) -> float:
    """By a loop over blocks of the first two embedded documents, with transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    total, count = 0.0, 0
    for document in embedded_documents()[:2]:
        ids = tokenizer(document.text).input_ids
        for start in range(0, len(ids), block):
            part = torch.tensor([ids[start : start + block]])
            if part.shape[1] >= 32:
                nll = own_nll(model, part)
                total, count = total + float(nll.sum()), count + len(nll)
    return math.exp(total / count)


@pytest.mark.heavy
def test_rotations_by_length_in_the_command(called: Call, zoo_folder: Callable[..., Path]) -> None:
    """The perplexity of transformers' own forward pass; the signature and the manifest say how."""
    folder = zoo_folder("llama", rope_parameters=LONG)
    found = run(called, folder, "--method", "full", "--set", "block=192")
    (row,) = [row for row in found.document["rows"] if row["metric"] == "ppl"]
    assert row["value"] == pytest.approx(plain_perplexity(folder, 192), rel=1e-4)
    assert "|rope:longrope by length of the text|" in row["signature"]
    probe = json.loads(Path("out/run.json").read_text())["probes"][str(folder)]
    assert probe["refusal"] == ""
    assert probe["compared_tokens"] == 192
    assert probe["compared_apart"] < 1e-4


@pytest.mark.heavy
def test_a_model_that_was_never_probed_is_not_reprinted(called: Call, zoo_folder: Callable[..., Path]) -> None:
    """A folder of 0.1: its records are kept where the signature is the same, and measured again where it is not."""
    folder = zoo_folder("smollm3")
    run(called, folder, "--method", "full", "--set", "block=64")
    path = Path("out/run.json")
    first = json.loads(path.read_text())
    (records,) = Path("out").glob("cells/*/records.jsonl")
    kept = records.read_bytes()
    again = run(called, folder, "--method", "full", "--set", "block=64")
    assert "Already measured" in again.err
    old = {key: value for key, value in first.items() if key != "probes"}
    path.write_text(json.dumps(old))
    (records.parent / "signature.txt").unlink()
    again = run(called, folder, "--method", "full", "--set", "block=64")
    assert "Already measured" not in again.err
    assert records.read_bytes() == kept
    (task,) = old["tasks"].values()
    task["signature"] = task["signature"].replace("|rope:by layer", "")
    path.write_text(json.dumps(old))
    (records.parent / "signature.txt").unlink()
    damaged = [dict(json.loads(line), nll=1.0) for line in kept.decode().splitlines()]
    records.write_text("".join(json.dumps(record) + "\n" for record in damaged))
    again = run(called, folder, "--method", "full", "--set", "block=64")
    assert again.document["rows"][0]["value"] == pytest.approx(
        next(row["value"] for row in json.loads(Path("out/results.json").read_text())["rows"])
    )
    assert all(json.loads(line)["nll"] != 1.0 for line in records.read_text().splitlines())


def test_a_model_that_also_reads_other_things_is_read_as_text(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any
) -> None:
    """Sizes lie in ``text_config``: Gemma 3 with its tower of vision."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.Gemma3Config(
        text_config={"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 512,
                     "max_position_embeddings": 512, "initializer_range": 0.1},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=4000, boi_token_index=4001, eoi_token_index=4002,
    )
    folder = tmp_path_factory.mktemp("gemma3")
    hf.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    worker = prepared(folder, "knorm", block=128)
    assert perplexity_of(worker) == pytest.approx(plain_perplexity(folder, 128), rel=1e-4)


def test_a_configuration_without_a_causal_model_is_refused_with_the_true_reason(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.save_pretrained(tmp_path)
    for kind, words in (("vit", "(ViTConfig)"), ("nothing-like-it", "(nothing-like-it)")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "num_attention_heads": 2}))
        with pytest.raises(UserError, match=re.escape(words)) as refusal:
            prepared(tmp_path, "full")
        assert "damaged" not in str(refusal.value)


def test_facts_are_kept_by_fingerprint_and_versions(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    from kvbench.models.loading import Loaded

    loaded = Loaded(zoo_model("llama", register(), vocab_size=4096), tiny_tokenizer, 512, 4096)
    asked: Iterator[ModelFacts] = iter([ModelFacts("first"), ModelFacts("second"), ModelFacts("third")])
    monkeypatch.setattr(cached, "examine", lambda *_: next(asked))
    assert [cached.probed(loaded, print_).kind for print_ in ("a", "a", "b", "a", "")] == [
        "first", "first", "second", "first", "third",
    ]
    monkeypatch.setattr(cached, "PROBE", cached.PROBE + 1)
    monkeypatch.setattr(cached, "examine", lambda *_: ModelFacts("fourth"))
    assert cached.probed(loaded, "a").kind == "fourth"


def test_a_policy_sees_a_layer_once(llama: nn.Module) -> None:
    """What the probe compares is there: a cache that gives other values than it stores is found."""

    cache, heard = probing._Noting(), []
    reading = PolicySession(llama, KNorm(), 40, (0,))
    reading.cache = cache
    with probing._heard(heard.append), torch.inference_mode():
        list(reading.prefill(zoo_text(40)))
    assert probing._uncached(cache, heard) == ""
    layer, keys, values = cache.given[3]
    cache.given[3] = (layer, keys, values + 1)
    assert probing._uncached(cache, heard) == f"layer {layer} caches other values than it attends"


def test_queries_that_are_scaled_by_their_place_have_it_after_removal() -> None:
    """Llama 4 asks the cache where it is: masked and removed are equal, and ratio 0 is the model's own."""
    more = {"attn_temperature_tuning": True, "floor_scale": 60, "attn_scale": 1.0}
    model, ids = zoo_model("llama4_text", register(), **more), zoo_text(300)
    own = own_nll(zoo_model("llama4_text", **more), ids)
    assert float((scored(model, ids, "full").nll[0] - own).abs().max()) < 1e-4
    for name in ("sinks", "window", "scattered"):
        masked = scored(model, ids, name, "0.8", execution="onepass").nll
        assert float((scored(model, ids, name, "0.8").nll - masked).abs().max()) < 1e-4


@pytest.mark.parametrize("kind", ["deepseek_v2", "llama4_text"])
def test_rotations_as_complex_numbers_are_fixed_too(kind: str) -> None:
    more: dict[str, Any] = {"rope_parameters": DYNAMIC, "max_position_embeddings": 100}
    model, ids = zoo_model(kind, register(), **more), zoo_text(240)
    own = own_nll(zoo_model(kind, **more), ids)
    assert float((scored(model, ids, "full").nll[0] - own).abs().max()) < 1e-4
    assert "rope:dynamic" in examine(model, zoo_text(48)).mark


def test_rotations_that_cannot_be_fixed_are_refused() -> None:
    """PhiMoE scales by the places of what is read, beside its frequencies."""
    long = {**LONG, "short_mscale": 1.1, "long_mscale": 1.3}
    model = zoo_model("phimoe", register(), rope_parameters=long)
    assert "goes by the length" in examine(model, zoo_text(48)).refusal


def test_layers_whose_rotations_coincide_in_short_texts_are_told_apart_in_long_ones() -> None:
    kinds = {"full_attention": LONG, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = zoo_model(
        "gemma3_text", register(), rope_parameters=kinds, layer_types=["full_attention", "sliding_attention"] * 2
    )
    for length, alike in ((60, True), (200, False)):
        with fixed_rotations(model, length):
            first, second, *_ = inv_freq_by_layer(model) or ()
            assert first is not None
            assert second is not None
            assert torch.allclose(first, second) is alike


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss", "cohere2", "olmo3", "llama4_text", "qwen2_moe"])
def test_a_window_that_no_layer_has_is_no_bound(kind: str) -> None:
    setting = "attention_chunk_size" if kind == "llama4_text" else "sliding_window"
    model = zoo_model(kind, register(), layer_types=["full_attention"] * 4, **{setting: 20})
    facts = examine(model, zoo_text(48))
    assert facts.window is None
    assert not facts.refusal


def test_a_short_window_hides_nothing_else() -> None:
    facts = examine(zoo_model("gemma2", register(), sliding_window=20), zoo_text(48))
    assert facts.window == 20
    assert "caps the logits" in facts.policy_refusal
    facts = examine(zoo_model("gemma3n_text", register(), sliding_window=20, layer_types=["sliding_attention"] * 4),
                    zoo_text(48))
    assert facts.window == 20
    assert facts.needs_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_faint_is_seen_in_any_precision(dtype: torch.dtype) -> None:
    """An encoder with small weights; a mask that a model makes for itself."""
    encoder = zoo_model("bert", register(), initializer_range=0.02).to(dtype)
    assert "come later" in examine(encoder, zoo_text(48)).forward_refusal
    assert "masks of their own" in examine(zoo_model("doge", register()).to(dtype), zoo_text(48)).policy_refusal


def test_facts_of_another_kind_are_not_believed() -> None:
    whole = ModelFacts("Model").as_dict()
    assert ModelFacts.load({**whole, "window": 64}).window == 64
    for name, value in (("window", "x"), ("mark", None), ("needs_ids", 1), ("more", 1)):
        with pytest.raises(TypeError):
            ModelFacts.load({**whole, name: value})


def test_records_of_another_signature_are_laid_aside(tmp_path: Path) -> None:
    """And taken up again: nothing is lost, whichever limit or version is asked for in between."""
    for signature, names, added in (
        ("v:1", [], "a"), ("v:2", [], "b"), ("v:1", ["a"], "c"), ("v:2", ["b"], "d"), ("v:1", ["a", "c"], "e"),
    ):
        folder = RunFolder(tmp_path)
        folder.open_cell(CELL, signature)
        assert list(folder.records(CELL)) == names
        folder.append(CELL, [record(added)])


YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotations_that_differ_little_are_told_apart_in_any_precision(dtype: torch.dtype) -> None:
    """Olmo 3 stretches the rotation of the layers that see all, not of the others; near by both are nearly one."""
    model = zoo_model(
        "olmo3", register(), head_dim=32, num_hidden_layers=2, sliding_window=4096, max_position_embeddings=65536,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5e5}},
    ).to(dtype)
    buffers = dict(model.named_buffers())
    wanted = [next(t for name, t in buffers.items() if name.endswith(f"{kind}_inv_freq") and "original" not in name)
              for kind in ("sliding_attention", "full_attention")]
    assert not torch.allclose(wanted[0], wanted[1])
    found = inv_freq_by_layer(model)
    assert found is not None
    for one, other in zip(found, wanted, strict=True):
        assert one is not None
        assert torch.equal(one, other.float())
    if dtype != torch.float16:
        assert "rope:by layer" in examine(model, zoo_text(48)).mark


def test_a_large_coordinate_hides_no_rotation() -> None:
    """Qwen 2 has large biases in its slowest coordinates, beside which all others are small."""
    model: Any = zoo_model(
        "qwen2", register(), max_position_embeddings=4096, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    )
    for layer in model.model.layers:
        for bias in (layer.self_attn.k_proj.bias, layer.self_attn.q_proj.bias):
            bias.data.zero_()
            bias.data.view(-1, 16)[:, [7, 15]] = torch.tensor([60.0, 30.0])
    found, wanted = inv_freq_by_layer(model.to(torch.bfloat16)), model.model.rotary_emb.inv_freq.float()
    assert found is not None
    assert all(speeds is not None and torch.equal(speeds, wanted) for speeds in found)


def test_queries_that_are_scaled_far_away_are_seen() -> None:
    """Ministral 3 scales them from a place on that a short look does not reach."""
    model = zoo_model("ministral3", register(), max_position_embeddings=2048, rope_parameters={
        **YARN, "rope_theta": 1e4, "original_max_position_embeddings": 1500, "llama_4_scaling_beta": 0.5})
    with pytest.raises(UserError, match="turns its keys in a way that cannot be undone"):
        inv_freq_by_layer(model)


def test_embeddings_that_are_looked_up_again_are_seen() -> None:
    """Gemma 4 finds out whose embeddings it was given: those of special tokens are nobody's."""
    model = zoo_model("gemma4_text", register(), sliding_window=4096, vocab_size_per_layer_input=zoo_model(
        "gemma4_text").config.vocab_size)
    facts = examine(model, zoo_text(48))
    assert not facts.refusal
    assert facts.needs_ids
    with pytest.raises(UserError, match="looks more up by token id"):
        facts.check_embeddings("here", "sentinel")


@pytest.mark.parametrize("kind", ["flint", "mimo_v2_flash", "granite_swa", "llama", "smollm3", "gemma3_text"])
def test_half_precision_finds_the_rotations_of_whole_precision(kind: str) -> None:
    """Though deep layers are not twice the same in it, where sinks take part in what a single token attends."""
    whole, half = zoo_model(kind, register()), zoo_model(kind, register())
    for module in half.modules():  # as models are loaded: weights are rounded, inv_freq_by_layer are not
        module._parameters = {name: None if p is None else nn.Parameter(p.to(torch.bfloat16), requires_grad=False)
                              for name, p in module._parameters.items()}
    assert find_rotations(half).layers == find_rotations(whole).layers
    assert None not in find_rotations(whole).layers


def test_looking_far_changes_no_rotation_that_goes_by_length() -> None:
    model = zoo_model("llama", register(), rope_parameters=LONG)
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    found = find_rotations(model)
    assert None not in found.layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
