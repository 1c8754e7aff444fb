"""The registry of methods: built-in ones, and those of other packages (docs/adding-a-method.md)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points

from kvbench.errors import UserError, unknown
from kvbench.methods.base import Method
from kvbench.methods.layouts.beacon import Beacon
from kvbench.methods.layouts.ccm import CCMConcat, CCMMerge
from kvbench.methods.layouts.full import Adapted, Full, NoContext
from kvbench.methods.layouts.gist import Gist
from kvbench.methods.layouts.meanpool import MeanPool
from kvbench.methods.layouts.method import LayoutMethod
from kvbench.methods.layouts.output_memory import OutputMemory
from kvbench.methods.layouts.pic import PIC
from kvbench.methods.layouts.prompt import Prompt
from kvbench.methods.layouts.scattered import Scattered, ScatteredTuned
from kvbench.methods.layouts.sentinel import Sentinel
from kvbench.methods.layouts.strided import Strided, StridedTuned
from kvbench.methods.layouts.unigist import UniGist, UniGistTuned
from kvbench.methods.layouts.windows import Local, LocalTuned, Sinks, SinksTuned, Window
from kvbench.methods.memories.comprexit import ComprExIT
from kvbench.methods.memories.gradual_forgetting import GradualForgetting
from kvbench.methods.memories.ic_former import ICFormer
from kvbench.methods.memories.icae import ICAE
from kvbench.methods.memories.recurrent import RMT, AutoCompressors
from kvbench.methods.policies.adakv import AdaKV
from kvbench.methods.policies.cam import CaM
from kvbench.methods.policies.cascading import Cascading
from kvbench.methods.policies.chunkkv import ChunkKV
from kvbench.methods.policies.d2o import D2O
from kvbench.methods.policies.expected_attention import ExpectedAttention
from kvbench.methods.policies.fp8 import FP8
from kvbench.methods.policies.h2o import H2O
from kvbench.methods.policies.keydiff import KeyDiff
from kvbench.methods.policies.kivi import KIVI
from kvbench.methods.policies.knorm import KNorm
from kvbench.methods.policies.lagkv import LagKV, LagKVTuned
from kvbench.methods.policies.lorc import LoRC
from kvbench.methods.policies.policy import CachePolicy
from kvbench.methods.policies.pyramidkv import PyramidKV
from kvbench.methods.policies.random import Random
from kvbench.methods.policies.refreshkv import RefreshKV
from kvbench.methods.policies.snapkv import SnapKV
from kvbench.methods.policies.streaming_llm import StreamingLLM
from kvbench.methods.policies.subgen import SubGen
from kvbench.methods.policies.think import ThinK
from kvbench.methods.policies.tova import TOVA
from kvbench.methods.prefixes.homer import Homer
from kvbench.store.faults import GROUP

_OWN: tuple[type[Method], ...] = (
    Full, NoContext, Window, Sinks, Local, Scattered, Sentinel, CCMConcat, CCMMerge, Gist, MeanPool, PIC, Prompt,
    ICAE, ComprExIT, ICFormer, RMT, AutoCompressors, GradualForgetting,
    OutputMemory, UniGist, UniGistTuned, Beacon, Strided, LocalTuned, ScatteredTuned, SinksTuned, StridedTuned, Adapted,
    StreamingLLM, Random, KNorm, KeyDiff, LagKV, LagKVTuned, TOVA, H2O, SnapKV, PyramidKV, ChunkKV, AdaKV,
    ExpectedAttention, Cascading, CaM, D2O, SubGen, KIVI, FP8, ThinK, RefreshKV, LoRC, Homer,
)
_OF_0_1 = frozenset({
    "known", "takes_ratio", "takes_budget", "needs_adapter", "trainable", "sums", "decay", "takes_moments",
    "keeps_all", "packs", "is_policy", "drawn", "looks", "turned", "packed", "compresses", "removes",
    "fitted", "places_after", "by_text", "on", "who", "mixture", "goes_on", "unrotates",
    "looks_at", "policy", "option", "number",
})
"""Members that method classes defined in kvbench 0.1 and must not define any more."""
_PAGE = "docs/adding-a-method.md"
_MEND = "Mend or uninstall that package."


class _Methods(Mapping[str, type[Method]]):
    """Method classes by name, built-in ones first. Those of other packages are loaded on first access, since they
    import this package; one that cannot be used is an error only where it is asked for."""

    @cached_property
    def _all(self) -> dict[str, type[Method] | UserError]:
        """All methods, and why one of another package cannot be used."""
        found: dict[str, type[Method] | UserError] = {kind.name: kind for kind in _OWN}
        for entry in entry_points(group=GROUP):
            try:
                kind = _loaded(entry)
            except UserError as error:
                found.setdefault(entry.name, error)
                continue
            if kind.name in found:
                found.setdefault(entry.name, UserError(f"{_named(entry)}: its name is taken.", _MEND))
            else:
                found[kind.name] = kind
        return found

    @property
    def broken(self) -> list[UserError]:
        """Why methods of other packages cannot be used."""
        return [found for found in self._all.values() if isinstance(found, UserError)]

    def __getitem__(self, name: str) -> type[Method]:
        """The class of a method.

        Raises:
            KeyError: no such method.
            UserError: it is of another package, and cannot be loaded, is not a method, or has a name that is in use.
        """
        found = self._all[name]
        if isinstance(found, UserError):
            raise found
        return found

    def __iter__(self) -> Iterator[str]:
        return (name for name, found in self._all.items() if not isinstance(found, UserError))

    def __len__(self) -> int:
        return len(self._all) - len(self.broken)


def _loaded(entry: EntryPoint) -> type[Method]:
    try:
        kind = entry.load()
    except Exception as error:  # whatever the other package raises
        is_old = isinstance(error, ImportError) and (error.name or "").startswith("kvbench.")
        raise UserError(
            f"{_named(entry)} cannot be loaded: {type(error).__name__}: {error}.",
            f"It was written for another kvbench: {_PAGE} says what has moved." if is_old else
            _MEND,
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise UserError(f"{_named(entry)} is no subclass of kvbench.methods.Method.", _MEND)
    if not isinstance(getattr(kind, "name", None), str):
        raise UserError(f"{_named(entry)} has no name.", _MEND)
    old = _old_members(kind)
    if old or not issubclass(kind, (LayoutMethod, CachePolicy)):
        what = f"says {', '.join(old)}" if old else "says neither by a layout nor by scores what is removed"
        raise UserError(f"{_named(entry)} {what}, as in kvbench 0.1.", f"{_PAGE} says how to change it.")
    return kind


def _old_members(kind: type[Method]) -> list[str]:
    """Members defined as in kvbench 0.1, which would now be ignored or mean something else."""
    found: set[str] = set()
    for parent in kind.__mro__:
        if not parent.__module__.startswith("kvbench."):
            own, typed = vars(parent), inspect.get_annotations(parent)
            found |= _OF_0_1 & set(own)
            found |= {name for name in ("window", "sinks") if name in own and name not in typed}
            found |= {name for name in ("uses_ratio",) if isinstance(own.get(name), classmethod)}
    return sorted(found)


def _named(entry: EntryPoint) -> str:
    return f"The method {entry.name!r} of another package ({entry.value})"


METHODS = _Methods()


def unknown_method(name: str) -> UserError:
    """The error for a name that no method has."""
    error = unknown("method", name, METHODS)
    return UserError(error.message, f"{error.hint} One of your own: {_PAGE}.")


def make_method(name: str, ratio: Fraction, options: Mapping[str, str] | None = None) -> Method:
    """Create a method by name; unknown options are ignored here (planning checks them).

    Raises:
        UserError: no such method, or a value that is not allowed.
    """
    if name not in METHODS:
        raise unknown_method(name)
    kind, given = METHODS[name], options or {}
    budget = {key: int(given.get(key, 0)) for key in ("budget_tokens", "budget_bytes") if key[7:] in kind.budgets}
    method = kind.from_options(ratio, given, **budget)
    with_ratio = "ratio" in kind.budgets or method.uses_ratio(in_chunks=False)
    return method if with_ratio else replace(method, ratio=Fraction(0))
