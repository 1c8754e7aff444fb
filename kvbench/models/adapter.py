"""Adapters: what a trained method adds to a frozen base model, and the folder it is saved in.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json`` in PEFT's format (loaded by
PEFT, they act as plain LoRA on every token), ``embeddings.safetensors`` with the rows of the special
tokens, and ``card.json`` with the method, base model, training data and held-out scores. If the whole
model was trained, ``weights.safetensors`` replaces PEFT's files. What writes a memory that is computed from text is in
``writer.safetensors``.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.models.embeddings import spread_of
from kvbench.models.lora import Gate, GatedLinear, LowRank, attention_linears, fan, swapped, with_weights
from kvbench.parsing import parse_json

CARD = "card.json"
WEIGHTS = "adapter_model.safetensors"
ROWS = "embeddings.safetensors"
WHOLE = "weights.safetensors"
WRITER = "writer.safetensors"
ON_TEXT = ("plain", "full")
"""Kinds of adapters that change how text itself is read."""
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter is and where it comes from.

    Attributes:
        method: the compression method it was trained for.
        gate: what was trained: ``gated`` (low-rank pairs that act on special tokens only),
            ``plain`` (pairs that act on every token), ``full`` (every weight of a small model) or ``writer`` (what
            writes a memory; pairs act on the text that it reads, and the model that reads the memory is the base
            model).
        rank: rank of each low-rank pair; 0 for none, unused for ``full``.
        alpha: LoRA's alpha; low-rank updates are scaled by ``alpha / rank``.
        n_rows: number of trained embedding rows (two for Sentinel: open, close).
        options: method options that it was trained with and requires, such as ``n_comp``.
        base_model: name of the base model.
        base_hash: fingerprint of the base model's files.
        training: steps, tokens, seed, optimiser, data with hashes, loss.
        held_out: scores on data that it was not trained on.
    """

    method: str
    gate: str
    rank: int
    alpha: float
    n_rows: int
    base_model: str
    base_hash: str
    training: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, Any] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    schema: int = 1


