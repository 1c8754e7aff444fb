"""A bad request gets a sentence and exit code 2, and nothing is written."""

from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from kvbench.data.tasks import tasks_folder
from kvbench.errors import UserError
from kvbench.execution.locks import locked
from kvbench.models.loading import load_model
from kvbench.models.references import assets, resolve_model
from tests.helpers.command import RUN, Call, refused
from tests.helpers.models import small_adapter, small_model

SHIPPED = assets() / "adapters"
LONG = "x" * 300


@pytest.mark.parametrize(("arguments", "words"), [
    (["run", "--method", "sentinal"], ["Unknown method 'sentinal'", "Did you mean 'sentinel'"]),
    (["run", "--task", "minidoc"], ["Unknown task", "Did you mean 'minidocs'"]),
    (["run", "--task", "nowhere.toml"], ["no task file"]),
    (["run", "--protocol", "blok"], ["Unknown protocol", "Did you mean 'block'"]),
    (["run", "--task", "recall", "--protocol", "block"], ["not measured with protocol 'block'", "prefix"]),
    (["run", "--execution", "masked"], ["Unknown --execution", "onepass"]),
    (["run", "--ratio", "1"], ["outside [0, 1)"]),
    (["run", "--ratio", "-0.1"], ["outside [0, 1)"]),
    (["run", "--ratio", "seventy"], ["not a number"]),
    (["run", "--ratio", "nan"], ["not a number"]),
    (["run", "--ratio", "inf"], ["not a number"]),
    (["run", "--ratio", "1/3"], ["not a number"]),
    (["run", "--revision", "main"], ["--revision is for models on the hub"]),
    (["run", "--limit", "0"], ["--limit 0 is below 1"]),
    (["run", "--limit", "-3"], ["below 1"]),
    (["run", "--limit", "two"], ["--limit"]),
    (["run", "--seed", "-1"], ["--seed"]),
    (["run", "--threads", "0"], ["--threads"]),
    (["run", "--dtype", "float23"], ["Unknown dtype", "Did you mean 'float32'"]),
    (["run", "--device", "cuda:77"], ["not available", "cpu"]),
    (["run", "--device", "abacus"], ["not available", "cpu"]),
    (["run", "--model", "./nowhere"], ["no model folder ./nowhere"]),
    (["run", "--model", "/nowhere/at/all"], ["no model folder"]),
    (["run", "--adapter", "nowhere"], ["no adapter folder nowhere", "kvbench train"]),
    (["run", "--data", "x.jsonl"], [
        "--data is the text of one task, and this command measures 3 (minidocs, recall, minidocs-gen).",
        "Add --task books for running text of your own",
    ]),
    (["run", "--task", "ppl"], ["Unknown task 'ppl': that is a metric", "--task books --data FILE"]),
    (["sweep", "--task", "perplexity"], ["Unknown task 'perplexity': that is a metric", "--task minidocs"]),
    (["run", "--task", "accuracy"], ["that is a metric", "--task recall"]),
    (["run", "--task", "bleu"], ["that is a metric", "--task minidocs-gen"]),
    (["run", "--task", "answer_accuracy"], ["that is a metric", "--task ruler-niah-single-2"]),
    (["run", "--task", "wikitext"], ["Did you mean 'wikitext2'?"]),
    (["run", "--task", "RULER"], ["Did you mean 'ruler'?"]),
    (["run", "--task", "minidocs", "--metric", "ppl"], ["'ppl' is none of them", "Leave --metric out", "gen_ppl"]),
    (["run", "--metric", "perplexity"], ["'ppl' is none of them", "--task minidocs", "--metric gen_ppl"]),
    (["run", "--metric", "acc"], ["'accuracy' is none of them", "--task recall."]),
    (["run", "--metric", "rouge"], ["Unknown metric of written text 'rouge'", "Did you mean 'rougeL'?"]),
    (["run", "--metric", "Chrf"], ["Did you mean 'chrf'?"]),
    (["report", "nowhere", "--metric", "perplexity"], ["Unknown metric 'perplexity'", "Did you mean 'ppl'?"]),
    (["run", "--set", "chunk"], ["not of the form key=value"]),
    (["run", "--set", f"chunk={'7' * 5000}"], ["--set chunk=7777", "5000 characters"]),
    (["run", "--set", "chunck=3"], ["Unknown --set key 'chunck'", "Did you mean 'chunk'"]),
    (["run", "--set", "chunk=auto"], ["chunk=auto", "whole number"]),
    (["run", "--task", "minidocs", "--set", "prefix=200"], ["Unknown --set key 'prefix'"]),
    (["run", "--set", "chunk=three"], ["chunk=three", "whole number"]),
    (["run", "--set", "sampler=exat"], ["sampler", "Did you mean 'exact'"]),
    (["run", "--method", "ccm-concat"], ["ratio 0.7", "n_comp=2", "chunks of 7", "8 to 128", "0.75"]),
    (["run", "--method", "meanpool", "--ratio", "0.99"], ["chunks of 200", "0.984"]),
    (["run", "--method", "gist", "--set", "n_comp=4", "--ratio", "0.3"], ["chunks of 6", "between 0.5 and 0.969"]),
    (["run", "--method", "ccm-merge", "--set", "n_comp=4"], ["trained with n_comp=2", "n_comp=4 is asked"]),
    (["run", "--method", "ccm-merge", "--set", "merge=ema"], ["trained with merge=mean", "merge=ema is asked"]),
    (["run", "--method", "sentinel", "--set", "predict_from_cr=true"], ["trained with predict_from_cr=false"]),
    (["run", "--method", "ccm-merge", "--set", "n_comp=0"], ["n_comp=0", "1 to 32"]),
    (["run", "--method", "ccm-merge", "--set", "n_comp=two"], ["n_comp=two", "whole number"]),
    (["run", "--method", "ccm-merge", "--set", "segment=7"], ["segment=7", "8 to 128"]),
    (["run", "--method", "ccm-merge", "--set", "merge=median"], ["merge=", "'median'"]),
    (["run", "--method", "ccm-merge", "--set", "recent=3"], ["Unknown --set key 'recent'"]),
    (["run", "--method", "sentinel", "--set", "recent=-1"], ["recent=-1", "whole number"]),
    (["run", "--method", "sentinel", "--set", "span=1"], ["span=1"]),
    (["run", "--method", "ccm-concat", "--set", "budget=50"], ["budget=50", "1 + 8 + 64"]),
    (["run", "--method", "sinks", "--set", "budget=160", "--set", "memory=3"], ["memory=3", "no multiple"]),
    (["run", "--method", "sinks", "--adapter", str(SHIPPED / "kvbench-tiny-gist")], ["'gist'", "not asked for"]),
    (["run", "--task", "online", "--protocol", "block"], ["not measured with protocol 'block'", "online"]),
    (["run", "--task", "minidocs", "--task", "recall", "--protocol", "online"], ["None of the tasks", "'online'"]),
    (["run", "--task", "online", "--method", "sinks", "--set", "budget=160"], ["for running text"]),
    (["run", "--task", "minidocs", "--protocol", "online"], ["not measured with protocol 'online'"]),
    (["run", "--config", "nowhere.toml"], ["no settings file nowhere.toml"]),
    *((["run", "--task", "books", option, ""], [option, "it is empty"])
      for option in ("--data", "--model", "--adapter", "--out", "--config", "--scorer", "--mauve-features")),
    *((["profile", option, ""], [option, "it is empty"]) for option in ("--model", "--adapter", "--out", "--config")),
    *((["sweep", option, ""], [option, "it is empty"]) for option in ("--model", "--data", "--out")),
    *((["train", "--method", "sentinel", option, ""], [option, "it is empty"])
      for option in ("--data", "--held-out", "--out", "--model")),
    *(([*command, ""], ["it is empty"]) for command in (["report"], ["show"], ["compare", "x"], ["sweep"])),
    (["train", "base", "--tokenizer", ""], ["--tokenizer", "it is empty"]),
    *((["run", "--task", "minidocs", option, LONG], [f"{LONG} cannot be used: File name too long."])
      for option in ("--data", "--model", "--out", "--adapter")),
    (["run", "--task", "minidocs", "--dry-run", "--out", LONG], [f"{LONG} cannot be used: File name too long."]),
    (["compare", LONG, LONG], [f"{LONG} cannot be used: File name too long."]),
    *((["run", option, "~nobody-of-this-name/m"], ["~nobody-of-this-name/m", "no such home"])
      for option in ("--model", "--adapter")),
    *(([command, "--dry-run", "--out", "/dev/null/x"], ["/dev/null/x cannot be written"])
      for command in ("run", "sweep", "profile")),
    (["run", "--no-such-option"], ["No such option"]),
    (["train"], []),
    (["train", "--method", "sentinel"], ["--method and --out"]),
    (["train", "--method", "sinks", "--out", "x"], ["Unknown trained method", "sentinel"]),
    (["train", "--method", "sentinel", "--out", "x"], ["Training needs text"]),
    (["train", "--method", "sentinel", "--out", "x", "--data", "no.jsonl"], ["no data file no.jsonl"]),
    (["train", "--method", "sentinel", "--out", "x", "--set", "adapter=gatd"], ["Did you mean 'gated'"]),
    (["train", "--method", "local-tuned", "--out", "x", "--set", "adapter=gated"], ["'gated'", "plain"]),
    (["train", "--method", "ccm-merge", "--out", "x", "--set", "merge=men"], ["Did you mean 'mean'"]),
    (["train", "--method", "ccm-merge", "--out", "x", "--set", "budget=9"], ["Unknown --set key 'budget'", "n_comp"]),
    (["train", "--method", "sentinel", "--out", "x", "--set", "dropout=2"], ["[0, 1)"]),
    (["train", "--method", "sentinel", "--out", "x", "--length", "4096"], ["does not fit"]),
    (["train", "base", "--out", "x"], ["Training needs text"]),
    (["report", "nowhere"], ["not a run folder"]),
    (["report", "nowhere", "--metric", "ppll"], ["Unknown metric 'ppll'", "Did you mean 'ppl'"]),
])
def test_names_and_numbers(called: Call, arguments: list[str], words: list[str]) -> None:
    if arguments == ["train"]:
        assert called(arguments).code == 2
        return
    refused(called, arguments, *words)


