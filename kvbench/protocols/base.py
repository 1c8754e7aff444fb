"""The base class of protocols: how a task's documents are cut into pieces, and which settings define a number.

Protocols answer different questions and are never mixed in one row. Each has a file in this folder; registry.py lists
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kvbench.data.documents import Document
from kvbench.errors import UserError, unknown
from kvbench.protocols.pieces import MIN_TOKENS, Cut, Tokenizer

if TYPE_CHECKING:
    from kvbench.data.tasks import Task  # needs pydantic, which GPU machines may lack


@dataclass(frozen=True)
class Setting:
    """A protocol option that ``--set`` sets; its value is text.

    Attributes:
        default: default value; ``auto`` if the model or the task decides.
        choices: allowed values, the first of which ``auto`` stands for; empty for a number.
        least: smallest allowed integer.
        share: bounds of a decimal number, for an option that takes one: above the first and up to the second.
        unwritten: whether the default is left out of the options of cells, since older cells had no such option.
    """

    default: str
    choices: tuple[str, ...] = ()
    least: int = 1
    share: tuple[float, float] | None = None
    unwritten: bool = False

    def checked(self, name: str, value: str, protocol: str) -> str:
        """Check a value and return its canonical spelling.

        Raises:
            UserError: the value is not allowed.
        """
        if self.choices:
            value = self.choices[0] if value == "auto" else value
            if value not in self.choices:
                of = f" with protocol {protocol}:" if name == "preset" else ""
                raise unknown(f"value for --set {name}={of}", value, self.choices)
            return value
        if self.share is not None:
            return self._decimal(name, value, *self.share)
        if value == self.default == "auto":
            return value
        if not value.isdecimal() or int(value) < self.least:
            raise UserError(f"--set {name}={value}: not a whole number of at least {self.least}.")
        return str(int(value))

    @staticmethod
    def _decimal(name: str, value: str, low: float, high: float) -> str:
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not low < number <= high:
            raise UserError(f"--set {name}={value}: not a number above {low:g} and up to {high:g}.")
        return f"{number:g}"


CHUNK, BOS = Setting("64"), Setting("auto", ("auto", "true", "false"))
"""Settings of every protocol: tokens fed at a time, and whether a BOS is prepended to every piece."""


@dataclass(frozen=True)
class Protocol(ABC):
    """A protocol with its lengths resolved for a model.

    Attributes:
        name: name on the command line and in cells.
        kind: kind of tasks that it measures.
        settings: its options.
        length_option: the option that makes its pieces shorter; "" if there is none.
        in_chunks: whether the text comes in chunks of its own, such as turns.
        scores_context: whether the text that is compressed is scored while it is read.
        may_exceed: whether pieces may be longer than the model's context; otherwise such pieces are skipped.
        chunk: tokens fed at a time when streamed.
        bos: ``auto``, ``true`` or ``false``.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "lm"
    settings: ClassVar[dict[str, Setting]]
    length_option: ClassVar[str] = ""
    in_chunks: ClassVar[bool] = False
    scores_context: ClassVar[bool] = False
    may_exceed: ClassVar[bool] = False

    chunk: int
    bos: str

    @classmethod
    @abstractmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        """Create the protocol for a task, and for a model with that context length.

        Args:
            model: name of the model, for messages.

        Raises:
            UserError: the lengths do not fit the model.
        """

    @abstractmethod
    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        """Yield the documents, or trials made of them, each with its pieces; one that is too short has no piece.

        Args:
            with_words: whether pieces record where their words are.
        """

    @property
    @abstractmethod
    def lengths(self) -> str:
        """The lengths, as written in signatures."""

    @property
    def seq_len(self) -> int | None:
        """Length of a piece, or of its prefix, in tokens; None if every piece has its own length."""
        return None

    @property
    def required_length(self) -> str:
        """The length that a document needs for a piece, as text."""
        return f"{MIN_TOKENS} tokens"

    @property
    def signature_suffix(self) -> str:
        """Further text for the signature."""
        return ""

    def limited(self, documents: Sequence[Document], limit: int | None) -> tuple[Sequence[Document], int | None]:
        """The documents to cut, and the maximum number of results to measure; None for all."""
        return documents, limit

    def signature(self, execution: str, has_bos: bool, tokenizer: str, version: int = 1) -> str:
        """The settings that define what a number means, as text.

        Args:
            version: version of the pieces (:class:`kvbench.protocols.pieces.Piece`).
        """
        step = f"chunk:{self.chunk}" if execution == "streamed" else "onepass"
        bos = "per_piece" if has_bos else "none"
        tokenizer += self.signature_suffix
        return f"{self.name}|{self.lengths}|{step}|bos:{bos}|reset:piece|tok:{tokenizer}|v:{version}"

    def shorter(self, tokens: int) -> str:
        """Advice on how to limit pieces to that many tokens."""
        return f"Use --set {self.length_option}={tokens}." if self.length_option else "Use shorter documents."

    def within(self, tokens: int) -> str:
        """Advice on how to keep sequences within that many tokens."""
        return f"Keep sequences within {tokens} tokens, such as --set block={tokens}."

    longer: ClassVar[str] = "Give longer documents, or another --protocol."
    """Advice for documents that are too short."""


def settings_of(protocol: type[Protocol], given: Mapping[str, str]) -> dict[str, str]:
    """The protocol's options, with defaults filled in and values checked.

    Raises:
        UserError: a value is not allowed.
    """
    found = {
        name: setting.checked(name, given.get(name, setting.default), protocol.name)
        for name, setting in protocol.settings.items()
    }
    return {
        name: value for name, value in found.items()
        if not (protocol.settings[name].unwritten and value == protocol.settings[name].default)
    }


def check_length(length: int, context: int, model: str, remedy: str) -> None:
    """Check that sequences fit the model.

    Raises:
        UserError: they do not.
    """
    if length > context:
        raise UserError(
            f"Sequences of {length} tokens do not fit {model}: its context is {context} tokens.", f"Use {remedy}."
        )