class Adapter(nn.Module):
    """Low-rank pairs for the attention projections (or a copy of every weight), and embedding rows.

    Args:
        card: description of the adapter.
        model: base model, which determines the shapes.
        dropout: dropout probability on the input of the low-rank pairs, in training only.
        writer: what makes rows from text, for methods whose memory is computed.
    """

    def __init__(
        self, card: AdapterCard, model: nn.Module, dropout: float = 0.0, writer: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.writer = writer
        self.card = card
        self.dropout = dropout
        is_full = card.gate == "full"
        has_pairs = card.rank and not is_full
        fans = {path: fan(linear) for path, linear in attention_linears(model).items()} if has_pairs else {}
        whole = dict(model.named_parameters()) if is_full else {}
        self.by_path = {path: LowRank(i, o, card.rank) for path, (i, o) in fans.items()}
        self.pairs = nn.ModuleList(self.by_path.values())
        self.whole = {name: nn.Parameter(p.detach().clone().float()) for name, p in whole.items()}
        self.weights = nn.ParameterList(self.whole.values())
        self.rows = nn.Parameter(torch.zeros(card.n_rows, model.get_input_embeddings().weight.shape[1]))  # type: ignore[operator]
        self.gate = Gate(None)
        self._applied = False
        self._base: dict[str, nn.Parameter] = {}

    @classmethod
    def fresh(
        cls, card: AdapterCard, model: nn.Module, dropout: float = 0.0, writer: nn.Module | None = None
    ) -> Adapter:
        """Initialise an adapter that changes nothing yet; its embedding rows are drawn near the mean embedding."""
        adapter, spread = cls(card, model, dropout, writer), spread_of(model)
        with torch.no_grad():
            # Drawn on the CPU, so that the values do not depend on the model's device.
            adapter.rows.copy_(spread.mean + 0.5 * spread.by_column * torch.randn_like(adapter.rows))
        return adapter

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Adapter]:
        """Apply this adapter to the model for the length of the block.

        A nested call has no effect: an adapter is never applied twice.
        """
        if self._applied:
            yield self
            return
        scale = self.card.alpha / max(self.card.rank, 1)
        wrapped: dict[str, nn.Module] = {
            path: GatedLinear(model.get_submodule(path), pair, scale, self.dropout, self.gate)
            for path, pair in self.by_path.items()
        }
        self._applied = True
        self._base = dict(model.named_parameters()) if self.whole else {}
        try:
            with swapped(model, wrapped), with_weights(model, self.whole):
                yield self
        finally:
            self._applied, self._base = False, {}

    @contextmanager
    def closed(self, model: nn.Module) -> Iterator[None]:
        """Restore the base model inside ``applied``, for the length of the block."""
        slots, self.gate.slots = self.gate.slots, torch.empty(0, dtype=torch.long)
        try:
            with with_weights(model, self._base):
                yield
        finally:
            self.gate.slots = slots

    def open_gate(self, special: Tensor) -> None:
        """Set the slots (int64) of the special tokens in the next input; a plain adapter acts on all tokens, a writer's
        on none but those that it reads itself."""
        is_closed = self.card.gate == "writer"
        self.gate.slots = None if self.card.gate == "plain" else special[:0] if is_closed else special

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let the low-rank pairs act on every token within the block, in which a writer reads."""
        slots, self.gate.slots = self.gate.slots, None
        try:
            yield
        finally:
            self.gate.slots = slots

    def save(
        self, folder: Path, target_name: str, more: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write the folder under a temporary name first, so that it is never incomplete.

        Args:
            target_name: name of the base model, for PEFT.
            more: contents of other text files of the folder, by name.
            dtype: of low-rank pairs and of the writer in the file.
        """
        part, old = _beside(folder)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        if self.whole:
            save_file({name: p.detach().contiguous() for name, p in self.whole.items()}, part / WHOLE)
        elif self.by_path:
            self._save_pairs(part, target_name, dtype)
        if self.writer is not None:
            state = {name: t.detach().contiguous() for name, t in self.writer.state_dict().items()}
            save_file({n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}, part / WRITER)
        save_file({"rows": self.rows.detach().float()}, part / ROWS)
        for name, text in (more or {}).items():
            (part / name).write_text(text, encoding="utf-8")
        card = json.dumps(dataclasses.asdict(self.card), indent=2, ensure_ascii=False)
        (part / (CARD + ".part")).write_text(card + "\n", encoding="utf-8")
        os.replace(part / (CARD + ".part"), part / CARD)  # last: a folder with a card is whole
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(part, folder)
        shutil.rmtree(old, ignore_errors=True)

    def _save_pairs(self, folder: Path, target_name: str, dtype: torch.dtype) -> None:
        from peft import LoraConfig

        weights: dict[str, Tensor] = {}
        for path, pair in self.by_path.items():
            weights[f"{_PEFT_PREFIX}{path}.lora_A.weight"] = pair.a.detach().to(dtype).contiguous()
            weights[f"{_PEFT_PREFIX}{path}.lora_B.weight"] = pair.b.detach().to(dtype).contiguous()
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        config = LoraConfig(
            task_type="CAUSAL_LM", r=self.card.rank, lora_alpha=self.card.alpha,
            target_modules="|".join(re.escape(path) for path in self.by_path),
            base_model_name_or_path=target_name, inference_mode=True,
        )
        config.save_pretrained(str(folder))

    @classmethod
    def load(cls, folder: Path, model: nn.Module, writer: nn.Module | None = None) -> Adapter:
        """Load an adapter for ``model``, in evaluation mode and frozen; ``writer`` is one of its kind, to be filled.

        Raises:
            UserError: a file is missing or damaged, or the shapes do not match the model.
        """
        card = read_card(folder)
        try:
            has_pairs = card.gate == "full" or card.rank
            weights = load_file(folder / (WHOLE if card.gate == "full" else WEIGHTS)) if has_pairs else {}
            rows = load_file(folder / ROWS)["rows"]
            written = {} if writer is None else load_file(folder / WRITER)
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(
                f"The adapter in {folder} cannot be read: {error}.", "Train it again, or copy it anew."
            ) from error
        adapter = cls(card, model, writer=writer)
        try:
            with torch.no_grad():
                for name, parameter in adapter.whole.items():
                    parameter.copy_(weights.pop(name))
                for path, pair in adapter.by_path.items():
                    pair.a.copy_(weights.pop(f"{_PEFT_PREFIX}{path}.lora_A.weight"))
                    pair.b.copy_(weights.pop(f"{_PEFT_PREFIX}{path}.lora_B.weight"))
                adapter.rows.copy_(rows)
            if writer is not None:
                writer.load_state_dict(written)
        except (KeyError, RuntimeError) as error:
            raise UserError(
                f"The adapter in {folder} does not fit this model: {error}.",
                f"It was trained on {card.base_model}.",
            ) from error
        if weights:
            raise UserError(
                f"The adapter in {folder} does not fit this model: it also adapts "
                f"{sorted(weights)[0].removeprefix(_PEFT_PREFIX)}.",
                f"It was trained on {card.base_model}.",
            )
        return adapter.eval().requires_grad_(False)


def recover(folder: Path) -> None:
    """Bring a saved adapter to its place if saving was killed between renaming one folder and the other."""
    part, old = _beside(folder)
    if not folder.exists() and (part / CARD).exists():
        os.replace(part, folder)
    elif not folder.exists() and old.exists():
        os.replace(old, folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where the new content of an adapter folder is written, and where the former one is until it is deleted."""
    return folder.with_name(f".{folder.name}.part"), folder.with_name(f".{folder.name}.old")


def read_card(folder: Path) -> AdapterCard:
    """Read the card of an adapter folder, without its weights.

    Raises:
        UserError: not an adapter folder, or its card is damaged.
    """
    try:
        raw = parse_json((folder / CARD).read_text(encoding="utf-8"))
        names = {f.name for f in dataclasses.fields(AdapterCard)}
        card = AdapterCard(**{k: v for k, v in raw.items() if k in names})
        numbers = (card.rank, card.n_rows)
        words = (card.method, card.gate, *card.options, *card.options.values())
        if not all(type(one) is int for one in numbers) or not all(isinstance(one, str) for one in words):
            raise TypeError("a field is of another type")
        return card
    except FileNotFoundError:
        raise UserError(
            f"{folder} is not an adapter folder: it has no {CARD}.",
            "Give the folder that 'kvbench train --method METHOD' wrote.",
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"The adapter card {folder / CARD} is damaged: {error}.") from error
