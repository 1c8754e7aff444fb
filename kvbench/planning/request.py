"""The part of a request that runs and profiles have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import unknown
from kvbench.methods import Method


@dataclass(frozen=True, kw_only=True)
class MeasurementRequest:
    """What the user requested, merged with the settings; names are not yet checked.

    Attributes:
        model: hub id or folder; for a profile also ``shape:NAME``.
        adapters: folders or hub ids, each for the method on its card.
        methods: names, each with options of its own as in ``snapkv:window=16``.
        ratios: fractions of entries to remove, as text.
        options: options for all methods and protocols that have them.
        out: the run folder; None for a new one under ``reports``.
        baselines: whether to measure what methods are compared with as well.
        threads: number of CPU threads; 0 lets kvbench choose.
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
        """The dtype recorded in cells: float32 for ``auto`` on a CPU, so that a run keeps one precision when
        continued."""
        return "float32" if self.dtype == "auto" and self.device == "cpu" else self.dtype

    def check_options(self, methods: Iterable[Method], of_protocols: Iterable[str] = ()) -> None:
        """Check that every option belongs to some method or protocol of the request.

        Raises:
            UserError: an option belongs to none.
        """
        known = {*of_protocols, *(name for method in methods for name in method.options())}
        for key in self.options:
            if key not in known:
                raise unknown("--set key", key, known)
