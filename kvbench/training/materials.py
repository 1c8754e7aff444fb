"""Models and texts that adapters are trained with."""

from __future__ import annotations

from typing import Any

from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import ModelReference, resolve_model
from kvbench.training.data import Stream, load_stream
from kvbench.training.held_out import HeldOut
from kvbench.training.request import AdapterRequest


class Materials:
    """Models and texts, each loaded once however many adapters are trained with them."""

    def __init__(self) -> None:
        self._models: dict[Any, tuple[ModelReference, Loaded]] = {}
        self._streams: dict[Any, Stream] = {}
        self._held_out: dict[Any, HeldOut] = {}

    def model(self, request: AdapterRequest, device: str) -> tuple[ModelReference, Loaded]:
        """The base model, in float32."""
        key = request.model, request.revision, device
        if key not in self._models:
            reference = resolve_model(request.model, request.revision)
            loaded = load_model(reference, device, "float32")
            reference.check_unchanged()
            self._models[key] = reference, loaded
        return self._models[key]

    def stream(self, request: AdapterRequest, tokenizer: Any) -> Stream:
        """The training text."""
        key = request.model, request.revision, request.data, request.column, request.length
        if key not in self._streams:
            self._streams[key] = load_stream(request.data, tokenizer, 2 * request.length, request.column)
        return self._streams[key]

    def held_out(self, request: AdapterRequest, tokenizer: Any) -> HeldOut | None:
        """The held-out text; None if there is none."""
        if request.held_out is None:
            return None
        key = (
            request.model, request.revision, request.held_out, request.column, request.length, request.documents,
            request.recall,
        )
        if key not in self._held_out:
            self._held_out[key] = HeldOut.from_file(
                request.held_out, tokenizer, request.length, request.documents, request.column, request.recall
            )
        return self._held_out[key]
