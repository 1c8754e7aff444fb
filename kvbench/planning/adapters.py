"""Chooses the adapter of each method: a given one whose card names the method, else a shipped one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvbench.errors import UserError
from kvbench.methods import METHODS, Method
from kvbench.models.adapter import ON_TEXT, AdapterCard, read_card
from kvbench.models.references import ModelReference, find_adapter, given_adapter


class Entry(NamedTuple):
    """A method of a request, its role, and its adapter once it has been chosen.

    Attributes:
        variant: its own options that change a value, such as ``window=16``.
    """

    method: Method
    role: str
    adapter: Path | None = None
    variant: str = ""


def known_adapter(method: Method, model: ModelReference) -> Path:
    """The adapter of a method and model that lies where it need not be named, preferably for the method's options.

    Raises:
        UserError: there is none.
    """
    bound, known = method.trained_options, method.options()
    return find_adapter(method.name, model, bound, {name: known[name].default for name in bound})


class Adapters:
    """The adapters available to a request: those given, each for the method on its card, and the shipped ones."""

    def __init__(self, given: Sequence[str], model: ModelReference) -> None:
        self.model = model
        self.given = {folder: read_card(folder) for folder in map(given_adapter, given)}

    def has(self, method: Method) -> bool:
        """Whether an adapter was given for the method."""
        return any(card.method == method.name for card in self.given.values())

    def given_to(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the entries with their adapters; add ``adapted`` if an adapter acts on text tokens too.

        Raises:
            UserError: an adapter is missing, unused, or trained for another model or other options.
        """
        found = [
            entry._replace(adapter=self._folder(entry.method) if entry.method.adapter_kinds else None)
            for entry in entries
        ]
        on_text = [e.adapter for e in found if e.adapter is not None and read_card(e.adapter).gate in ON_TEXT]
        if on_text and not any(entry.method.name == "adapted" for entry in found):
            found.append(Entry(METHODS["adapted"](), "control", self._control(on_text[0])))
        used = {entry.adapter for entry in found}
        for folder, card in self.given.items():
            if folder not in used:
                asked = any(entry.method.name == card.method for entry in found)
                raise UserError(
                    f"The adapter in {folder} was trained for {card.method!r}, "
                    + ("for which another one is given." if asked else "which is not asked for."),
                    "Leave one out." if asked else f"Add --method {card.method}, or give another --adapter.",
                )
        return found

    def _folder(self, method: Method) -> Path:
        mine = [f for f, card in self.given.items() if card.method == method.name]
        if method.name == "adapted":
            mine = mine or [f for f, card in self.given.items() if card.gate in ON_TEXT]
        bound, known = method.trained_options, method.options()
        mine.sort(key=lambda f: any(self.given[f].options.get(k, known[k].default) != v for k, v in bound.items()))
        folder = mine[0] if mine else known_adapter(method, self.model)
        self._check(folder, read_card(folder), method)
        return folder

    def _control(self, tuned: Path) -> Path:
        """The adapter of ``adapted``, the effect of tuning alone: one trained for it, else ``tuned`` itself."""
        made = [folder for folder, card in self.given.items() if card.method == "adapted"]
        if made or tuned in self.given:
            return made[0] if made else tuned
        try:
            return find_adapter("adapted", self.model, {})
        except UserError:
            return tuned

    def _check(self, folder: Path, card: AdapterCard, method: Method) -> None:
        model = self.model
        known = bool(model.fingerprint and card.base_hash)
        if not (model.has_fingerprint(card.base_hash) if known else card.base_model == model.short_name):
            raise UserError(
                f"The adapter in {folder} was trained on another base model "
                f"({card.base_model}, {card.base_hash}), not on {model.name} ({model.fingerprint}).",
                f"Use --revision {card.base_hash}." if known and card.base_model == model.name and model.revision else
                f"Train one: kvbench train --method {method.name} --model {model.name} "
                f"--data TEXTS.jsonl --out ADAPTER.",
            )
        for name, wanted in method.trained_options.items():
            trained = card.options.get(name, method.options()[name].default)
            if trained != wanted:
                raise UserError(
                    f"The adapter in {folder} was trained with {name}={trained}, and {name}={wanted} is asked for.",
                    f"Use --set {name}={trained}, or train one with --set {name}={wanted}.",
                )
