"""What a protocol is: how the documents of a task are cut into pieces, and what decides the meaning of a number.

Protocols answer different questions and are never mixed in one row. Each is a file of this folder; registry.py is the
table of them.
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
    from kvbench.data.tasks import Task  # which takes pydantic, and a bare machine has none


@dataclass(frozen=True)
class Setting:
    """An option of a protocol, which ``--set`` gives; its value is text.

    Attributes:
        default: ``auto`` where the model or the task decides.
        choices: the allowed words, of which the first is meant by ``auto``; empty for a number.
        least: of a whole number.
        share: a decimal number instead, above the first bound and up to the second.
    """

    default: str
    choices: tuple[str, ...] = ()
    least: int = 1
    share: tuple[float, float] | None = None

    def checked(self, name: str, value: str, protocol: str) -> str:
        """The value in its one spelling.

        Raises:
            UserError: a value of the wrong kind.
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
"""Settings of every protocol: tokens fed at a time, and whether a BOS is put before every piece."""


@dataclass(frozen=True)
class Protocol(ABC):
    """A protocol with its lengths resolved for a model.

    Attributes:
        name: as it is asked for, and written into cells.
        kind: of the tasks that it measures.
        settings: its options.
        length_option: the option that makes its pieces shorter; "" if there is none.
        in_chunks: the text comes in chunks of its own, such as turns.
        may_exceed: pieces may be longer than the model's context.
        chunk: tokens fed at a time when streamed.
        bos: ``auto``, ``true`` or ``false``.
    """

    name: ClassVar[str]
    kind: ClassVar[str] = "lm"
    settings: ClassVar[dict[str, Setting]]
    length_option: ClassVar[str] = ""
    in_chunks: ClassVar[bool] = False
    may_exceed: ClassVar[bool] = False

    chunk: int
    bos: str

    @classmethod
    @abstractmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        """Fill in what depends on the task, and on the model's context length.

        Args:
            model: its name, for the user.

        Raises:
            UserError: the lengths do not fit the model.
        """

    @abstractmethod
    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        """The documents, or trials made of them, each with its pieces; no piece where one is too short.

        Args:
            with_words: pieces say where their words are.
        """

    @property
    @abstractmethod
    def lengths(self) -> str:
        """The lengths, as signatures say them."""

    @property
    def seq_len(self) -> int | None:
        """Tokens of a piece, or of its prefix; None where every piece has its own length."""
        return None

    @property
    def least(self) -> str:
        """What a document needs for a piece, in words."""
        return f"{MIN_TOKENS} tokens"

    @property
    def marks(self) -> str:
        """What else is said in signatures."""
        return ""

    def taken(self, documents: Sequence[Document], limit: int | None) -> tuple[Sequence[Document], int | None]:
        """The documents that are cut, and how many of what comes out is measured; None for all."""
        return documents, limit

    def signature(self, execution: str, has_bos: bool, tokenizer: str, version: int = 1) -> str:
        """The settings that decide what a number means.

        Args:
            version: of the pieces (:class:`kvbench.protocols.pieces.Piece`).
        """
        step = f"chunk:{self.chunk}" if execution == "streamed" else "onepass"
        bos = "per_piece" if has_bos else "none"
        return f"{self.name}|{self.lengths}|{step}|bos:{bos}|reset:piece|tok:{tokenizer}{self.marks}|v:{version}"

    def shorter(self, tokens: int) -> str:
        """What to do so that pieces have no more than so many tokens."""
        return f"Use --set {self.length_option}={tokens}." if self.length_option else "Use shorter documents."

    def within(self, tokens: int) -> str:
        """What to do so that sequences stay within so many tokens."""
        return f"Keep sequences within {tokens} tokens, such as --set block={tokens}."

    longer: ClassVar[str] = "Give longer documents, or another --protocol."
    """What to do where documents are too short."""


def settings_of(protocol: type[Protocol], given: Mapping[str, str]) -> dict[str, str]:
    """The protocol's options, defaults filled in, values checked.

    Raises:
        UserError: a value of the wrong kind.
    """
    return {
        name: setting.checked(name, given.get(name, setting.default), protocol.name)
        for name, setting in protocol.settings.items()
    }


def check_length(length: int, context: int, model: str, remedy: str) -> None:
    """See that sequences fit the model.

    Raises:
        UserError: they do not.
    """
    if length > context:
        raise UserError(
            f"Sequences of {length} tokens do not fit {model}: its context is {context} tokens.", f"Use {remedy}."
        )
