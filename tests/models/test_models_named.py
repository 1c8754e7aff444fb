"""Numbers are of the model, adapter, texts and judges that the command named, and of no other of that name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import huggingface_hub.constants
import pytest

from kvbench.errors import UserError
from kvbench.execution.channel import Channel
from kvbench.execution.job import Job
from kvbench.execution.worker import Worker
from kvbench.judges.choice import JudgeChoice
from kvbench.judges.loading import load_judges
from kvbench.models.adapter import Adapter, AdapterCard, read_card
from kvbench.models.facts import ModelFacts
from kvbench.models.fingerprint import fingerprint, former_fingerprint
from kvbench.models.loading import load_model
from kvbench.models.references import ModelReference, adapter_name, given_adapter, resolve_model
from kvbench.planning.profile import ProfileRequest, build_profile_plan
from kvbench.planning.quality import Plan, Request, build_plan
from kvbench.reporting import report
from kvbench.reporting.report import write_report
from kvbench.store.folder import RunFolder
from kvbench.store.records import GenerationRecord, Output
from tests.helpers.command import Call
from tests.helpers.records import CELL, DOCUMENTS, TEXT, made

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{i}", "text": f"Number {i}. " + TEXT * 6}) + "\n" for i in range(3)))
    return path


@pytest.fixture
def model(tmp_path: Path, model_folder: Callable[..., Path]) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


@pytest.fixture
def hub(tmp_path: Path, model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The hub's cache with two commits of ``org/name``, of which ``main`` is the first."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    shutil.copytree(model_folder("llama"), repository / "snapshots" / FIRST)
    shutil.copytree(model_folder("llama"), repository / "snapshots" / SECOND)
    weights = repository / "snapshots" / SECOND / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4000:] = content[-8000:-4000]
    weights.write_bytes(content)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(FIRST)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return repository


def plan_of(model: str, **settings: object) -> Plan:
    wanted: dict[str, object] = {
        "model": model, "revision": None, "adapters": (), "methods": ("knorm",), "ratios": ("0.5",),
        "tasks": ("minidocs",), "data": None, "protocol": None, "execution": "streamed", "limit": 2, "seed": 0,
        "options": {}, "out": None, "reports": Path("reports"), "baselines": False, "device": "cpu", "dtype": "auto",
        "threads": 1,
    }
    return build_plan(Request(**(wanted | settings)))  # type: ignore[arg-type]


def job_of(plan: Plan) -> Job:
    data = str(plan.request.data) if plan.request.data else None
    return Job(plan.cells, plan.model.location, plan.task_files, data, 2, 1, plan.judging)


def test_cells_of_the_embedded_model_have_the_keys_of_the_first_release() -> None:
    """What was measured then is found again."""
    plan = plan_of("kvbench-tiny")
    assert {cell.method: cell.key for cell in plan.cells} == {"full": "ed4827f0b833", "knorm": "71e5ffe0f5cb"}


def test_a_model_on_the_hub_is_the_commit_that_its_branch_stands_for(hub: Path) -> None:
    assert resolve_model("org/name") == ModelReference("org/name", "org/name", FIRST, FIRST)
    assert resolve_model("org/name", SECOND).fingerprint == SECOND
    (hub / "refs" / "v1").write_text(SECOND)
    assert resolve_model("org/name", "v1") == resolve_model("org/name", SECOND)
    plan = plan_of("org/name")
    assert {(cell.revision, cell.model_hash) for cell in plan.cells} == {(FIRST, FIRST)}
    assert plan_of("org/name", revision="main").content == plan.content
    (hub / "refs" / "main").write_text(SECOND)
    assert plan_of("org/name").content != plan.content
    assert resolve_model("org/name").short_name == "org/name"


def test_what_is_planned_is_loaded_though_the_branch_has_moved_meanwhile(hub: Path, texts: Path) -> None:
    settings = {"tasks": ("minidocs-gen",), "data": texts, "scorer": "org/name", "metrics": ("gen_ppl",),
                "options": {"prefix": "32"}}
    plan = plan_of("org/name", **settings)
    assert {cell.options["scorer"] for cell in plan.cells} == {f"org/name@{FIRST}"}
    wanted = load_model(resolve_model("org/name"), "cpu", "float32").model.state_dict()
    (hub / "refs" / "main").write_text(SECOND)
    moved = load_model(resolve_model("org/name"), "cpu", "float32").model.state_dict()
    assert any((wanted[name] != moved[name]).any() for name in wanted)
    worker = Worker(Job.from_json(job_of(plan).to_json()), Channel(StringIO()))
    worker.prepare()
    for loaded in (worker.loaded.model, worker.judges.scorer.model):  # type: ignore[union-attr]
        assert all((wanted[name] == value).all() for name, value in loaded.state_dict().items())


def test_a_model_that_cannot_be_had_is_named_by_what_was_asked_for(hub: Path) -> None:
    for name, revision in (("org/other", None), ("org/name", "no-such-branch")):
        assert resolve_model(name, revision) == ModelReference(name, name, revision, "")
    with pytest.raises(UserError, match="cannot be had from the Hugging Face hub"):
        load_model(resolve_model("org/other"), "cpu", "auto")
    (hub / "snapshots" / FIRST / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be had from the Hugging Face hub"):
        load_model(resolve_model("org/name"), "cpu", "auto")


def test_nothing_is_measured_of_a_commit_that_nobody_knows(hub: Path, texts: Path) -> None:
    """The hub was away while the command was planned, and is there when the model is loaded."""
    plan = plan_of("org/late", data=texts)
    assert {cell.model_hash for cell in plan.cells} == {""}
    hub.rename(hub.with_name("models--org--late"))
    with pytest.raises(UserError, match="has not said which commit org/late is"):
        Worker(job_of(plan), Channel(StringIO())).prepare()


def test_an_adapter_on_the_hub_is_no_model(hub: Path) -> None:
    """Its base model would be loaded from elsewhere, from a branch that may move."""
    (hub / "snapshots" / FIRST / "adapter_config.json").write_text('{"base_model_name_or_path": "other/base"}')
    with pytest.raises(UserError, match="is an adapter of another model"):
        resolve_model("org/name")


def test_adapters_are_bound_to_the_commit(hub: Path, tmp_path: Path) -> None:
    loaded = load_model(resolve_model("org/name"), "cpu", "float32").model

    def plan_with(base_hash: str) -> Plan:
        card = AdapterCard("sentinel", "gated", 4, 4.0, 2, "org/name", base_hash)
        Adapter.fresh(card, loaded).save(tmp_path / "adapter", "org/name")
        return plan_of("org/name", methods=("sentinel",), adapters=(str(tmp_path / "adapter"),))

    for base_hash in (FIRST, ""):  # by the first release, which knew no commits
        assert plan_with(base_hash).cells[-1].adapter == str(tmp_path / "adapter")
    with pytest.raises(UserError, match=f"another base model.*Use --revision {SECOND}"):
        plan_with(SECOND)


def test_a_damaged_file_in_the_hubs_cache_is_named(hub: Path) -> None:
    """Files lie there under the hash of their content: by SHA-256 if they are large, by git's otherwise."""
    snapshot, blobs = hub / "snapshots" / FIRST, hub / "blobs"
    blobs.mkdir()
    for name in ("model.safetensors", "config.json"):
        content = (snapshot / name).read_bytes()
        git = subprocess.run(["git", "hash-object", "--stdin"], input=content, capture_output=True, check=True).stdout
        blob = blobs / (hashlib.sha256(content).hexdigest() if name.endswith("s") else git.decode().strip())
        (snapshot / name).replace(blob)
        (snapshot / name).symlink_to(blob)
    assert resolve_model("org/name").fingerprint == FIRST
    for name in ("model.safetensors", "config.json"):
        blob = (snapshot / name).resolve()
        content = blob.read_bytes()
        blob.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        for known in (None, FIRST):
            with pytest.raises(UserError, match=f"{blob.name} is not what its name says"):
                resolve_model("org/name", known)
        blob.write_bytes(content)
    resolve_model("org/name").check_unchanged()


