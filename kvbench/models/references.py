"""Finding a model (embedded, a folder, or a commit on the hub) without importing PyTorch."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

import kvbench
from kvbench.errors import UserError
from kvbench.models.fingerprint import check_snapshot, check_unchanged, fingerprint, former_fingerprint
from kvbench.models.gguf import dequantised
from kvbench.models.packaged import PACKAGED
from kvbench.models.sharing import MARK, Sharing
from kvbench.models.sizes import sizes_of
from kvbench.store.cached import cache_folder

DEFAULT_MODEL = "kvbench-tiny"
"""The model that is part of the package."""

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


@dataclass(frozen=True)
class ModelReference:
    """A model that the user named, and where it is.

    Attributes:
        name: as the user gave it.
        location: argument for ``from_pretrained``: a folder or a hub id.
        revision: the commit on the hub; the requested branch, tag or None if neither the hub nor its cache could
            resolve it to a commit; None for a folder.
        fingerprint: hash of the files in the folder, or the commit on the hub; empty if unknown.
        weight_bytes: size of the safetensors files; 0 for the hub.
        shown: what rows call it; empty for what its folder is called.

    A name may end in ``:share=`` and how layers share entries (:mod:`kvbench.models.sharing`); so does the fingerprint.
    """

    name: str
    location: str
    revision: str | None
    fingerprint: str
    weight_bytes: int = 0
    shown: str = ""

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder, and not on the hub."""
        return bool(self.fingerprint) and self.revision is None

    @property
    def share(self) -> str:
        """How layers share entries: a pattern, or a folder that was trained so; empty if they do not."""
        return parted(self.name)[1]

    @property
    def pattern(self) -> str:
        """Which layers share: what was asked for, or what the folder was trained with.

        Raises:
            UserError: the folder was trained for another model, or without sharing.
        """
        card = expand_home(self.share) / "card.json"
        if not card.is_file():
            return self.share
        try:
            made_for = str(json.loads(card.read_text(encoding="utf-8"))["base_hash"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"The adapter card {card} is damaged.", "Train it again.") from error
        own, _, pattern = made_for.partition(MARK)
        if not pattern or own != self.fingerprint.partition(MARK)[0]:
            raise UserError(
                f"{self.share} was not trained with shared layers of {parted(self.name)[0]}.",
                "Train it: kvbench train --method adapted --set adapter=full --share pairs.",
            )
        return pattern

    @property
    def short_name(self) -> str:
        """The hub id, or the last component of the path; of a GGUF file, with the word ``dequantised``."""
        if not self.is_folder:
            return self.name
        return (self.shown or Path(self.location).name) + (f"{MARK}{Path(self.share).name}" if self.share else "")

    def has_fingerprint(self, written: str) -> bool:
        """Whether a stored fingerprint is this model's, by the current rule or by that of kvbench 0.1."""
        return written == self.fingerprint or (self.is_folder and written == self._former)

    @cached_property
    def _former(self) -> str:
        return former_fingerprint(Path(self.location)) + self._shared

    @property
    def _shared(self) -> str:
        """What sharing adds to a fingerprint."""
        return f"{MARK}{self.fingerprint.partition(MARK)[2]}" if self.share else ""

    def check_unchanged(self) -> None:
        """Check, after loading, that the files still match the fingerprint.

        Raises:
            UserError: they have changed, or it is unknown which commit was loaded.
        """
        if not self.fingerprint:
            raise UserError(
                f"The Hugging Face hub can be reached only now, and has not said which commit {self.name} is.",
                "Run the same command again.",
            )
        own = self.fingerprint.partition(MARK)[0]
        if self.is_folder:
            check_unchanged(Path(self.location), own)
        else:
            _check_kept(parted(self.name)[0], own)
        if self.share and _share_mark(self.share) != self.fingerprint.partition(MARK)[2]:
            raise UserError(
                f"The files in {self.share} have changed since this command began.",
                "Run it again once they are complete.",
            )


def expand_home(name: str) -> Path:
    """The path, with ``~`` expanded to the home folder.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"The path {name} cannot be followed: there is no such home.", "Write it out.") from error


def assets() -> Path:
    return Path(str(files("kvbench").joinpath("assets")))


def parted(name: str) -> tuple[str, str]:
    """The name of a model, and how its layers share entries; empty if they do not."""
    base, _, share = name.partition(MARK)
    return base, share


def resolve_model(name: str, revision: str | None = None) -> ModelReference:
    """Find a model by its name: the embedded one, one of PyPI, a folder, a GGUF file, or a hub id.

    Raises:
        UserError: the path is missing or cannot be read, or the name can be neither a path nor a hub id.
    """
    base, share = parted(name)
    found = _resolve(base, revision)
    if MARK not in name:
        return found
    known = found.fingerprint and f"{found.fingerprint}{MARK}{_share_mark(share)}"
    named = replace(found, name=f"{found.name}{MARK}{share}", fingerprint=known)
    sizes = sizes_of(Path(found.location)) if found.is_folder else None
    Sharing.parse(named.pattern, sizes.layers if sizes else None)
    return named


def _share_mark(share: str) -> str:
    """What stands for a way of sharing in a fingerprint: the pattern, or a hash of the folder that was trained so."""
    folder = expand_home(share)
    return fingerprint(folder) if (folder / "card.json").is_file() else share


def _resolve(name: str, revision: str | None) -> ModelReference:
    """The model without what it shares."""
    if name in PACKAGED:
        return _reference(name, PACKAGED[name].folder(), revision, name)
    folder = assets() / DEFAULT_MODEL if name == DEFAULT_MODEL else expand_home(name)
    if folder.suffix == ".gguf" and folder.is_file():
        return _reference(f"{name} (dequantised)", dequantised(folder), revision, f"{folder.stem}-dequantised")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"The model folder {folder} has no config.json.",
                "Give a folder written by save_pretrained.",
            )
        return _reference(name, folder, revision)
    if folder.exists():
        raise UserError(f"--model {name} is a file.", "Give the folder that holds it, or a hub id.")
    if folder.suffix == ".gguf":
        raise UserError(f"There is no GGUF file {name}.", _near_files(folder))
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or not _HUB_ID.match(name):
        raise UserError(
            f"There is no model folder {name}.", f"Give a folder, a hub id, or {DEFAULT_MODEL!r}."
        )
    commit = _commit(name, revision)
    if commit is not None:
        _check_kept(name, commit)
    return ModelReference(name, name, commit or revision, commit or "")


def _near_files(path: Path) -> str:
    """What to do about a file that is not there: the names of its kind in its folder."""
    there = sorted(file.name for file in path.parent.glob(f"*{path.suffix}"))
    near = difflib.get_close_matches(path.name, there, n=1)
    if near:
        return f"Did you mean {path.parent / near[0]}?"
    names = ", ".join(there[:10]) or "none"
    return f"Check the path; in {path.parent.resolve()} there is {names}."


def _reference(name: str, folder: Path, revision: str | None, shown: str = "") -> ModelReference:
    """A model in a folder.

    Raises:
        UserError: a revision is given, or the folder cannot be read.
    """
    if revision is not None:
        raise UserError(f"--revision is for models on the hub; {name} is not there.", "Leave it out.")
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return ModelReference(name, str(folder), None, fingerprint(folder), size, shown)


def _check_kept(name: str, commit: str) -> None:
    """Check that the hub's cached files of a commit are intact.

    Raises:
        UserError: a file is damaged.
    """
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=commit)
    if isinstance(config, str):
        check_snapshot(Path(config).parent)


def _commit(name: str, revision: str | None) -> str | None:
    """Resolve a branch or tag of a hub model to a commit: the current one, or the one in the local cache if offline.

    None if neither the hub nor its cache knows the model; the error of loading it then says why.

    Raises:
        UserError: it is an adapter: its commit does not fix the commit of its base model.
    """
    commit = _commit_with(name, "config.json", revision)
    if commit is not None and _commit_with(name, "adapter_config.json", commit) is not None:
        raise UserError(
            f"{name} on the hub is an adapter of another model.",
            "Merge it into its base model, and give the folder of the result.",
        )
    return commit


def _commit_with(name: str, file: str, revision: str | None) -> str | None:
    """The commit of a revision if it contains the file, by the hub or its cache; cached commit ids need no look-up."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    is_fixed = revision is not None and _COMMIT.match(revision) is not None
    with suppress(Exception):  # the library raises a different type for each kind of failure
        kept = try_to_load_from_cache(name, file, revision=revision)  # a path, None, or a marker that it does not exist
        if kept is None or not is_fixed:
            with suppress(Exception):  # also if the file is missing, or offline
                return get_hf_file_metadata(hf_hub_url(name, file, revision=revision)).commit_hash
        return Path(kept).parent.name if isinstance(kept, str) else None
    return None


def given_adapter(name: str) -> Path:
    """The adapter folder that the user named: a shipped one, a path, or the name of one in :func:`adapter_folders`.

    Raises:
        UserError: there is no such folder.
    """
    is_name = "/" not in name
    first, *others = (place / name for place in adapter_folders())
    choices = [*([first] if is_name else []), expand_home(name), *(others if is_name else [])]
    folder = next((choice for choice in choices if choice.is_dir()), expand_home(name))
    if not folder.is_dir():
        raise UserError(
            f"There is no adapter folder {name}.", "Give the folder that 'kvbench train --method METHOD' wrote."
        )
    return folder


def adapter_name(folder: Path) -> str:
    """What :func:`given_adapter` finds a folder by: its name if that is enough, as on other machines, else its path."""
    try:
        is_enough = given_adapter(folder.name).resolve() == folder.resolve()
    except UserError:
        is_enough = False
    in_a_known_place = folder.resolve().parent in [place.resolve() for place in adapter_folders()]
    return folder.name if is_enough and in_a_known_place else str(folder)


def adapter_folders() -> list[Path]:
    """Where adapters lie that need no path: in the package, in ``adapters/`` of a checkout, and in kvbench's cache."""
    package = Path(kvbench.__file__).parent
    checkout = [package.parent / "adapters"] if (package.parent / "pyproject.toml").exists() else []
    found = [assets() / "adapters", *checkout]
    with suppress(RuntimeError):  # there is no home directory
        found.append(cache_folder() / "adapters")
    return found


def find_adapter(
    method: str, model: ModelReference, options: Mapping[str, str], defaults: Mapping[str, str] | None = None
) -> Path:
    """The adapter in :func:`adapter_folders` for a method and model, preferably one trained with these options.

    Of several, it is the first by name; the others have longer names and can be given with ``--adapter``.

    Args:
        defaults: values of options that a card does not name, since they were added after it was written.

    Raises:
        UserError: there is none; the hint names the command that trains one.
    """
    found: list[tuple[bool, Path]] = []
    damaged = []
    for card in (card for place in adapter_folders() for card in sorted(place.glob("[!.]*/card.json"))):
        try:
            made_for = json.loads(card.read_text(encoding="utf-8"))
            if made_for["method"] == method and model.has_fingerprint(made_for["base_hash"]):
                trained = {**(defaults or {}), **made_for.get("options", {})}
                found.append((all(trained.get(k) == v for k, v in options.items()), card.parent))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            damaged.append(card)
    if found:
        return max(found, key=lambda item: item[0])[1]
    if damaged:
        raise UserError(
            f"Method {method!r} needs an adapter, and the adapter card {damaged[0]} is damaged.",
            "Train it again, or delete that folder.",
        )
    raise UserError(
        f"Method {method!r} needs an adapter trained for {model.name}, and none was given.",
        _train_hint(method, model.name),
    )


def _train_hint(method: str, model: str) -> str:
    return (
        f"Train one: kvbench train --method {method} --model {model} --data TEXTS.jsonl "
        f"--out ADAPTER; then pass --adapter ADAPTER."
    )
