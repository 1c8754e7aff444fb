"""What runs and profiles have in common of what the user asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import unknown
from kvbench.methods import Method


@dataclass(frozen=True, kw_only=True)
class MeasurementRequest:
    """What the user asked for, settings merged in; names are not yet checked.

    Attributes:
        model: hub id or folder; of a profile also ``shape:NAME``.
        adapters: folders or hub ids, each for the method on its card.
        methods: names, each with options of its own as in ``snapkv:window=16``.
        ratios: shares of entries to remove, as text.
        options: given to every method and protocol that has them.
        out: the folder; None for one under ``reports``.
        baselines: measure what methods are compared with as well.
        threads: CPU threads; 0 leaves the choice to kvbench.
    """

    model: str
    revision: str | None
    adapters: tuple[str, ...]
    methods: tuple[str, ...]
    ratios: tuple[str, ...]
    seed: int
    options: dict[str, str]
    out: Path | None
    reports: Path
    baselines: bool
    device: str
    dtype: str
    threads: int

    @property
    def cell_dtype(self) -> str:
        """``auto`` is float32 on a CPU, so that a run cannot be continued in another precision."""
        return "float32" if self.dtype == "auto" and self.device == "cpu" else self.dtype

    def check_options(self, methods: Iterable[Method], of_protocols: Iterable[str] = ()) -> None:
        """See that every option is one of some method or protocol.

        Raises:
            UserError: one is of none.
        """
        known = {*of_protocols, *(name for method in methods for name in method.options())}
        for key in self.options:
            if key not in known:
                raise unknown("--set key", key, known)