@pytest.mark.heavy
def test_a_finished_run_is_printed_again_for_the_same_commit_only(hub: Path, texts: Path, called: Call) -> None:
    command = ["run", "--model", "org/name", "--method", "sinks", "--ratio", "0.5", "--task", "minidocs",
               "--data", texts, "--set", "block=64", "--json", "--no-baselines"]
    first, again = called(command), called(command)
    assert (first.code, again.code) == (0, 0)
    assert "Already measured" in again.err
    assert again.document["rows"] == first.document["rows"]
    (hub / "refs" / "main").write_text(SECOND)
    other = called(command)
    assert other.code == 0
    assert "Already measured" not in other.err
    assert [row["value"] for row in other.document["rows"]] != [row["value"] for row in first.document["rows"]]


def test_models_adapters_and_texts_that_change_before_they_are_loaded_are_refused(
    model: Path, texts: Path, tmp_path: Path
) -> None:
    loaded = load_model(resolve_model(str(model)), "cpu", "float32").model
    adapter = tmp_path / "adapter"
    card = AdapterCard("sentinel", "gated", 4, 4.0, 2, "model", former_fingerprint(model))
    Adapter.fresh(card, loaded).save(adapter, "model")
    plan = plan_of(str(model), methods=("sentinel",), adapters=(str(adapter),), data=texts)
    Worker(job_of(plan), Channel(StringIO())).prepare()
    for path in (model / "generation_config.json", adapter / "card.json", texts):
        before = path.read_bytes()
        path.write_bytes(before.replace(b"null", b"3").replace(b'"base_model": "model"', b'"base_model": "m"')
                         .replace(b"Number 1", b"Number 9"))
        if path.name == "generation_config.json":
            path.write_text('{"eos_token_id": 3}')
        with pytest.raises(UserError, match="have changed since this command began"):
            Worker(job_of(plan), Channel(StringIO())).prepare()
        path.write_bytes(before)
    Worker(job_of(plan), Channel(StringIO())).prepare()


