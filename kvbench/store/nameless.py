"""What a run says of the machine and the person that measured it, taken out: a path becomes its last component."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvbench.store.manifest import Manifest
from kvbench.store.records import Cell, Failure

_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SOURCE = re.compile(rf"(hub|embedded|synthetic) {_HUB.pattern}")
"""Sources of documents that are not paths."""
_SEPARATOR = re.compile(r"[\\/]+")
_ABSOLUTE = re.compile(r"(?<![\w.:/\\])(?:~\w*|[A-Za-z]:)?[\\/](?:[^\s'\"\\/]*[\\/])*(?=[^\s'\"\\/])")
"""An absolute path within a sentence, up to its last component."""


def named_anew(manifest: Manifest) -> dict[str, Cell]:
    """Key -> the cell with models and adapters called after their folders instead of by their paths.

    Models that would be called alike are numbered. Since a model's name is part of the key, such cells get other keys.
    """
    names: dict[str, str] = {}
    for cell in manifest.cells:
        if cell.model not in names:
            short = _last(cell.model) if _is_path(cell) else cell.model
            taken = sum(name.split(" #")[0] == short for name in names.values())
            names[cell.model] = f"{short} #{taken + 1}" if taken else short
    return {
        cell.key: replace(
            cell, model=names[cell.model], adapter=cell.adapter and _last(cell.adapter),
            options={key: _in_sentence(value, names) for key, value in cell.options.items()},
        )
        for cell in manifest.cells
    }


def without_paths(manifest: Manifest, cells: Mapping[str, Cell]) -> Manifest:
    """The manifest without paths.

    Args:
        cells: as :func:`named_anew` returns them.
    """
    pairs = [(cell, cells[cell.key]) for cell in manifest.cells]
    models, settings = {a.model: b.model for a, b in pairs}, {a.setting: b.setting for a, b in pairs}
    kept = {name for name in models.values() if "/" in name}
    kept |= {value.partition("@")[0] for _, cell in pairs for value in cell.options.values() if "/" in value}
    return replace(
        manifest,
        cells=tuple(cell for _, cell in pairs),
        command=tuple(word if word in kept else _word(word) for word in manifest.command),
        sources={
            task: source if _SOURCE.fullmatch(source) else _last(source) for task, source in manifest.sources.items()
        },
        tasks={settings[name]: info for name, info in manifest.tasks.items() if name in settings},
        profiles={
            settings[name]: replace(info, notes=tuple(_in_sentence(note, models) for note in info.notes))
            for name, info in manifest.profiles.items() if name in settings
        },
        probes={models[name]: _within(probe, models) for name, probe in manifest.probes.items() if name in models},
        machine=manifest.machine and replace(
            manifest.machine, notes=tuple(_in_sentence(note, models) for note in manifest.machine.notes),
            probe=_within(manifest.machine.probe, models),
        ),
        environment=_within(manifest.environment, models),
    )


def without_message(failure: Failure, before: Cell, after: Cell) -> Failure:
    """The failure of a cell as others may read it: messages of programs, which may hold anything, are left out."""
    if not failure.left_out:
        return Failure(after.key, f"{after.label}: failed; the message is not part of the bundle.")
    names = {before.model: after.model}
    return Failure(after.key, _in_sentence(failure.error, names), _in_sentence(failure.hint, names), left_out=True)


def _is_path(cell: Cell) -> bool:
    """Whether a model was given as a path: names on the hub have a commit, and at most one slash."""
    is_folder = bool(cell.model_hash) and cell.revision is None
    return not _HUB.fullmatch(cell.model) or ("/" in cell.model and is_folder)


def _last(path: str) -> str:
    return next((part for part in reversed(_SEPARATOR.split(path)) if part), path)


def _word(word: str) -> str:
    """A word of a command line, which may be ``--option=path`` or ``key=path``."""
    if not _SEPARATOR.search(word):
        return word
    key, equals, value = word.partition("=")
    return f"{key}={_last(value)}" if equals and not _SEPARATOR.search(key) else _last(word)


def _in_sentence(text: str, models: Mapping[str, str]) -> str:
    for path, name in models.items():
        if path != name:
            text = text.replace(path, name)
    return _ABSOLUTE.sub("", text)


def _within(value: Any, models: Mapping[str, str]) -> Any:
    """All texts within lists and mappings, without paths."""
    match value:
        case str():
            return _in_sentence(value, models)
        case dict():
            return {key: _within(inner, models) for key, inner in value.items()}
        case list() | tuple():
            return [_within(inner, models) for inner in value]
    return value
