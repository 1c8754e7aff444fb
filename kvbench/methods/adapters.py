"""Adapters of methods: with the rows and the writer that a method's adapter has."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from torch import nn

from kvbench.methods.memories.memory import Memory
from kvbench.methods.memories.writer import Writer
from kvbench.methods.registry import make_method
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
    return Adapter.load(folder, model, _writer(read_card(folder), model))


def _writer(card: AdapterCard, model: nn.Module) -> Writer | None:
    method = make_method(card.method, Fraction(0), card.options)
    return method.new_writer(model) if isinstance(method, Memory) else None