def test_profiles_are_of_the_commit_and_of_the_files(hub: Path, model: Path) -> None:
    request = ProfileRequest(
        model="org/name", revision=None, adapters=(), methods=("sinks",), ratios=("0.5",), seq_lens=(64,),
        batch_sizes=(1,), new_tokens=4, chunk=64, fill="real", repeats=1, rounds=1, warmups=1, budget=None,
        timeout=60, seed=0, options={}, out=None, reports=Path("reports"), baselines=False, device="cpu",
        dtype="auto", threads=1,
    )
    first = build_profile_plan(request)
    assert {(cell.revision, cell.model_hash) for cell in first.cells} == {(FIRST, FIRST)}
    (hub / "refs" / "main").write_text(SECOND)
    assert build_profile_plan(request).content != first.content
    local = build_profile_plan(replace(request, model=str(model)))
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    assert build_profile_plan(replace(request, model=str(model))).content != local.content


def test_judges_are_named_by_their_files_and_loaded_as_named(model: Path, texts: Path) -> None:
    settings = {"tasks": ("minidocs-gen",), "data": texts, "scorer": str(model), "metrics": ("gen_ppl", "mauve"),
                "mauve_features": str(model)}
    plan = plan_of("kvbench-tiny", **settings)
    named = f"model@{fingerprint(model)}"
    assert {(c.options["scorer"], c.options["mauve_features"]) for c in plan.cells} == {(named, named)}
    judging = JudgeChoice.load(json.loads(json.dumps(dataclasses.asdict(plan.judging))))
    assert judging == plan.judging
    loaded, facts = load_model(resolve_model("kvbench-tiny"), "cpu", "float32"), ModelFacts("LlamaForCausalLM")
    assert load_judges(replace(judging, encoder=False), loaded, facts, "cpu", "float32").scorer is not None
    (model / "special_tokens_map.json").write_text("{}")
    with pytest.raises(UserError, match=r"--scorer .*have changed"):
        load_judges(replace(judging, encoder=False), loaded, facts, "cpu", "float32")
    assert plan_of("kvbench-tiny", **settings).content != plan.content


def test_one_name_for_two_models_is_two_models_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write_figures", lambda *_: [])
    first = made(tmp_path / "first", [(CELL, 0.0)])
    other = made(tmp_path / "other", [(replace(CELL, model_hash="f" * 16), 1.0)])
    same = made(tmp_path / "same", [(replace(CELL, seed=5), 0.5)])
    assert {row.model for row in write_report([first, same], tmp_path / "both").results.rows} == {CELL.model}
    names = {row.model for row in write_report([first, other], tmp_path / "two").results.rows}
    assert names == {f"{CELL.model}@{CELL.model_hash[:8]}", f"{CELL.model}@ffffffff"}


