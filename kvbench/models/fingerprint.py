"""The fingerprint of a model or adapter folder: a hash of every file that can change results, and of no other."""

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
"""Files of up to this many bytes are read every time; for larger ones a hash is cached between commands."""

DEQUANTISED = "dequantised.json"
"""File in a folder that was made of a GGUF file: the hash of that file, the number of the conversion, and its result's
hash."""

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
"""Defaults that transformers writes into a generation config if the config that it is made from has no such field."""

_FORMER = {"config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "card.json"}
_EDGE = 1 << 20


def fingerprint(folder: Path) -> str:
    """The identity of a folder: a hash of its contents, or what a dequantised model was made of.

    Raises:
        UserError: a file cannot be read, or is not what was written when the model was dequantised.
    """
    card, found = _json(folder / DEQUANTISED), contents_hash(folder)
    if not card:
        return found
    if card.get("contents") != found:
        raise UserError(f"The dequantised model in {folder} is damaged.", "Delete the folder: it is made again.")
    return f"{str(card['gguf'])[:16]}.{card['conversion']}"


def contents_hash(folder: Path) -> str:
    """Hash names and contents of a folder's weights, settings and tokenizer; 16 hexadecimal digits.

    Documentation and leftovers of training do not count (but ``*.bin`` always does). Nor does a
    ``generation_config.json`` that only repeats ``config.json``: transformers writes it when it saves a model, and
    derives the same if the file is missing. Any other generation config counts byte for byte, since it sets the
    end tokens.

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
    """The hash of kvbench 0.1, which the cards of older adapters hold.

    It covered fewer files, and of files over 64 MiB only the first 64 MiB, the last MiB and the size.
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
    """Check that a folder has not changed since the command was planned.

    Raises:
        UserError: its files have changed.
    """
    if fingerprint(folder) != expected:
        raise UserError(
            f"The files in {folder} have changed since this command began.",
            "Run it again once they are complete; what was measured before is kept apart.",
        )


def check_snapshot(snapshot: Path) -> None:
    """Check files in the hub's cache, which are stored under the hash of their content.

    On systems without symbolic links files are copied instead; such copies have other names and are not checked.

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
    """The files that the fingerprint covers, by their path relative to the folder."""
    patterns = (*_WEIGHTS, *_SETTINGS, *_TOKENIZER)
    names = {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    config = _json(folder / "config.json")
    if _says_nothing(_json(folder / "generation_config.json"), config):
        names.discard("generation_config.json")
    names |= {str(config["transformers_weights"])} if "transformers_weights" in config else set()
    for index in [name for name in names if name.endswith(".index.json")]:  # shards may be in subfolders
        parts = _json(folder / index).get("weight_map")
        names |= {str(part) for part in parts.values()} if isinstance(parts, dict) else set()
    return {name: folder / name for name in names if (folder / name).is_file()}


def _says_nothing(generation: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a generation config only repeats the config."""
    known = {**_UNSAID, **config}
    return bool(generation) and all(
        known.get(name) == value for name, value in generation.items() if name not in _REMARKS
    )


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
