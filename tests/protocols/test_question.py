"""Recall with the question hidden and known: what a policy has seen, and both side by side in all that is printed."""

from __future__ import annotations

import json
from copy import deepcopy
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn

from kvbench.inference.policy_session import PolicySession
from kvbench.methods import METHODS, kept, make_method
from kvbench.methods.policies.policy import CachePolicy
from kvbench.protocols.pieces import Piece
from kvbench.protocols.scoring import score_pieces
from kvbench.reporting.tables.format import reading_note
from kvbench.store.rows import Row
from tests.helpers.command import Call
from tests.helpers.models import VOCABULARY
from tests.helpers.policies import POLICIES


def piece_of(n: int, context: int, ahead: int = 1, seed: int = 0) -> Piece:
    ids = torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Piece("d", tuple(ids), context, context + 1, 0, seed, ahead=ahead)


@torch.inference_mode()
@pytest.mark.parametrize("name", POLICIES)
def test_nothing_removed_is_the_full_cache_though_the_question_was_looked_at(llama: nn.Module, name: str) -> None:
    if name in ("kivi", "fp8", "think", "lorc"):
        pytest.skip("not exact at any ratio, or has none at 0")
    pieces = [piece_of(90, 80, seed=seed) for seed in (0, 1)]
    expected, found = (
        score_pieces(llama, make_method(method, Fraction(0)), pieces, chunk=16)[0] for method in ("full", name)
    )
    assert (found.nll - expected.nll).abs().max() < 1e-4
    assert found.held == 80
    assert (found.full, found.queries) == (expected.full, expected.queries)


@torch.inference_mode()
@pytest.mark.parametrize("name", POLICIES)
def test_a_known_question_takes_no_place(llama: nn.Module, name: str) -> None:
    ratio, options = "0.2" if name == "think" else "0.4", {"window": "8"} if "window" in METHODS[name].options() else {}
    policy = make_method(name, Fraction(ratio), options)
    assert isinstance(policy, CachePolicy)
    found = [score_pieces(llama, policy, [piece_of(90, 80, ahead)], chunk=16)[0] for ahead in (0, 1)]
    assert found[0].held == found[1].held
    assert found[0].visible == pytest.approx(found[1].visible)
    assert bool(torch.equal(found[0].nll, found[1].nll)) or policy.observes


