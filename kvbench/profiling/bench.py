"""A model to profile, with what its requests need: adapters, prompts, sizes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import nn

from kvbench.errors import UserError
from kvbench.inference.opening import Text, check_method, open_session, peak_size, prepared
from kvbench.methods import Method, make_method
from kvbench.methods.adapters import fresh_adapter, load_adapter
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.device import pick_device
from kvbench.models.facts import ModelFacts
from kvbench.models.fingerprint import check_unchanged
from kvbench.models.loading import load_model
from kvbench.models.random_models import is_shape, make_shape, random_model
from kvbench.models.references import ModelReference, given_adapter
from kvbench.models.rope import has_rotary
from kvbench.parsing import bytes_of
from kvbench.planning.profile import RANDOM
from kvbench.probe.cached import probed
from kvbench.profiling.memory import Sizes, free_bytes, sizes_of, sizes_of_model
from kvbench.profiling.request import Request, SessionRequest, StockRequest
from kvbench.store.profile_records import AGAIN, FULL, STOCK
from kvbench.store.records import Cell

RANK = 64
"""Rank of random adapters; the same as the default of training."""


@dataclass
class Bench:
    """A model on a device, and what is needed to run requests of cells on it.

    Attributes:
        notes: remarks on the model for the rows, such as random weights.
        facts: what a probe of the model has found; models with random weights are not probed.
    """

    device: torch.device
    dtype: torch.dtype
    model: nn.Module
    sizes: Sizes
    vocabulary: int
    notes: tuple[str, ...]
    facts: ModelFacts
    _adapters: dict[str, Adapter | None] = field(default_factory=dict)

    def adapter_of(self, cell: Cell) -> Adapter | None:
        """The cell's adapter, loaded or with random weights; None if the method has none."""
        if cell.adapter is None:
            return None
        if cell.key not in self._adapters:
            method = method_of(cell)
            if cell.adapter == RANDOM:
                torch.manual_seed(cell.seed)
                card = AdapterCard(
                    cell.method, method.adapter_kinds[0], RANK, float(RANK), method.n_rows, "random", "",
                    options=method.trained_options,
                )
                adapter = fresh_adapter(card, self.model)
            else:
                folder = given_adapter(cell.adapter)
                adapter = load_adapter(folder, self.model)
                check_unchanged(folder, cell.adapter_hash or "")
            self._adapters[cell.key] = adapter.eval().requires_grad_(False).to(self.device, self.dtype)
        return self._adapters[cell.key]

    def request(
        self, cell: Cell, seed: int, overhead: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> Request:
        """Create a request of the cell, with random prompt ids that depend on ``seed``."""
        options = cell.options
        generator = torch.Generator().manual_seed(seed)
        shape = (int(options["batch_size"]), int(options["seq_len"]))
        prompt = torch.randint(self.vocabulary, shape, generator=generator).to(self.device)
        if cell.method == STOCK:
            return StockRequest(self.model, prompt, int(options["new_tokens"]))
        session = open_session(
            self.model, method_of(cell), _text_of(cell), adapter=self.adapter_of(cell), seed=cell.seed,
            chunk=int(options["chunk"]), at_once=True, overhead=overhead,
        )
        return SessionRequest(session, self.model, prompt, int(options["new_tokens"]))

    def ready(self, cell: Cell) -> AbstractContextManager[None]:
        """Prepare the model for texts of the cell's length within the block, with the cell's adapter applied.

        Raises:
            UserError: the cell's method cannot be used on this model.
        """
        check_method(method_of(cell), self.model, cell.model, self.facts)
        length = int(cell.options["seq_len"]) + int(cell.options["new_tokens"])
        return prepared(self.model, self.adapter_of(cell), length)

    def needed(self, cell: Cell) -> int:
        """Approximate lower bound on the bytes that the cell needs, including weights."""
        is_read = cell.options["fill"] != "synthetic"
        found = peak_size(method_of(cell), self.model, _text_of(cell), cell.seed, int(cell.options["chunk"]), is_read)
        return self.sizes.needed(int(cell.options["batch_size"]), found.entries, found.fed)

    def refusal(self, cell: Cell) -> str | None:
        """Why the cell does not fit in free memory; None if it may fit."""
        free = free_bytes(self.device) + self.sizes.weights  # the weights are allocated already
        needed = self.needed(cell)
        if needed <= free:
            return None
        return f"needs at least {bytes_of(needed)} and {bytes_of(free)} are free; nothing was allocated"


def method_of(cell: Cell) -> Method:
    name = FULL if cell.method in (AGAIN, STOCK) else cell.method
    return make_method(name, Fraction(cell.ratio_asked or "0"), cell.options)


def _text_of(cell: Cell) -> Text:
    prompt = int(cell.options["seq_len"])
    return Text(prompt, prompt + int(cell.options["new_tokens"]), range(int(cell.options["batch_size"])))


def make_bench(location: str, cell: Cell, positions: int) -> Bench:
    """Load the model, or create it with random weights.

    Args:
        cell: any cell of the run, for name, device, dtype and seed.
        positions: number of positions that the longest text needs.

    Raises:
        UserError: the model is missing or does not fit in memory, or the text is longer than its learned positions.
    """
    device = pick_device(cell.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # events are recorded on the current device
    if is_shape(location):
        shape = make_shape(location, positions)
        dtype = _dtype(cell.dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
        sizes = sizes_of(shape.config, dtype)
        _check_weights(location, sizes, device)
        notes: tuple[str, ...] = ("random weights",)
        if shape.extended:
            notes += (f"positions extended from {shape.context} to {shape.extended}",)
        elif positions > shape.context:
            notes += (f"beyond the context of {shape.context}",)
        model = random_model(shape.config, device, dtype, cell.seed)
        facts = ModelFacts(type(model).__name__)
        return Bench(device, dtype, model, sizes, int(shape.config.vocab_size), notes, facts)
    reference = ModelReference(cell.model, location, cell.revision, cell.model_hash)
    loaded = load_model(reference, cell.device, cell.dtype)
    reference.check_unchanged()
    facts = probed(loaded, reference.fingerprint)
    facts.check(cell.model)
    shorter = f"Use --seq-len {max(32, (facts.window or 0) - int(cell.options['new_tokens']))} or less."
    facts.check_length(cell.model, positions, shorter)
    notes = ()
    if positions > loaded.context:
        if not has_rotary(loaded.model):
            raise UserError(
                f"Texts of {positions} tokens do not fit {cell.model}: it has learnt {loaded.context} positions.",
                f"Use --seq-len {max(32, loaded.context - int(cell.options['new_tokens']))} or less, or time its "
                "shape with random weights, such as --model shape:gpt2.",
            )
        notes = (f"beyond the context of {loaded.context}: time and memory only",)
    dtype = next(loaded.model.parameters()).dtype
    sizes = sizes_of_model(loaded.model, loaded.vocabulary)
    return Bench(device, dtype, loaded.model, sizes, loaded.vocabulary, notes, facts)


def _dtype(name: str, default: torch.dtype) -> torch.dtype:
    return default if name == "auto" else getattr(torch, name)


def _check_weights(model: str, sizes: Sizes, device: torch.device) -> None:
    free = free_bytes(device)
    if sizes.weights > free:
        raise UserError(
            f"The weights of {model} take {bytes_of(sizes.weights)}, and {bytes_of(free)} are free on {device}.",
            "Choose a smaller shape, or --dtype bfloat16.",
        )

