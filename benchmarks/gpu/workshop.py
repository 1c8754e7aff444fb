"""What cells work with: how large everything is, and models that are made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kvbench.doctor import Subject, make_subject
from kvbench.methods import Method
from kvbench.methods.adapters import fresh_adapter
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.random_models import random_model
from kvbench.planning.profile import ProfileRequest, build_profile_plan
from kvbench.profiling.bench import Bench, make_bench
from kvbench.protocols.block import cut_blocks
from kvbench.store.records import Cell

Made = TypeVar("Made")

VOCABULARY = 97
"""Of the small random model that the matrices are tried on."""


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        model, dtype: what is timed; methods at ``ratio``, after prompts of ``lengths`` in ``batches``.
        tokens: that are written; ``chunk`` those of a prompt that layouts are fed at a time.
        text: tokens of the matrices; ``chunks`` how layouts are streamed, ``steps`` when policies remove.
        ratios: of the layouts in the matrix.
        block, blocks: tokens of the blocks that doctor reads, and how many; 0 for its own choice.
        trained: rows and text tokens of a training step.
        pairs: the most repeats of a timing.
    """

    model: str = "shape:llama-3.2-1b"
    dtype: str = "bfloat16"
    ratio: str = "0.7"
    lengths: tuple[int, int] = (4096, 32768)
    batches: tuple[int, int] = (1, 8)
    tokens: int = 32
    chunk: int = 1024
    text: int = 96
    chunks: tuple[int, ...] = (1, 7, 64)
    steps: tuple[str, ...] = ("1", "7")
    ratios: tuple[str, ...] = ("0.3", "0.7")
    block: int = 0
    blocks: int = 0
    trained: tuple[int, int] = (4, 512)
    pairs: int = 7


SMALL = Scale(
    model="kvbench-tiny", dtype="float32", lengths=(128, 192), batches=(1, 2), tokens=2, chunk=64, text=48,
    chunks=(7,), steps=("7",), ratios=("0.7",), block=32, blocks=2, trained=(1, 32), pairs=1,
)
"""For a CPU, and a minute: everything is run, and no number means anything."""


@dataclass
class Workshop:
    """Models on a device, made when they are first asked for; what cannot be made fails at once from then on."""

    scale: Scale
    device: torch.device
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        """What ``make`` made when it was asked for first, or the error that it raised then."""
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:
                self._made[key] = error
        if isinstance(self._made[key], Exception):
            raise self._made[key]
        return self._made[key]  # type: ignore[no-any-return]

    def subject(self, dtype: str) -> Subject:
        """The embedded model with some text, for the checks of doctor."""
        return self.once(("subject", dtype), partial(self._subject, dtype))

    def _subject(self, dtype: str) -> Subject:
        subject, scale = make_subject("kvbench-tiny", None, str(self.device), dtype), self.scale
        if not scale.block:
            return subject
        some = subject.documents[: scale.blocks]
        pieces = tuple(cut_blocks(document, subject.tokenizer, scale.block).pieces[0] for document in some)
        return replace(subject, documents=some, pieces=pieces)

    def small_model(self, dtype: str) -> nn.Module:
        """Three layers with random weights, two query heads to each head of the cache."""
        return self.once(("small", dtype), partial(_small_model, self.device, getattr(torch, dtype)))

    def ids(self, length: int) -> Tensor:
        """Two rows of random text for the small model."""
        generator = torch.Generator().manual_seed(3)
        return torch.randint(1, VOCABULARY, (2, length), generator=generator).to(self.device)

    def timed(self) -> tuple[Bench, dict[tuple[str, int, int], Cell]]:
        """The model that is timed, and the cells of ``kvbench profile`` by method, length and batch."""
        return self.once("timed", self._timed)

    def _timed(self) -> tuple[Bench, dict[tuple[str, int, int], Cell]]:
        scale = self.scale
        plan = build_profile_plan(ProfileRequest(
            model=scale.model, revision=None, adapters=(), methods=("sinks", "snapkv", "sentinel", "kivi"),
            ratios=(scale.ratio,), seq_lens=scale.lengths, batch_sizes=scale.batches, new_tokens=scale.tokens,
            chunk=scale.chunk, fill="real", repeats=1, rounds=0, warmups=1, budget=None, timeout=1, seed=0,
            options={}, out=None, reports=Path(), baselines=True, device=str(self.device), dtype=scale.dtype,
            threads=0,
        ))
        cells = {(c.method, int(c.options["seq_len"]), int(c.options["batch_size"])): c for c in plan.cells}
        location = plan.model.location if plan.model else scale.model
        return make_bench(location, plan.cells[0], plan.positions), cells


def _small_model(device: torch.device, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=256, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=0,
        pad_token_id=None,
    )
    return random_model(config, torch.device("cpu"), dtype, 0).to(device)


def small_adapter(model: nn.Module, method: Method) -> Adapter:
    """An adapter of the method, of random numbers that change what it acts on, on the model's device."""
    like = next(model.parameters())
    torch.manual_seed(1)
    card = AdapterCard(
        method.name, method.adapter_kinds[0], 4, 4.0, method.n_rows, "small", "", options=method.trained_options
    )
    adapter = fresh_adapter(card, model)
    for pair in adapter.by_path.values():
        nn.init.normal_(pair.b, std=0.2)
    with torch.no_grad():
        for weight in adapter.whole.values():
            weight.mul_(1.1)
    return adapter.eval().requires_grad_(False).to(like.device, like.dtype)