@pytest.mark.parametrize(("content", "words"), [
    (b"", ["is empty"]),
    (b"\n \n", ["is empty"]),
    (b'{"text": "caf\xe9"}\n', ["not UTF-8"]),
    (b"\x89PNG\r\n\x1a\n\0\0", ["is binary"]),
    (b'{"text": "fine"}\n{"text": \n', ["line 2", "malformed JSON"]),
    (b'{"text": "fine"}\n{"body": "no"}\n', ["line 2", 'no "text"']),
    (b'{"text": 7}\n', ["line 1", 'no "text"']),
    (b'["text"]\n', ["line 1", 'no "text"']),
    (b'{"text": "  "}\n', ["holds no text"]),
])
def test_data_files(called: Call, tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    refused(called, [*RUN, "--task", "books", "--data", path], str(path), *words)
    packed = tmp_path / "data.jsonl.gz"
    packed.write_bytes(gzip.compress(content))
    refused(called, [*RUN, "--task", "books", "--data", packed], *words)


def test_data_paths(called: Call, tmp_path: Path) -> None:
    task = [*RUN, "--task", "wikitext2", "--data"]
    refused(called, [*task, "nowhere.jsonl"], "no data file nowhere.jsonl")
    (tmp_path / "data.pages").write_text("x")
    refused(called, [*task, "data.pages"], "no known ending", ".jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    refused(called, [*task, "folder.jsonl"], "cannot be read")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "fine"}\n' * 99)[:40])
    refused(called, [*task, "torn.jsonl.gz"], "cannot be read")


@pytest.mark.parametrize(("text", "words"), [
    ("[run]\nmetod = ['sinks']\n", ["kvbench.toml", "unknown key 'run.metod'", "Allowed keys here", "method"]),
    ("[runn]\n", ["unknown key 'runn'", "run"]),
    ("[run]\nratio = 0.7\n", ["kvbench.toml", "run.ratio", "list"]),
    ("[run]\ntask = []\n", ["run.task", "at least 1"]),
    ("[run]\nlimit = 'ten'\n", ["run.limit", "integer", "'ten'"]),
    ("[run]\ndtype = 'float23'\n", ["run.dtype", "'float32'"]),
    ("[run\n", ["not valid TOML"]),
])
def test_settings_files(called: Call, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "kvbench.toml").write_text(text)
    refused(called, RUN, *words)


@pytest.mark.parametrize(("text", "words"), [
    ("name = 'x'\n", ["own.toml", "version"]),
    ("nam = 'x'\n", ["own.toml"]),
    ("[", ["not valid TOML"]),
    ("name='x'\nversion=1\nsummary=''\nkind='online'\nprotocols=['online']\n[corpus]\nhub='a/b'\ncut='turns'\n[online]\n",
     ["own.toml", "turns"]),
    ("name='x'\nversion=1\nsummary=''\nkind='lm'\nprotocols=['block']\n[corpus]\nsynthetic='profiles'\n",
     ["own.toml", "synthetic"]),
    ("name='x'\nversion=1\nsummary=''\nkind='recall'\nprotocols=['prefix']\n[corpus]\nembedded='minidocs.jsonl'\n",
     ["own.toml", "[recall]"]),
])
def test_task_files(called: Call, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "own.toml").write_text(text)
    refused(called, [*RUN, "--task", "own.toml"], *words)


def test_two_tasks_of_one_name(called: Call, tmp_path: Path) -> None:
    shutil.copy(tasks_folder() / "minidocs.toml", tmp_path / "own.toml")
    refused(called, [*RUN, "--task", "minidocs", "--task", "own.toml"], "same name")
    refused(called, [*RUN, "--task", str(tmp_path)], "Unknown task")


def test_fresh_keeps_the_old_run_until_the_new_one_can_start(called: Call, tmp_path: Path) -> None:
    (tmp_path / "run" / "cells").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text('{"content": "x", "cells": [], "tasks": {}}')
    (tmp_path / "short.jsonl").write_text('{"text": "Too short."}\n')
    refused(called, [*RUN, "--task", "books", "--data", "short.jsonl", "--out", "run", "--fresh"], "no document is")


def test_output_folders(called: Call, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    refused(called, [*RUN, "--out", "other"], "holds something that is not a kvbench run")
    (tmp_path / "file").write_text("x")
    refused(called, [*RUN, "--out", "file"], "cannot be written")
    refused(called, [*RUN, "--out", "file/below"], "cannot be written")
    refused(called, [*RUN, "--out", "/proc/kvbench"], "cannot be written")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"content": "another", "cells": [], "tasks": {}}')
    refused(called, [*RUN, "--out", "run"], "holds another run")
    for damage in ("{", "{}", "[]"):
        (tmp_path / "run" / "run.json").write_text(damage)
        refused(called, [*RUN, "--out", "run"], "damaged")
    refused(called, ["report", "run"], "damaged")


def test_dry_runs_refuse_what_runs_refuse(called: Call, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"content": "another", "cells": [], "tasks": {}}')
    for command in (RUN, ["sweep"], ["profile"]):
        refused(called, [*command, "--dry-run", "--out", "other"], "holds something that is not a kvbench run")
    for command in (RUN, ["profile"]):
        refused(called, [*command, "--dry-run", "--out", "run"], "holds another run")


def test_a_path_that_may_not_be_looked_at(called: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permission bits do not bind root, whom tests may be run by: the system's answer is pretended."""
    stat = os.stat

    def refusing(path: Any, **more: Any) -> Any:
        if str(path).endswith("locked/d"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return stat(path, **more)

    monkeypatch.setattr(os, "stat", refusing)
    for option in ("--data", "--model", "--adapter", "--out"):
        more = [] if option == "--out" else ["--out", "out"]
        refused(called, ["run", "--task", "minidocs", *more, option, "locked/d"], "locked/d", "Permission denied.")
    refused(called, ["report", "run", "--out", "locked/d"], "run")


def test_an_error_without_a_path_is_no_sentence(called: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("kvbench.config.load_settings", failing)
    with pytest.raises(OSError, match="Input/output error"):
        called(RUN)


def test_locks_of_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path / os.fsdecode(b"caf\xe9")):
        pass

    def refusing(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x.lock")

    monkeypatch.setattr(FileLock, "acquire", refusing)
    with pytest.raises(UserError, match="cannot be taken: Permission denied") as refusal, locked(tmp_path / "run"):
        pass
    assert "TMPDIR" in refusal.value.hint


def test_a_report_into_a_folder_of_any_name(called: Call, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / name).mkdir()
    (tmp_path / name / "run.json").write_text('{"content": "x", "cells": [], "tasks": {}}')
    found = called(["report", name])
    assert found.code == 0, found.err
    assert "caf" in (tmp_path / name / "table.txt").read_text(encoding="utf-8")


def test_adapters(called: Call, tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    other = model_folder("llama")
    sentinel = ["run", "--method", "sentinel", "--limit", "2", "--task", "minidocs"]
    refused(called, [*sentinel, "--model", other], "needs an adapter", "kvbench train --method sentinel")
    shipped = assets() / "adapters" / "kvbench-tiny-sentinel"
    refused(called, [*sentinel, "--model", other, "--adapter", shipped], "another base model", "kvbench train")
    (tmp_path / "empty").mkdir()
    refused(called, [*sentinel, "--adapter", "empty"], "not an adapter folder")
    small_adapter(small_model("llama")).save(tmp_path / "small", "small")
    refused(called, [*sentinel, "--adapter", "small"], "another base model")


def test_damaged_models(called: Call, tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    run = [*RUN, "--task", "minidocs", "--model"]
    (tmp_path / "empty").mkdir()
    refused(called, [*run, "empty"], "no config.json")
    whole = model_folder("llama")
    weights = (whole / "model.safetensors").read_bytes()
    for name, damage in {
        "truncated": lambda f: (f / "model.safetensors").write_bytes(weights[:5000]),
        "garbage": lambda f: (f / "model.safetensors").write_bytes(b"garbage" * 99),
        "no-weights": lambda f: (f / "model.safetensors").unlink(),
        "no-tokenizer": lambda f: [p.unlink() for p in f.glob("tokenizer*")],
        "bad-config": lambda f: (f / "config.json").write_text("{"),
    }.items():
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        damage(folder)
        with pytest.raises(UserError, match="cannot be loaded"):
            load_model(resolve_model(str(folder)), "cpu", "auto")
    refused(called, [*run, "truncated"], "truncated", "cannot be loaded")


def test_a_tokenizer_of_another_model(called: Call, tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    whole = model_folder("llama", vocabulary=4096)
    load_model(resolve_model(str(whole)), "cpu", "auto")
    short = model_folder("llama", vocabulary=4095)
    with pytest.raises(UserError, match=r"knows ids up to 4095 .*embedding has 4095 rows"):
        load_model(resolve_model(str(short)), "cpu", "auto")
    refused(called, [*RUN, "--task", "minidocs", "--model", short], "knows ids up to 4095", "4095 rows")


def test_incomplete_weights(tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "incomplete"
    shutil.copytree(model_folder("llama"), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"incomplete: .*up_proj"):
        load_model(resolve_model(str(folder)), "cpu", "auto")


def test_models_without_what_is_needed(called: Call, tmp_path: Path, model_folder: Callable[..., Path]) -> None:
    run = [*RUN, "--task", "minidocs", "--model"]
    refused(called, [*run, model_folder("gpt2", context=256)], "do not fit", "256", "--set block=")
    for kind in ("t5", "mamba"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(UserError, match="not a decoder-only"):
            load_model(resolve_model(str(folder)), "cpu", "auto")
    refused(called, [*run, tmp_path / "mamba"], "not a decoder-only")


def test_sliding_windows_are_named(called: Call, tmp_path: Path, tiny_tokenizer: object) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, sliding_window=64,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    tiny_tokenizer.save_pretrained(tmp_path / "mistral")  # type: ignore[attr-defined]
    refused(called, [*RUN, "--task", "minidocs", "--model", "mistral"], "sliding_window 64")


def test_unreachable_hub(called: Call) -> None:
    refused(called, [*RUN, "--task", "minidocs", "--model", "nobody/nothing"], "Hugging Face hub", "local copy")
    refused(called, [*RUN, "--task", "wikitext2"], "Cannot load Salesforce/wikitext", "--data")


def test_documents_too_short(called: Call, tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"text": "Too short."}\n')
    run = [*RUN, "--task", "books", "--data", "short.jsonl"]
    for dry in ([], ["--dry-run"], ["--dry-run", "--json"]):
        refused(called, [*run, *dry], "no document is long enough", "32 tokens", "the only document is shorter")
        refused(called, [*run, *dry, "--protocol", "prefix"], "no document is long enough", "1024 tokens")
    recall = ["run", "--task", "recall", "--data", "short.jsonl"]
    refused(called, [*recall, "--dry-run"], "No document has the", "Give longer documents")
    refused(called, [*RUN, "--set", "block=2000", "--task", "minidocs", "--dry-run"], "do not fit", "--set block=1024")


def test_a_plan_counts_the_documents_that_are_long_enough(called: Call, tmp_path: Path) -> None:
    """And it says of what it has not looked at the lengths."""
    texts = ["Too short.", "The ferry leaves at nine. " * 20, "The tide turns at ten. " * 30]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = ["run", "--method", "sinks", "--ratio", "0.5", "--dry-run", "--no-baselines"]
    found = called([*run, "--task", "minidocs", "--data", "some.jsonl"])
    assert found.code == 0, found.err
    rows = [line.split("│") for line in found.out.splitlines() if line.startswith("│")]
    assert [row[9].strip() for row in rows] == ["2", "2"]
    assert "is checked when it runs" not in found.out
    known = called([*run, "--task", "minidocs", "--task", "ruler-vt", "--set", "question=hidden"])
    assert "Whether the texts of ruler-vt are long enough, and for which methods, is checked when it runs." in " ".join(
        known.out.split()
    )
    hub = called([*run, "--task", "minidocs", "--model", "nobody/nothing"])
    assert "the texts of minidocs are long enough" in " ".join(hub.out.split())


def test_lengths_that_a_method_cannot_use(called: Call, model_folder: Callable[..., Path]) -> None:
    run = ["run", "--task", "minidocs", "--limit", "1", "--no-baselines"]
    refused(called, [*run, "--method", "meanpool", "--ratio", "0.98", "--set", "block=64"],
            "a chunk of 100 tokens does not fit in 64")
    refused(called, [*run, "--method", "sentinel", "--ratio", "0.7", "--set", "recent=400"],
            "cannot remove 0.7 of 512 tokens outside the last 400", "at most 0.209")
    data = ["--data", "long.jsonl", "--out", "x", "--length", "256"]
    (Path.cwd() / "long.jsonl").write_text(json.dumps({"text": "The mill by the bridge. " * 200}) + "\n")
    refused(called, ["train", "--model", model_folder("gpt2", context=256), "--method", "ccm-concat", *data],
            "learned positions up to 256", "--length 254")


def test_ratio_beyond_the_layout(called: Call) -> None:
    refused(called, ["run", "--method", "sentinel", "--ratio", "0.97", "--task", "minidocs", "--limit", "1"],
            "cannot remove 0.97", "at most 0.959")