def test_a_comparison_names_the_models_where_they_differ(tmp_path: Path, called: Call) -> None:
    first = made(tmp_path / "first", [(CELL, 0.0)])
    other = made(tmp_path / "other", [(replace(CELL, model_hash="f" * 16), 1.0)])
    assert f"{CELL.model}@ffffffff" in " ".join(called(["compare", first, other]).out.split())
    same = made(tmp_path / "same", [(CELL, 0.5)])
    assert "@" not in called(["compare", first, same]).out


def test_fluency_is_compared_under_one_scorer_only(tmp_path: Path, called: Call) -> None:
    """Two models that judged themselves are two scorers."""

    def written(name: str, scorer: str, model_hash: str = "h") -> Path:
        cell = replace(CELL, task="minidocs-gen", protocol="generate", model_hash=model_hash,
                       options={"scorer": scorer})
        made(tmp_path / name, [(cell, 0.0)], kind="generation", bytes={}, **{"seq_len": 32, "new_tokens": 2})
        folder = RunFolder(tmp_path / name)
        shutil.rmtree(folder.cell_folder(cell))
        folder.open_cell(cell)
        output = Output("nucleus", 0, (1, 2), TEXT, False, 3.0, 2)
        folder.append(cell, [
            GenerationRecord(d, d, (replace(output, nll=3.0 + i),), 32, 16, 8.0, 2, 32, 60.0, 60.0, 110.0)
            for i, d in enumerate(DOCUMENTS)
        ])
        return tmp_path / name

    first = written("first", "itself")
    for other, is_compared in ((written("a", "itself"), True), (written("b", "itself", "f"), False),
                               (written("c", "gpt2@x"), False), (written("d", "gpt2@x"), False)):
        found = called(["compare", first, other])
        assert found.code == 0, found.err
        assert ("gen_ppl: left out" not in found.out) == is_compared
        rows = called(["compare", first, other, "--json"]).document["rows"]
        assert ("gen_ppl" in {row["metric"] for row in rows}) == is_compared
    found = called(["compare", tmp_path / "c", tmp_path / "d"])
    assert "gen_ppl: left out" not in found.out


def test_cards_say_what_they_were_made_for(model: Path, tmp_path: Path) -> None:
    """An adapter whose card holds the first release's fingerprint is still this model's; another is not."""
    loaded = load_model(resolve_model(str(model)), "cpu", "float32").model
    (model / "vocab.json").write_text("{}")  # counts now, and did not then
    assert fingerprint(model) != former_fingerprint(model)
    for base_hash, is_mine in ((former_fingerprint(model), True), (fingerprint(model), True), ("0" * 16, False)):
        card = AdapterCard("sentinel", "gated", 4, 4.0, 2, "model", base_hash)
        Adapter.fresh(card, loaded).save(tmp_path / "adapter", "model")
        assert read_card(tmp_path / "adapter").base_hash == base_hash
        asked = {"methods": ("sentinel",), "adapters": (str(tmp_path / "adapter"),)}
        if is_mine:
            assert plan_of(str(model), **asked).cells
            continue
        with pytest.raises(UserError, match="another base model"):
            plan_of(str(model), **asked)


def test_an_adapter_is_recorded_by_its_name_where_that_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nothing in a run folder is about one machine; a shadowed one is found by its path."""
    shipped = given_adapter("kvbench-tiny-sentinel")
    assert adapter_name(shipped) == "kvbench-tiny-sentinel"
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))
    cached = {name: tmp_path / "adapters" / name for name in ("mine", "kvbench-tiny-sentinel")}
    for folder in cached.values():
        shutil.copytree(shipped, folder)
    assert adapter_name(cached["mine"]) == "mine"
    assert adapter_name(cached["kvbench-tiny-sentinel"]) == str(cached["kvbench-tiny-sentinel"])
    elsewhere = shutil.copytree(shipped, tmp_path / "elsewhere")
    assert adapter_name(elsewhere) == str(elsewhere)
