"""The base class of compression methods: a name, an exact ratio, and options."""

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
    from kvbench.methods.policies.policy import CachePolicy


TRAINED_PERCENT = (5, 95)
"""Smallest and largest ratio that training samples, in per cent."""


class Effect(StrEnum):
    """What a method does to the cache: evict entries, store them smaller, or attend to fewer."""

    NONE = "none"
    EVICTS = "evicts"
    PACKS = "packs"
    ATTENDS_LESS = "attends less"


@dataclass(frozen=True)
class Method(ABC):
    """A compression method with its parameters resolved.

    It is a :class:`kvbench.methods.layouts.method.LayoutMethod` or a
    :class:`kvbench.methods.policies.policy.CachePolicy`. The docstring of a subclass says which entries it keeps, which
    paper it follows and where it departs from it. Options are fields made by :func:`kvbench.methods.options.option`.

    Attributes:
        ratio: requested fraction of entries to remove; 0 for methods without a ratio.
        budget_tokens, budget_bytes: entries, or bytes of a text's cache, to keep instead of a ratio; 0 if not given.
        budgets: how the amount to keep can be given: by ``ratio``, ``tokens``, ``bytes``.
        adapter_kinds: kinds of adapters that the method can be trained with; empty if it needs none.
        effect: what the method does to the cache.
        seeded: whether the layout is random, a function of the seed and the text.
        executions: how it can be measured: ``streamed`` (entries removed), ``onepass`` (entries masked).
        needs_continuation: whether it compresses a context for what follows it only, and cannot score the context.
        version: version of the method's rule. Results of another version are not reused, and reports mark them as
            outdated.
        note: remark that tables show after the name.
        paper: the number on arXiv, as lists show it.
        bibtex: the entry that ``report --paper`` writes, for methods of other packages; ours stand in
            ``store/papers.toml``.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str] = ""
    bibtex: ClassVar[str] = ""
    version: ClassVar[int] = 1
    note: ClassVar[str] = ""
    budgets: ClassVar[tuple[str, ...]] = ("ratio", "tokens", "bytes")
    adapter_kinds: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Effect] = Effect.EVICTS
    seeded: ClassVar[bool] = False
    executions: ClassVar[tuple[str, ...]] = ("streamed",)
    position_rule: ClassVar[str] = "absolute"
    needs_continuation: ClassVar[bool] = False

    ratio: Fraction = Fraction(0)
    budget_tokens: int = field(default=0, kw_only=True)
    budget_bytes: int = field(default=0, kw_only=True)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Options that ``--set`` accepts, by name."""
        return options_of(cls)

    @classmethod
    def from_options(cls, ratio: Fraction, given: Mapping[str, str], **budget: int) -> Self:
        """Create the method from options as given on the command line; unknown options are ignored.

        Raises:
            UserError: a value is not allowed, or values do not go together.
        """
        known = cls.options()
        values = {name: known[name].value(name, text) for name, text in given.items() if name in known}
        method = cls(ratio, **values, **budget)
        method.check_options()
        return method

    def check_options(self) -> None:  # noqa: B027  # most options go with any others
        """Check that the options go together, whatever the text.

        Raises:
            UserError: they do not.
        """

    def check(self, longest: int, in_chunks: bool) -> None:  # noqa: B027  # most methods have nothing to check
        """Check that the method can be used on texts of up to ``longest`` tokens.

        Args:
            in_chunks: whether the text comes in chunks of its own, such as the turns of a dialogue.

        Raises:
            UserError: it cannot; the message says why.
        """

    @property
    def minimum(self) -> int:
        """Smallest number of entries that the method can work with."""
        return 1

    def check_kept(self, n: int) -> None:  # noqa: B027  # most methods can do with any ratio
        """Check that the ratio keeps enough of ``n`` tokens for what the method protects, such as a window.

        Raises:
            UserError: it does not.
        """

    def ratio_of_bytes(self, n: int, shape: CacheShape) -> Fraction:
        """Fraction of the bytes of ``n`` entries to remove: by ``budget_bytes`` if given, else the ratio."""
        if not self.budget_bytes:
            return self.ratio
        return max(Fraction(0), 1 - Fraction(self.budget_bytes, n * shape.entry_bytes))

    def with_budget_for(self, n: int, shape: CacheShape) -> Self:
        """Return the method for a text of ``n`` tokens, with its budget converted to the parameters that it works with.

        Raises:
            UserError: the budget, or the ratio, keeps less than the method needs.
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
        """Whether the ratio decides how much is removed; ``in_chunks`` as in :meth:`check`."""
        return "ratio" in self.budgets

    @classmethod
    def training_sample(
        cls, n: int, rng: np.random.Generator, options: dict[str, str]
    ) -> Layout | CachePolicy:
        """What one step of adapter training reads a text of ``n`` tokens under: a layout, or a policy with a mask.

        Raises:
            UserError: the method trains nothing.
        """
        return cls.training_layout(n, rng, options)

    @classmethod
    def training_layout(cls, n: int, rng: np.random.Generator, options: dict[str, str]) -> Layout:
        """The layout of one step of adapter training on a text of ``n`` tokens.

        Raises:
            UserError: the method trains nothing.
        """
        raise UserError(f"{cls.name} has nothing that could be trained.")

    def check_text(self, n: int, prefix: int, seed: int) -> None:  # noqa: B027  # most methods take any text
        """Check that the method can be used on ``n`` tokens, of which those after ``prefix`` are generated.

        Raises:
            UserError: it cannot; the message says why.
        """

    def mask_example(self, seed: int) -> Mask | None:
        """The attention mask over a short text, for display; None if it is not known before reading."""
        return None

    @property
    def resolved(self) -> dict[str, str]:
        """All options in effect, with their values as text, but for those that were added later and are not set."""
        values = {name: option.text(getattr(self, name)) for name, option in self.options().items()}
        return {
            name: value for name, value in values.items()
            if not (self.options()[name].later and value == self.options()[name].default)
        }

    @property
    def rule_version(self) -> int:
        """Version of the method's rule with these parameters."""
        return self.version

    @property
    def budget_given(self) -> dict[str, str]:
        """The budget as options of a cell; empty if none is given."""
        given = {"budget_tokens": self.budget_tokens, "budget_bytes": self.budget_bytes}
        return {name: str(value) for name, value in given.items() if value}

    @property
    def depends_on_words(self) -> bool:
        """Whether the layout depends on the words of the text, so that every piece has its own."""
        return False

    @property
    def extra_positions(self) -> int:
        """Number of position ids that special tokens may take after the last text token."""
        return 0

    def positions_trained(self, length: int) -> int:
        """Number of position ids that training on texts of ``length`` tokens may need."""
        return length + self.extra_positions

    @property
    def averages_pre_rope(self) -> bool:
        """Whether keys are averaged before the rotary embedding, which not every model allows."""
        return False

    @property
    def counts_anew(self) -> bool:
        """Whether positions are counted in the cache, to which keys are rotated anew; learned ones cannot be."""
        return False

    @property
    def n_rows(self) -> int:
        """Number of special-token embeddings that the method's adapter trains."""
        return 0

    @property
    def feeds_rows(self) -> bool:
        """Whether special tokens are fed as embeddings, which not every model allows."""
        return self.n_rows > 0

    @property
    def trained_options(self) -> dict[str, str]:
        """Options whose values an adapter of this method is bound to, as text."""
        return {name: option.text(getattr(self, name)) for name, option in self.options().items() if option.trained}

    @classmethod
    def compresses(cls) -> bool:
        """Whether the method changes the cache at all."""
        return cls.effect is not Effect.NONE

    @classmethod
    def removes(cls) -> bool:
        """Whether what the ratio says to remove is actually freed."""
        return cls.effect in (Effect.NONE, Effect.EVICTS, Effect.PACKS)
