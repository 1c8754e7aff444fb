"""The fingerprint of a folder: every byte that decides its numbers, quickly, and no other."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers

from kvbench.errors import UserError
from kvbench.models import fingerprint as module
from kvbench.models.fingerprint import check_unchanged, fingerprint, former_fingerprint
from kvbench.models.references import assets, resolve_model
from kvbench.store import hashes
from kvbench.store.cached import cache_folder, read_cache, write_cache
from tests.helpers.models import FAMILIES

SOURCES = Path(transformers.__file__).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What a model folder is made of, with weights of 300 KB."""
    made = tmp_path / "model"
    made.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (made / name).write_text(json.dumps({"eos_token_id": 1}))
    (made / "model.safetensors").write_bytes(bytes(range(250)) * 1200)
    return made


@pytest.fixture
def small_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are large from 100 KB on, and settled at once."""
    monkeypatch.setattr(module, "WHOLE", 100_000)
    monkeypatch.setattr(module, "_EDGE", 1_000)
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)


def flip(path: Path, at: int) -> None:
    """Change one byte in place, and put the time of change back."""
    before = path.stat()
    time.sleep(0.02)  # longer than a tick of the file system's clock
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_the_embedded_model_keeps_the_fingerprint_that_all_cards_and_keys_hold() -> None:
    reference = resolve_model("kvbench-tiny")
    assert reference.fingerprint == "4b7532b0d63c6772"
    cards = list((assets() / "adapters").glob("*/card.json"))
    assert len(cards) >= 8
    for card in cards:
        assert reference.has_fingerprint(json.loads(card.read_text())["base_hash"])
        assert fingerprint(card.parent) == former_fingerprint(card.parent)


def test_every_byte_of_a_large_file_counts_though_size_and_time_are_put_back(folder: Path, small_bound: None) -> None:
    weights, seen = folder / "model.safetensors", {fingerprint(folder)}
    for number, at in enumerate((0, 150_000, 299_999), start=2):
        old = former_fingerprint(folder)
        flip(weights, at)
        assert (former_fingerprint(folder) == old) == (at == 150_000)  # what was not seen
        seen.add(fingerprint(folder))
        assert len(seen) == number
        assert fingerprint(folder) in seen
    flip(weights, 150_000)
    flip(weights, 0)
    flip(weights, 299_999)
    assert fingerprint(folder) in seen


def test_a_large_file_is_read_once(folder: Path, small_bound: None, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(0.02)
    found = fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.delattr(hashes.hashlib, "file_digest")
        assert fingerprint(folder) == found
    kept = read_cache(hashes.CACHE)[str(folder / "model.safetensors")]
    assert kept[-1] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_file_that_has_just_been_written_is_not_trusted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may change again within the same tick of the clock, and look the same."""
    monkeypatch.setattr(module, "WHOLE", 100_000)
    weights = folder / "model.safetensors"
    now = time.time_ns()
    monkeypatch.setattr(hashes, "_state", lambda _: [300_000, 1, now, 1, 1])  # a clock that stands
    found = fingerprint(folder)
    assert str(weights) not in read_cache(hashes.CACHE)
    flip(weights, 150_000)
    assert fingerprint(folder) != found


def test_a_damaged_or_unwritable_cache_is_no_matter(
    folder: Path, small_bound: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "cache"))
    time.sleep(0.02)
    found = fingerprint(folder)
    kept = tmp_path / "cache" / hashes.CACHE
    state = read_cache(hashes.CACHE)[str(folder / "model.safetensors")][:-1]
    for damage in ("", "{", "[1]", "\0", "[" * 100_000, *(
        json.dumps({str(folder / "model.safetensors"): entry})
        for entry in (None, 3, [], [*state, 5], [*state, "abc"], {"a": 1})
    )):
        kept.write_text(damage)
        assert fingerprint(folder) == found
    for place in (folder / "config.json", "/proc/none"):  # a file, and where nobody can write
        monkeypatch.setenv("KVBENCH_CACHE", str(place))
        assert fingerprint(folder) == found


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("KVBENCH_CACHE")
    assert cache_folder() == tmp_path / "shared" / "kvbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache" / "kvbench"


