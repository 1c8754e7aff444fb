"""Compression methods: one idea, one file; the table of names below is all there is to register.

Methods of other packages come in by the entry point group ``kvbench.methods`` (docs/adding-a-method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from importlib.metadata import entry_points

from kvbench.errors import UserError, unknown
from kvbench.methods.base import Method, Option, kept, parse_ratio, ratio_text
from kvbench.methods.layouts.ccm import CcmConcat, CcmMerge, Gist, MeanPool, Pic
from kvbench.methods.layouts.full import Adapted, Full, NoContext
from kvbench.methods.layouts.layout import RUNNING, Layout, Structure
from kvbench.methods.layouts.method import LAYOUT_IDS, LayoutMethod, layout_id, make_layout
from kvbench.methods.layouts.scattered import Scattered, ScatteredTuned
from kvbench.methods.layouts.sentinel import Sentinel
from kvbench.methods.layouts.windows import Local, LocalTuned, Sinks, SinksTuned, Window
from kvbench.methods.policies.adakv import AdaKv
from kvbench.methods.policies.cascading import Cascading
from kvbench.methods.policies.d2o import Cam, D2o
from kvbench.methods.policies.expected_attention import ExpectedAttention
from kvbench.methods.policies.h2o import H2o
from kvbench.methods.policies.keydiff import KeyDiff
from kvbench.methods.policies.kivi import Fp8, Kivi
from kvbench.methods.policies.knorm import Knorm
from kvbench.methods.policies.lagkv import LagKv
from kvbench.methods.policies.lorc import Lorc
from kvbench.methods.policies.policy import Policy
from kvbench.methods.policies.random import Random
from kvbench.methods.policies.refreshkv import RefreshKv
from kvbench.methods.policies.snapkv import ChunkKv, PyramidKv, SnapKv
from kvbench.methods.policies.streaming_llm import StreamingLlm
from kvbench.methods.policies.think import Think
from kvbench.methods.policies.tova import Tova
from kvbench.store.faults import GROUP

_OWN: tuple[type[Method], ...] = (
    Full, NoContext, Window, Sinks, Local, Scattered, Sentinel, CcmConcat, CcmMerge, Gist, MeanPool, Pic,
    LocalTuned, ScatteredTuned, SinksTuned, Adapted,
    StreamingLlm, Random, Knorm, KeyDiff, LagKv, Tova, H2o, SnapKv, PyramidKv, ChunkKv, AdaKv, ExpectedAttention,
    Cascading, Cam, D2o, Kivi, Fp8, Think, RefreshKv,
    Lorc,
)

class _Methods(Mapping[str, type[Method]]):
    """Method by name. Those of other packages are loaded when the table is first looked into, not before: they
    import this package themselves."""

    @cached_property
    def _all(self) -> dict[str, type[Method]]:
        """Ours and theirs.

        Raises:
            UserError: one of theirs cannot be loaded, is no method, or takes a name that is taken.
        """
        found = {kind.name: kind for kind in _OWN}
        for entry in entry_points(group=GROUP):
            try:
                kind = entry.load()
            except Exception as error:  # whatever the other package raises
                is_old = isinstance(error, ImportError) and (error.name or "").startswith("kvbench.")
                raise UserError(
                    f"The method {entry.name!r} of another package ({entry.value}) cannot be loaded: "
                    f"{type(error).__name__}: {error}.",
                    "It was written for another kvbench: docs/adding-a-method.md says what has moved." if is_old else
                    "Mend or uninstall that package.",
                ) from error
            if not (isinstance(kind, type) and issubclass(kind, Method)) or kind.name in found:
                raise UserError(
                    f"The method {entry.name!r} of another package ({entry.value}) is no subclass of "
                    "kvbench.methods.Method, or its name is taken.", "Mend or uninstall that package.",
                )
            if not issubclass(kind, (LayoutMethod, Policy)):
                raise UserError(
                    f"The method {entry.name!r} of another package ({entry.value}) says neither by a layout nor by "
                    "scores what is removed.",
                    "It may be written for another kvbench: docs/adding-a-method.md says what it is a subclass of.",
                )
            found[kind.name] = kind
        return found

    def __getitem__(self, name: str) -> type[Method]:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)


METHODS = _Methods()


def make_method(name: str, ratio: Fraction, options: dict[str, str] | None = None) -> Method:
    """The method of that name; options that it does not know are ignored here (the plan checks)."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind = METHODS[name]
    given = options or {}
    mine = {k: v for k, v in given.items() if k in kind.known}
    budget = {f"budget_{unit}": int(given.get(f"budget_{unit}", 0)) for unit in kind.takes_budget}
    with_ratio = kind.takes_ratio or kind.uses_ratio(mine, in_chunks=False)
    return kind(ratio if with_ratio else Fraction(0), mine, **budget)


__all__ = [
    "GROUP", "LAYOUT_IDS", "METHODS", "RUNNING", "Layout", "LayoutMethod", "Method", "Option", "Structure", "kept",
    "layout_id", "make_layout", "make_method", "parse_ratio", "ratio_text",
]
