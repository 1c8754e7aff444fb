"""The fingerprint of a model or adapter folder: every byte that decides its numbers, and no other."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from kvbench.errors import UserError
from kvbench.store.hashes import file_hashes

WHOLE = 64 << 20
"""Bytes up to which a file is read every time; a larger one counts by its hash, which is kept between commands."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")
_SETTINGS = ("config.json", "config.*.json", "generation_config.json", "adapter_config.json", "card.json")
_TOKENIZER = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json", "*.jinja",
    "additional_chat_templates/*.jinja", "*.model", "*.tiktoken", "*.spm", "*.tokenizer", "*.codes", "*vocab*.json",
    "vocab*.txt", "merges.txt", "dict.txt", "emoji.json", "byte_maps.json", "normalizer.json", "word_*.json",
    "tekken.json",
)

_REMARKS = ("_from_model_config", "transformers_version")
_UNSAID = {"output_attentions": False, "output_hidden_states": False, "use_cache": True}
"""What transformers writes into a generation config that was made of a config which does not mention it."""

_FORMER = {"config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "card.json"}
_EDGE = 1 << 20


def fingerprint(folder: Path) -> str:
    """Hash of a model or adapter folder, 16 hexadecimal digits: weights, settings, tokenizer, by name and content.

    Files for people, and what a training leaves behind, do not count (``*.bin`` always does). Neither does a
    ``generation_config.json`` that says nothing beyond ``config.json``: it is what transformers makes of that when
    it saves a model, and what it would make of it if the file were not there. Any other counts byte for byte,
    since texts end where it says.

    Raises:
        UserError: a file cannot be read.
    """
    try:
        files = _counted(folder)
        large = file_hashes([path for path in files.values() if path.stat().st_size > WHOLE])
        digest = hashlib.sha256()
        for name, path in sorted(files.items()):
            digest.update(b"%s\0%d\0" % (os.fsencode(name), path.stat().st_size))
            digest.update(large[path].encode() if path in large else path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{error.filename or folder} cannot be read: {error.strerror}.", "See that it is there and may be read."
        ) from error
    return digest.hexdigest()[:16]


def former_fingerprint(folder: Path) -> str:
    """The hash of kvbench 0.1, which adapters' cards may hold.

    Of files over 64 MiB it read the beginning, the last MiB and the size, and it knew fewer files.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".bin"} or path.name in _FORMER:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(WHOLE))
                if path.stat().st_size > WHOLE:
                    file.seek(-_EDGE, os.SEEK_END)
                    digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]


def check_unchanged(folder: Path, expected: str) -> None:
    """See that a folder still is what was planned with.

    Raises:
        UserError: its files have changed meanwhile.
    """
    if fingerprint(folder) != expected:
        raise UserError(
            f"The files in {folder} have changed since this command began.",
            "Run it again once they are complete; what was measured before is kept apart.",
        )


def check_snapshot(snapshot: Path) -> None:
    """See that files in the hub's cache are what their commit says: each is kept under the hash of its content.

    Copies, which some systems make where they have no links, bear no such name and are not checked.

    Raises:
        UserError: a file is damaged.
    """
    blobs = {path.resolve() for path in _counted(snapshot).values() if path.is_symlink()}
    by_git, by_sha256 = ([blob for blob in blobs if re.fullmatch(rf"[0-9a-f]{{{n}}}", blob.name)] for n in (40, 64))
    hashes = file_hashes(by_sha256) | {blob: _git_hash(blob) for blob in by_git}
    for blob, found in sorted(hashes.items()):
        if blob.name != found:
            raise UserError(
                f"The hub's cache is damaged: {blob} is not what its name says.",
                "Delete it, and run the command again where the hub can be reached.",
            )


def _git_hash(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _counted(folder: Path) -> dict[str, Path]:
    """By their names in the folder, the files that count."""
    patterns = (*_WEIGHTS, *_SETTINGS, *_TOKENIZER)
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    config = _json(folder / "config.json")
    if _says_nothing(_json(folder / "generation_config.json"), config):
        names.discard("generation_config.json")
    names |= {str(config["transformers_weights"])} if "transformers_weights" in config else set()
    for index in [name for name in names if name.endswith(".index.json")]:  # its parts may lie deeper
        parts = _json(folder / index).get("weight_map")
        names |= {str(part) for part in parts.values()} if isinstance(parts, dict) else set()
    return {name: folder / name for name in names if (folder / name).is_file()}


def _says_nothing(generation: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a generation config repeats the config."""
    known = {**_UNSAID, **config}
    return bool(generation) and all(
        known.get(name) == value for name, value in generation.items() if name not in _REMARKS
    )


def _json(path: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