def attention_of(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    """The model's own attention ``[query heads, n, n]`` by layer, of one plain pass."""
    import transformers as hf

    plain = hf.AutoModelForCausalLM.from_config(deepcopy(model.config), attn_implementation="eager")
    plain.load_state_dict(model.state_dict())
    out = plain.eval()(ids, output_attentions=True)
    return [layer[0].double() for layer in out.attentions]


@torch.inference_mode()
def test_snapkv_chooses_by_the_queries_of_the_whole_question(llama: nn.Module) -> None:
    """Against a loop over the attention of one plain pass: the last token's query counts, its entry does not."""
    piece, window, n = piece_of(50, 40), 4, 40
    options = {"window": str(window), "kernel": "1"}
    policy = make_method("snapkv", Fraction("0.5"), options)
    assert isinstance(policy, CachePolicy)
    ids = torch.tensor([piece.ids])
    runs = [PolicySession(llama, policy, n, [0], chunk=16) for _ in range(2)]
    for run, ahead in zip(runs, (ids[:, n : n + 1], None), strict=True):
        list(run.prefill(ids[:, :n], n, ahead))
    differs = False
    for number, attention in enumerate(attention_of(llama, ids[:, : n + 1])):
        heads = runs[0].cache.layers[number].positions.shape[1]
        for head in range(heads):
            group = attention.shape[0] // heads
            worth = torch.zeros(n, dtype=torch.float64)
            for query_head in range(head * group, (head + 1) * group):
                for query in range(n + 1 - window, n + 1):
                    row = attention[query_head, query, :n]
                    worth += row / row.sum()
            worth[n - window :] = float("inf")
            best = sorted(worth.topk(kept(n, Fraction("0.5"))).indices.tolist())
            assert runs[0].cache.layers[number].positions[0, head].tolist() == best
            differs |= runs[1].cache.layers[number].positions[0, head].tolist() != best
    assert differs  # without the last query other entries stay


@torch.inference_mode()
def test_the_whole_answer_is_predicted_from_what_is_left(llama: nn.Module) -> None:
    """What the context was before it was compressed does not reach the first token of the answer either."""
    policy = make_method("knorm", Fraction("0.8"))
    assert isinstance(policy, CachePolicy)
    piece = piece_of(90, 80)
    ids = torch.tensor([piece.ids])
    run = PolicySession(llama, policy, 80, [0], chunk=16)
    list(run.prefill(ids[:, :80], 80))
    expected = run.feed(ids[:, 80:-1])[0].double().log_softmax(-1)
    found = score_pieces(llama, policy, [piece], chunk=16)[0]
    nll = -expected.gather(-1, ids[0, 81:, None])[:, 0]
    assert found.nll[0].tolist() == pytest.approx(nll.tolist(), abs=1e-5)
    plain = llama(ids).logits[0, 80].double().log_softmax(-1)[ids[0, 81]]
    assert abs(float(found.nll[0, 0] + plain)) > 1e-3


# --- the command ---------------------------------------------------------------------------------------------------

COMMAND = ["run", "--task", "recall", "--method", "snapkv", "--method", "window", "--ratio", "0.8", "--no-baselines",
           "--limit", "3", "--out", "run"]


def test_the_hidden_question_keeps_its_keys(called: Call) -> None:
    """Keys of cells as kvbench 0.1 made them."""
    plan = called(["run", "--task", "recall", "--method", "window", "--ratio", "0.5", "--dry-run", "--json"]).document
    hidden = {cell["method"]: cell["key"] for cell in plan["cells"] if "question" not in cell["options"]}
    assert {name: hidden[name] for name in ("full", "sinks", "window")} == {
        "full": "d40b914541b5", "sinks": "8a746ecedbda", "window": "55515c21dd29",
    }
    known = [cell for cell in plan["cells"] if cell["options"].get("question") == "known"]
    assert [cell["method"] for cell in known] == list(hidden)
    assert not {cell["key"] for cell in known} & set(hidden.values())
    assert plan["run"].endswith("-26d513edba")  # the folder that 0.1 measured the hidden question into


@pytest.mark.heavy
def test_both_questions_stand_side_by_side(called: Call, tmp_path: Path) -> None:
    first = called([*COMMAND, "--set", "question=hidden", "--json"])
    assert first.code == 0, first.err
    assert {row["params"]["question"] for row in first.document["rows"]} == {"hidden"}
    records = {path: path.read_bytes() for path in (tmp_path / "run").rglob("records.jsonl")}
    both = called([*COMMAND, "--json"])
    assert all(path.read_bytes() == before for path, before in records.items())  # only the known question was added
    rows = [row for row in both.document["rows"] if row["metric"] == "accuracy" and row["params"]["bin"] is None]
    assert [(row["params"]["question"], row["method"]) for row in rows] == [
        (question, name) for question in ("hidden", "known") for name in ("full", "snapkv", "window")
    ]
    for row in rows:
        assert f"question:{row['params']['question']}" in row["signature"]
        assert row["baseline"] == (None if row["method"] == "full" else "full")
        if row["method"] != "full":  # both are measured when a multiple of 20 tokens was read
            assert row["ratio_realised"] == 0.8
    text = called(COMMAND)
    assert "Already measured" in text.err
    assert "recall, question hidden: " in text.out
    assert "recall, question known: " in text.out
    assert "Layouts (window) read the prefix under their mask; policies (snapkv) read it whole" in text.out
    settings = json.loads((tmp_path / "run" / "run.json").read_text())["tasks"]
    assert list(settings) == ["recall@kvbench-tiny#0", "recall:known@kvbench-tiny#0"]
    report = called(["report", "run"])
    assert report.code == 0, report.err
    for name in ("tables/recall.md", "tables/recall-known.md", "figures/recall-distance.png",
                 "figures/recall-distance-known.png"):
        assert (tmp_path / "run" / name).exists()
    assert "recall, question known" in (tmp_path / "run" / "report.html").read_text()
    compared = called(["compare", "run:snapkv", "run:window", "--json"]).document["rows"]
    assert {row["params"]["question"] for row in compared} == {"hidden", "known"}
    alone = called([*COMMAND, "--set", "question=hidden", "--json"])  # what else is there stays, and is not told
    assert {row["params"]["question"] for row in alone.document["rows"]} == {"hidden"}


@pytest.mark.parametrize(("words", "message"), [
    (["--set", "question=open"], "question"), (["--task", "minidocs", "--set", "question=known"], "question"),
])
def test_what_is_no_question_is_refused(called: Call, words: list[str], message: str) -> None:
    tasks = [] if "--task" in words else ["--task", "recall"]
    found = called(["run", "--method", "window", *tasks, *words, "--out", "run"])
    assert (found.code, message in found.err) == (2, True)
    assert not Path("run").exists()


def row_of(method: str, protocol: str = "prefix", **params: str) -> Row:
    return Row(
        "t", protocol, "m", method, 0.5, 0.5, 0.5, 1, "real", {"bin": None, **params}, 1, "ppl", 1.0, None, None, 1,
        "document", None, None, None, None, None, 0, "ppl:prefix|v:1",
    )


def test_a_note_says_how_a_prefix_was_read_where_both_kinds_stand() -> None:
    full, sinks = row_of("full"), row_of("sinks")
    once, blocks = row_of("h2o", prefill="once"), row_of("h2o", prefill="blocks")
    assert reading_note([full, sinks, once]) == (
        "Layouts (sinks) read the prefix under their mask; policies (h2o) read it whole and are cut once."
    )
    assert reading_note([full, once]) == reading_note([full, sinks]) == reading_note([sinks, blocks]) == ""
    assert reading_note([row_of("sinks", "block"), row_of("h2o", "block", prefill="once")]) == ""
