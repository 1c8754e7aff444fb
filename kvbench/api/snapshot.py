"""A compressed context that questions are asked about, in memory and as a file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvbench.api.identity import model_hash, weights_hash
from kvbench.errors import UserError
from kvbench.inference.cache_state import restore_session, session_state
from kvbench.inference.compressed_cache import CompressedCache, Compression
from kvbench.store.folder import write_atomic

_FORMAT = "kvbench snapshot 1"


@dataclass(frozen=True)
class Snapshot:
    """A compressed context that any number of questions can be asked about.

    Attributes:
        ids: int64 ``[batch, n]``, the context; ``mask`` bool likewise, False for padding.
    """

    ids: Tensor
    mask: Tensor
    cache: CompressedCache

    def repeated(self, copies: int) -> Snapshot:
        """Every row ``copies`` times, copies of a row next to each other; this snapshot stays as it is."""
        cache = self.cache.copy()
        cache.batch_repeat_interleave(copies)
        return Snapshot(self.ids.repeat_interleave(copies, 0), self.mask.repeat_interleave(copies, 0), cache)

    def save(self, path: str | Path) -> None:
        """Write the compressed cache as safetensors, whole or not at all.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {"ids": self.ids.contiguous(), "mask": self.mask.contiguous()}
        try:
            groups = self._groups(tensors)
        except TypeError as error:  # entries stored by a method of another package
            raise UserError(f"The snapshot cannot be written: {error}.", "Keep it in memory.") from error
        content = {"of": _described(self.cache.compression), "groups": groups}
        try:
            write_atomic(Path(path), save(tensors, {"format": _FORMAT, "content": json.dumps(content)}))
        except OSError as error:
            raise UserError(f"The snapshot {path} cannot be written: {error.strerror}.") from error

    def _groups(self, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [
            {"rows": group.rows.tolist(), "length": group.length, "seeds": list(group.seeds),
             "state": session_state(group.session, tensors)}
            for group in self.cache.groups
        ]


def load_snapshot(path: str | Path, compression: Compression) -> Snapshot:
    """Read a snapshot.

    Raises:
        UserError: it is missing or damaged, or of another model or method.
    """
    device = next(compression.model.parameters()).device
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"it is no {_FORMAT}")
        content = json.loads(metadata["content"])
        _check(path, content["of"], _described(compression))
        ids, mask = tensors["ids"].to(device), tensors["mask"].to(device)
        cache = CompressedCache(compression, ids.shape[1], ids.shape[1])
        cache.seen, cache.mask = ids.shape[1], mask
        for saved in content["groups"]:
            group = cache.open_group(saved["rows"], saved["length"], saved["seeds"])
            restore_session(group.session, saved["state"], tensors, device)
    except FileNotFoundError:
        raise UserError(f"There is no snapshot {path}.", "Give a file that snapshot.save wrote.") from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"The snapshot {path} is damaged: {error}.", "Make it again with run.prefill.") from error
    return Snapshot(ids, mask, cache)


def _described(compression: Compression) -> dict[str, Any]:
    """What a snapshot must share with the block that it is used in."""
    method, adapter = compression.method, compression.adapter
    return {
        "model": model_hash(compression.model), "dtype": str(next(compression.model.parameters()).dtype),
        "method": method.name, "version": method.rule_version, "ratio": str(method.ratio),
        "options": {**method.resolved, **method.budget_given}, "during": compression.during, "seed": compression.seed,
        "adapter": None if adapter is None else weights_hash(adapter),
    }


def _check(path: str | Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted.items():
        if saved[name] != value:
            raise UserError(
                f"The snapshot {path} was made with {name} {saved[name]}, and the block has {value}.",
                "Open a block with the model and the settings that it was made with.",
            )