def test_parallel_writers_leave_a_whole_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVBENCH_CACHE", str(tmp_path))

    def write(number: int) -> set[str]:
        write_cache("x.json", {f"{number} {i}": "y" * 50 for i in range(200)})
        return set(read_cache("x.json"))

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(write, range(40)))
    assert all(len(keys) == 200 and len({key.split()[0] for key in keys}) == 1 for keys in seen)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_every_file_that_a_tokenizer_of_transformers_may_read_counts(folder: Path) -> None:
    tables = [
        names for path in SOURCES.glob("models/*/tokenization*.py")
        for names in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(encoding="utf-8"), re.DOTALL)
    ]
    read = {name for table in tables for name in re.findall(r'"([\w.-]+\.[\w-]+)"', table)}
    assert {"merges.txt", "spiece.model", "vocab.json"} <= read
    assert len(read) > 15
    read |= {"special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "cl100k.tiktoken",
             "tokenizer.4.0.0.json", "generation_config.json", "config.4.0.0.json", "model-1-of-2.safetensors",
             "model.safetensors.index.json", "pytorch_model.bin", "adapter_model.safetensors", "adapter_config.json",
             "card.json"}
    for name in sorted(read):
        without = fingerprint(folder)
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_text('{"x": 1}')
        one = fingerprint(folder)
        (folder / name).write_text('{"x": 2}')
        assert len({without, one, fingerprint(folder)}) == 3, name
        (folder / name).unlink() if before is None else (folder / name).write_bytes(before)
        assert fingerprint(folder) == without


def test_what_is_for_people_or_left_by_a_training_does_not_count(folder: Path) -> None:
    found = fingerprint(folder)
    for name in ("README.md", "LICENSE", "LICENSE.txt", "optimizer.pt", "scheduler.pt", "trainer_state.json",
                 "training.json", "log.jsonl", "rng_state.pth", ".gitattributes", "checkpoint.pt"):
        (folder / name).write_text("x")
    (folder / "checkpoint-100").mkdir()
    (folder / "checkpoint-100" / "model.safetensors").write_text("x")
    assert fingerprint(folder) == found


def test_weights_in_folders_of_their_own_count(folder: Path) -> None:
    (folder / "parts").mkdir()
    (folder / "parts" / "one.safetensors").write_text("x")
    plain = fingerprint(folder)
    index = {"weight_map": {"a": "parts/one.safetensors", "b": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    listed = fingerprint(folder)
    (folder / "parts" / "one.safetensors").write_text("y")
    assert len({plain, listed, fingerprint(folder)}) == 3


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_generation_config_counts_once_it_says_more_than_the_config(
    kind: str, model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    made, saved = tmp_path / "copy", model_folder(kind)
    made.mkdir()
    for path in saved.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    generation = made / "generation_config.json"
    written = json.loads(generation.read_text())
    derived = fingerprint(made)
    seen = {derived}
    for number, change in enumerate(
        ({"eos_token_id": 7}, {"eos_token_id": [0, 7]}, {"temperature": 0.5}, {"pad_token_id": 5}), start=2
    ):
        generation.write_text(json.dumps({**written, **change}))
        seen.add(fingerprint(made))
        assert len(seen) == number
    generation.write_text("{")
    assert fingerprint(made) not in seen
    generation.unlink()
    assert fingerprint(made) == derived == former_fingerprint(made)


def test_adapters_with_a_card_of_the_former_rule_are_found(folder: Path, small_bound: None) -> None:
    (folder / "vocab.json").write_text("{}")  # not known then, and no change of the weights either
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        content = (folder / name).read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content[:100_000])
        digest.update(content[-1_000:] if len(content) > 100_000 else b"")
    card = digest.hexdigest()[:16]
    reference = resolve_model(str(folder))
    assert reference.fingerprint != card
    assert reference.has_fingerprint(card)
    assert reference.has_fingerprint(reference.fingerprint)
    assert not reference.has_fingerprint("0" * 16)
    assert not reference.has_fingerprint("")


def test_what_changes_while_a_command_runs_is_refused(folder: Path) -> None:
    found = fingerprint(folder)
    check_unchanged(folder, found)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="have changed since this command began"):
        check_unchanged(folder, found)


def test_a_file_that_cannot_be_read_is_a_sentence(folder: Path) -> None:
    (folder / "generation_config.json").mkdir()
    with pytest.raises(UserError, match=r"generation_config\.json cannot be read: Is a directory"):
        resolve_model(str(folder))


def test_a_path_is_hashed_through_its_link(folder: Path, small_bound: None, tmp_path: Path) -> None:
    """As files of the hub's cache are: what changes is behind the link."""
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    time.sleep(0.02)
    found: Any = fingerprint(folder)
    assert str(blob) in read_cache(hashes.CACHE)
    flip(blob, 150_000)
    assert fingerprint(folder) != found
