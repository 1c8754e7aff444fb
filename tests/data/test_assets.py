"""What is always there: the model, the documents, the adapter, the tasks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from kvbench.data.documents import load_corpus, read_rows
from kvbench.data.tasks import load_task, task_names
from kvbench.errors import UserError
from kvbench.methods import METHODS
from kvbench.models.adapter import Adapter, read_card
from kvbench.models.loading import load_model
from kvbench.models.references import assets, find_adapter, given_adapter, resolve_model


def test_minidocs() -> None:
    rows = [json.loads(line) for line in (assets() / "minidocs.jsonl").read_text().splitlines()]
    words = [len(row["text"].split()) for row in rows]
    assert sum(300 <= n <= 500 for n in words) >= 40
    assert sum(n > 2000 for n in words) >= 4
    assert all(300 <= n <= 500 or n > 2000 for n in words)
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    assert set(Counter(row["kind"] for row in rows)) == {"story", "letter", "essay", "report"}
    openings = Counter(row["text"][:25] for row in rows)
    assert max(openings.values()) == 1


def test_the_embedded_model() -> None:
    reference = resolve_model("kvbench-tiny")
    model, tokenizer, context, vocabulary = load_model(reference, "cpu", "auto")
    assert (context, vocabulary) == (1024, 4096)
    assert next(model.parameters()).dtype == torch.float32
    ids = torch.tensor([tokenizer("The key of Mary is 4821. The key of Mary is").input_ids])
    answer = tokenizer.decode(model(ids).logits[0, -1].argmax())
    assert answer.strip()[:1] == "4"


SHIPPED = {
    "sentinel": "gated", "ccm-concat": "gated", "ccm-merge": "gated", "gist": "gated", "local-tuned": "plain",
    "scattered-tuned": "plain", "adapted": "plain",
}


def test_shipped_adapters_are_of_equal_training() -> None:
    reference = resolve_model("kvbench-tiny")
    model = load_model(reference, "cpu", "float32").model
    trained = []
    for method, gate in SHIPPED.items():
        folder = find_adapter(method, reference, METHODS[method]().trained_options)
        assert folder.name == f"kvbench-tiny-{method}"
        card = read_card(folder)
        assert (card.method, card.gate, card.base_hash) == (method, gate, reference.fingerprint)
        wanted = METHODS[method]().trained_options
        assert {**wanted, **card.options} == wanted
        adapter = Adapter.load(folder, model)
        assert adapter.rows.shape == (METHODS[method]().n_rows, 256)
        names = ("steps", "batch", "length", "rank", "lr", "seed", "objective", "tokens")
        trained.append([card.training[name] for name in names] + [card.training["data"][0]["sha256"]])
        assert card.held_out
    assert all(training == trained[0] for training in trained)
    assert given_adapter("kvbench-tiny-sentinel-long").parent.name == "adapters"


def test_adapters_in_the_cache_folder_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their options; those that a card does not name are the defaults."""
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    reference = resolve_model("kvbench-tiny")
    wanted = METHODS["sentinel"]().trained_options
    more = tmp_path / "adapters" / "kvbench-tiny-sentinel-2"
    shutil.copytree(given_adapter("kvbench-tiny-sentinel"), more)
    card = json.loads((more / "card.json").read_text())
    (more / "card.json").write_text(json.dumps({**card, "options": {**card["options"], "closing": "2"}}))
    assert find_adapter("sentinel", reference, wanted, wanted).name == "kvbench-tiny-sentinel"
    assert find_adapter("sentinel", reference, {**wanted, "closing": "2"}, wanted) == more
    assert given_adapter("kvbench-tiny-sentinel-2") == more
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kvbench-tiny-sentinel-2").mkdir()
    assert given_adapter("kvbench-tiny-sentinel-2") == Path("kvbench-tiny-sentinel-2")  # what lies here comes first
    (more / "card.json").write_text("{}")
    assert find_adapter("sentinel", reference, wanted, wanted).name == "kvbench-tiny-sentinel"
    with pytest.raises(UserError, match=r"kvbench-tiny-sentinel-2/card.json is damaged"):
        find_adapter("pic", reference, {}, {})


def test_shipped_adapters_are_found_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("HOME", "XDG_CACHE_HOME", "KVBENCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert find_adapter("sentinel", resolve_model("kvbench-tiny"), {}).name == "kvbench-tiny-sentinel"
    assert given_adapter("kvbench-tiny-sentinel").is_dir()


def test_tasks_are_valid_and_fixed() -> None:
    sets = ("babilong-", "infinitebench-", "longbench-", "scbench-")
    from_hub = [name for name in task_names() if name.startswith(sets)]
    assert {name: sum(one.startswith(name) for one in from_hub) for name in sets} == {
        "babilong-": 9, "infinitebench-": 5, "longbench-": 17, "scbench-": 7,
    }
    assert [name for name in task_names() if name not in from_hub] == [
        "arithmetic", *(f"babi-{task}" for task in range(1, 6)), "books", "books-gen", "c4-gen", "docqa",
        "instructions",
        "kv-retrieval", "minidocs", "minidocs-gen", "needles", "online", "online-demonstrations", "online-profiles",
        "online-text", "passkey", "recall", "ruler-cwe", "ruler-fwe", *(
            f"ruler-niah-{kind}" for kind in ("multikey-1", "multikey-2", "multikey-3", "multiquery", "multivalue",
                                              "single-1", "single-2", "single-3")
        ), "ruler-qa", "ruler-vt", "wikitext2",
    ]
    for name in task_names():
        assert load_task(name).name == name
    corpus = load_corpus(load_task("minidocs"), None)
    assert len(corpus.documents) == 48
    assert corpus.hash == load_corpus(load_task("minidocs"), None).hash


def test_wikitext_rows_become_articles(tmp_path: Path) -> None:
    rows = ["", " = Robert Boulter = \n", "", " He acted . \n", " = = Career = = \n", " More . \n"]
    rows += [" = Du Fu = \n", " A poet . \n"]
    (tmp_path / "w.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    documents = load_corpus(load_task("wikitext2"), tmp_path / "w.jsonl").documents
    assert [d.id for d in documents] == ["article-000", "article-001"]
    assert documents[0].text.startswith(" = Robert Boulter = \n")
    assert "Career" in documents[0].text
    assert "A poet" in documents[1].text


def test_books_are_taken_in_turn(tmp_path: Path) -> None:
    books = [{"id": name, "text": f"{name} says something here.\n\n" * 900} for name in ("a", "b")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(book) + "\n" for book in books))
    documents = load_corpus(load_task("books"), tmp_path / "b.jsonl").documents
    assert [d.group for d in documents[:4]] == ["a", "b", "a", "b"]
    assert "".join(d.text for d in documents if d.group == "a") == books[0]["text"]
    assert all(len(d.text) >= 8000 for d in documents[:4])


def test_equal_ids_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "x", "text": "one"}\n{"id": "x", "text": "two"}\n{"text": "three"}\n')
    documents = load_corpus(load_task("minidocs"), tmp_path / "d.jsonl").documents
    assert [d.id for d in documents] == ["x", "x~1", "00002"]
    assert len(read_rows(tmp_path / "d.jsonl")) == 3


@pytest.mark.gpu
def test_cuda_gives_the_same_scores() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    reference = resolve_model("kvbench-tiny")
    ids = torch.arange(200)[None]
    cpu = load_model(reference, "cpu", "float32").model(ids).logits
    cuda = load_model(reference, "cuda", "float32").model(ids.cuda()).logits.cpu()
    assert (cpu - cuda).abs().max() < 1e-2
