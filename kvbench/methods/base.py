"""What a compression method is: a name, an exact ratio, and options."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self

from kvbench.errors import UserError
from kvbench.methods.options import Option, options_of

if TYPE_CHECKING:
    import numpy as np

    from kvbench.cache.shape import CacheShape
    from kvbench.methods.layouts.layout import Layout
    from kvbench.methods.layouts.mask_example import Mask


TRAINED_PERCENT = (5, 95)
"""Ratios that training draws from, in per cent."""


class Effect(StrEnum):
    """What a method does to the entries of a cache."""

    NONE = "none"
    EVICTS = "evicts"
    PACKS = "packs"
    ATTENDS_LESS = "attends less"
    COMPUTES_LESS = "computes less"


@dataclass(frozen=True)
class Method(ABC):
    """A compression method with its parameters resolved.

    It is a :class:`kvbench.methods.layouts.method.LayoutMethod` or a
    :class:`kvbench.methods.policies.policy.CachePolicy`. Subclasses say in their docstring what they hold, which paper
    they follow and where they depart from it; their options are fields, made by
    :func:`kvbench.methods.options.option`.

    Attributes:
        ratio: asked share of entries to remove; 0 for methods that take none.
        budget_tokens, budget_bytes: entries, or bytes of a text's cache, to keep instead of a share; 0 for none.
        budgets: how it can be told how much to keep: by ``ratio``, ``tokens``, ``bytes``.
        adapter_kinds: adapters that it can be trained with; empty for a method that needs none.
        effect: what it does to the cache.
        seeded: its layout is drawn, by the seed and the text.
        executions: how it can be measured.
        version: of the rule. What was measured by another is not found again, and reports say that it is outdated.
        note: what rows say behind the name.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    version: ClassVar[int] = 1
    note: ClassVar[str] = ""
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "tokens", "bytes")
    adapter_kinds: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Effect] = Effect.EVICTS
    seeded: ClassVar[bool] = False
    executions: ClassVar[tuple[str, ...]] = ("streamed",)
    position_rule: ClassVar[str] = "absolute"

    ratio: Fraction = Fraction(0)
    budget_tokens: int = field(default=0, kw_only=True)
    budget_bytes: int = field(default=0, kw_only=True)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """What ``--set`` can give, by name."""
        return options_of(cls)

    @classmethod
    def of(cls, ratio: Fraction, given: Mapping[str, str], **budget: int) -> Self:
        """The method with options as they are given on a command line; others are ignored.

        Raises:
            UserError: not an allowed value.
        """
        known = cls.options()
        values = {name: known[name].value(name, text) for name, text in given.items() if name in known}
        return cls(ratio, **values, **budget)

    def check(self, longest: int, in_chunks: bool) -> None:  # noqa: B027  # most methods have nothing to check
        """See that the method can be used on text of that many tokens.

        Args:
            in_chunks: the text comes in chunks of its own.

        Raises:
            UserError: it cannot, and why.
        """

    @property
    def minimum(self) -> int:
        """Entries without which the method cannot work."""
        return 1

    def check_kept(self, n: int) -> None:  # noqa: B027  # most methods can do with any ratio
        """See that what the ratio keeps of a text of ``n`` tokens is enough for the method to be what it is called.

        Raises:
            UserError: it is not.
        """

    def ratio_of_bytes(self, n: int, shape: CacheShape) -> Fraction:
        """The share of the bytes of ``n`` entries that is to be removed."""
        if not self.budget_bytes:
            return self.ratio
        return max(Fraction(0), 1 - Fraction(self.budget_bytes, n * shape.entry_bytes))

    def fitted(self, n: int, shape: CacheShape) -> Self:
        """The method for a text of ``n`` tokens, its budget turned into what it works with.

        Raises:
            UserError: the budget, or what the ratio keeps, is below what the method needs.
        """
        if not (self.budget_tokens or self.budget_bytes):
            self.check_kept(n)
            return self
        tokens = self.budget_tokens or self.budget_bytes // shape.entry_bytes
        if tokens < self.minimum:
            given = f"--budget-tokens {tokens}" if self.budget_tokens else (
                f"--budget-bytes {self.budget_bytes}, which is {tokens} entries of {shape.entry_bytes} bytes,"
            )
            needed = self.minimum if self.budget_tokens else self.minimum * shape.entry_bytes
            raise UserError(
                f"{given} is below the {self.minimum} entries that {self.name} needs.", f"Give at least {needed}."
            )
        return replace(
            self, ratio=max(Fraction(0), Fraction(n - tokens, n)), budget_tokens=tokens, budget_bytes=0
        )

    def uses_ratio(self, in_chunks: bool) -> bool:
        """Whether a ratio decides what is removed; ``in_chunks``: the text comes in chunks of its own."""
        return "ratio" in self.budgets

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """What an adapter reads a text of ``n`` tokens under in a step of its training.

        Raises:
            UserError: the method trains nothing.
        """
        raise UserError(f"{cls.name} has nothing that could be trained.")

    def check_text(self, n: int, prefix: int, seed: int) -> None:  # noqa: B027  # most methods take any text
        """See that the method can be used on a text of ``n`` tokens that are written from ``prefix`` on.

        Raises:
            UserError: it cannot, and why.
        """

    def mask_example(self, seed: int) -> Mask | None:
        """A picture of who sees whom in a short text; None where that is not known beforehand."""
        return None

    @property
    def resolved(self) -> dict[str, str]:
        """All options that take part, with their values as text."""
        return {name: option.text(getattr(self, name)) for name, option in self.options().items()}

    @property
    def rule_version(self) -> int:
        """The version of the rule that this request is measured by."""
        return self.version

    @property
    def budget_given(self) -> dict[str, str]:
        """The budget as options of a cell, if there is one."""
        given = {"budget_tokens": self.budget_tokens, "budget_bytes": self.budget_bytes}
        return {name: str(value) for name, value in given.items() if value}

    @property
    def by_text(self) -> bool:
        """Whether the layout depends on the words of the text, so that every piece has its own."""
        return False

    @property
    def places_after(self) -> int:
        """Positions that special tokens may take beyond the last one of the text."""
        return 0

    @property
    def unrotates(self) -> bool:
        """Whether keys are turned back to be averaged, which not every model allows."""
        return False

    @property
    def n_rows(self) -> int:
        """Embedding rows that the method's adapter trains."""
        return 0

    @property
    def trained_options(self) -> dict[str, str]:
        """The options that an adapter of this method is bound to, as text."""
        return {name: option.text(getattr(self, name)) for name, option in self.options().items() if option.trained}

    @classmethod
    def compresses(cls) -> bool:
        """Whether it does anything to the cache at all."""
        return cls.effect is not Effect.NONE

    @classmethod
    def removes(cls) -> bool:
        """Whether what it says to remove takes no memory any more."""
        return cls.effect in (Effect.NONE, Effect.EVICTS, Effect.PACKS)
