"""Where a model is, decided without PyTorch: embedded, a folder, or the hub; and its fingerprint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from kvbench.errors import UserError

DEFAULT_MODEL = "kvbench-tiny"
"""The model that is embedded."""

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WHOLE, _EDGE = 64 << 20, 1 << 20
_SMALL_FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "card.json"}


@dataclass(frozen=True)
class ModelReference:
    """A model by name.

    Attributes:
        name: as the user gave it.
        location: what ``from_pretrained`` takes: a folder or a hub id.
        revision: branch, tag or commit on the hub.
        fingerprint: of the files in the folder; empty for the hub.
        weight_bytes: size of the weight files; 0 for the hub.
    """

    name: str
    location: str
    revision: str | None
    fingerprint: str
    weight_bytes: int = 0

    @property
    def short_name(self) -> str:
        """The hub id, or the last part of a path."""
        return Path(self.location).name if self.fingerprint else self.name


def assets() -> Path:
    return Path(str(files("kvbench").joinpath("assets")))


def resolve_model(name: str, revision: str | None = None) -> ModelReference:
    """Find out where a model is.

    Raises:
        UserError: a path that is not there, or a name that can be neither a path nor a hub id.
    """
    folder = assets() / DEFAULT_MODEL if name == DEFAULT_MODEL else Path(name).expanduser()
    if folder.is_dir() and revision is not None:
        raise UserError(f"--revision is for models on the hub; {name} is a folder.", "Leave it out.")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"The model folder {folder} has no config.json.",
                "Give a folder written by save_pretrained.",
            )
        size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
        return ModelReference(name, str(folder), None, fingerprint(folder), size)
    if folder.exists():
        raise UserError(f"--model {name} is a file.", "Give the folder that holds it, or a hub id.")
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not _HUB_ID.match(name):
        raise UserError(
            f"There is no model folder {name}.", f"Give a folder, a hub id, or {DEFAULT_MODEL!r}."
        )
    return ModelReference(name, name, revision, "")


def fingerprint(folder: Path) -> str:
    """Hash of a model or adapter folder: settings, tokenizer, weights.

    Of weight files over 64 MiB only the beginning, the last MiB and the size are read, which keeps
    this instant for large models.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in {".safetensors", ".bin"} or path.name in _SMALL_FILES:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                digest.update(file.read(_WHOLE))
                if path.stat().st_size > _WHOLE:
                    file.seek(-_EDGE, 2)
                    digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]


def given_adapter(name: str) -> Path:
    """The adapter folder that the user named: a path, or the name of a shipped one.

    Raises:
        UserError: it is not there.
    """
    shipped = assets() / "adapters" / name
    folder = shipped if "/" not in name and shipped.is_dir() else Path(name).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"There is no adapter folder {name}.", "Give the folder that 'kvbench train --method METHOD' wrote."
        )
    return folder


def find_adapter(method: str, model: ModelReference, options: Mapping[str, str]) -> Path:
    """The adapter shipped for a method and model, with those trained options if there is one.

    Of several, the first by name: the others have a longer one and are for ``--adapter``.

    Raises:
        UserError: there is none; the command that trains one is named.
    """
    found: list[tuple[bool, Path]] = []
    for card in sorted((assets() / "adapters").glob("*/card.json")):
        made_for = json.loads(card.read_text(encoding="utf-8"))
        if (made_for["method"], made_for["base_hash"]) == (method, model.fingerprint):
            trained = made_for.get("options", {})
            found.append((all(trained.get(k) == v for k, v in options.items()), card.parent))
    if found:
        return max(found, key=lambda item: item[0])[1]
    raise UserError(
        f"Method {method!r} needs an adapter trained for {model.name}, and none was given.",
        _train_hint(method, model.name),
    )


def _train_hint(method: str, model: str) -> str:
    return (
        f"Train one: kvbench train --method {method} --model {model} --data TEXTS.jsonl "
        f"--out ADAPTER; then pass --adapter ADAPTER."
    )
