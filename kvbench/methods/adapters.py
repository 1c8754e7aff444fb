"""Adapters of methods: with the rows and the writer that a method's adapter has."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from torch import nn

from kvbench.errors import UserError
from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import Writer
from kvbench.methods.registry import METHODS, make_method
from kvbench.models.adapter import Adapter, AdapterCard, read_card


def fresh_adapter(card: AdapterCard, model: nn.Module, dropout: float = 0.0) -> Adapter:
    """An adapter of the card's method and options that changes nothing yet; its rank is 0 if the writer needs no pairs.

    Raises:
        UserError: no such method, or the model is not one that its writer can be made for.
    """
    method = make_method(card.method, Fraction(0), card.options)
    has_pairs = card.gate != "writer" or (isinstance(method, Memory) and method.low_rank)
    card = card if has_pairs else replace(card, rank=0)
    return Adapter.fresh(card, model, dropout, _writer(card, model))


def load_adapter(folder: Path, model: nn.Module) -> Adapter:
    """Load an adapter for ``model``, in evaluation mode and frozen.

    Raises:
        UserError: a file is missing or damaged, or the shapes do not match the model.
    """
    card = read_card(folder)
    if card.method in METHODS and card.gate not in METHODS[card.method].adapter_kinds:
        raise UserError(
            f"The adapter in {folder} says gate={card.gate!r}, which {card.method} does not have.",
            f"It has {', '.join(METHODS[card.method].adapter_kinds) or 'none'}.",
        )
    try:
        writer = _writer(card, model)
    except UserError as error:
        raise UserError(f"The adapter in {folder} cannot be used: {error.message}", error.hint) from error
    return Adapter.load(folder, model, writer)


def _writer(card: AdapterCard, model: nn.Module) -> Writer | None:
    if card.method not in METHODS or not issubclass(METHODS[card.method], Memory):
        return None
    method = make_method(card.method, Fraction(0), card.options)
    assert isinstance(method, Memory)
    return method.new_writer(model)
