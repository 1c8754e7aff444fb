"""The record types that measuring and reporting share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

SCHEMA = 1

HUMAN = "human"
"""Method name of the cell whose texts are the authors' own, to compare generated ones with."""
ITSELF = "itself"
"""Name of the scorer if the model that generated the texts scores them itself, uncompressed."""
IMPORTED = "imported"
"""Execution of cells that another program measured."""
GOES_ON = "Run the command that measured it again: it goes on where it stopped."
"""What to do about a cell that is not finished."""
_REMOVAL = {"streamed": "real", IMPORTED: "unverified"}


WRITING = ("generate", "decode")
"""Protocols whose records are generated texts."""


@dataclass(frozen=True)
class Cell:
    """One cell of the plan: a model, a method at a ratio, a task under a protocol.

    Attributes:
        ratio_asked: requested ratio as text, such as ``0.7``; None for methods without one.
        execution: ``streamed`` (entries leave the cache while a text is read), one pass in which a mask hides them, or
            ``imported``: by another program.
        position_rule: ``absolute``, or ``shared`` where a sentinel repeats its predecessor's position.
        role: ``method``, ``baseline``, ``control``, or ``reference`` (compared with, but not shown).
        options: resolved options of method and protocol.
        adapter: name or path of the adapter's folder, None if the method has none.
        adapter_hash: hash of the adapter's files.
        removes: whether the method makes the cache smaller; otherwise it saves computation, or shows quality only.
        version: version of the method's rule; part of the key if above 1, so that older keys stay valid.
        source: hash of the code of a method of another package, part of the key; empty for our own.
        note: remark that rows show after the name of the method.
        variant: the method's own options that change a value, such as ``window=16``.
    """

    model: str
    revision: str | None
    model_hash: str
    dtype: str
    device: str
    method: str
    ratio_asked: str | None
    role: str
    task: str
    task_version: int
    data_hash: str
    protocol: str
    execution: str
    options: dict[str, str]
    adapter: str | None
    adapter_hash: str | None
    seed: int
    position_rule: str = "absolute"
    removes: bool = True
    version: int = 1
    note: str = ""
    variant: str = ""
    source: str = ""
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # unknown fields would not be in the key

    @cached_property
    def key(self) -> str:
        """Content key: a hash that is equal for equal measurements, whatever the command or the number of documents."""
        rule = {"version": self.version if self.version > 1 else None, "source": self.source or None}
        return self._hash({name: value for name, value in rule.items() if value is not None})

    @cached_property
    def request(self) -> str:
        """Hash that is equal for equal requests: the key without the version and code of the method."""
        return self._hash({})

    def _hash(self, more: dict[str, int | str]) -> str:
        content = dataclasses.asdict(self)
        for name in ("role", "adapter", "removes", "version", "note", "variant", "source"):
            content.pop(name)
        content |= more
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def removal(self) -> str:
        """``real``, ``masked`` where entries are only hidden, ``none`` for methods that remove nothing, or
        ``unverified`` where another program says that it removed them."""
        return _REMOVAL.get(self.execution, "masked") if self.removes else "none"

    @property
    def name(self) -> str:
        """The method as requested: ``snapkv``, or ``snapkv:window=16``."""
        return f"{self.method}:{self.variant}" if self.variant else self.method

    @property
    def workload(self) -> str:
        """The task and, unless default, its option ``question``: ``recall:known``. Documents are cut once for each."""
        question = self.options.get("question")
        return self.task if question is None else f"{self.task}:{question}"

    @property
    def setting(self) -> str:
        """Task, question, model and seed; cells are compared within a setting."""
        return f"{self.workload}@{self.model}#{self.seed}"

    @property
    def writes(self) -> bool:
        """Whether its records are generated texts."""
        return self.protocol in WRITING

    @property
    def answers(self) -> bool:
        """Whether its records are answers to questions."""
        return self.protocol == "answer"

    @property
    def is_profile(self) -> bool:
        """Whether its records are of time and memory."""
        return self.protocol == "profile"

    @property
    def label(self) -> str:
        """Name of the cell in messages, such as ``sentinel 0.7 on minidocs``."""
        ratio = f" {self.ratio_asked}" if self.ratio_asked is not None else ""
        if self.is_profile:
            return f"{self.name}{ratio} at {self.options['seq_len']} x {self.options['batch_size']}"
        return f"{self.name}{ratio} on {self.workload}"


@dataclass(frozen=True)
class DocumentRecord:
    """Sufficient statistics of one document under one cell; sums over its pieces.

    Attributes:
        group: unit that the bootstrap resamples: an article, a book, or the document itself.
        pieces: number of blocks, passages or prefixes.
        dropped: number of tokens of the document that are in no piece.
        tokens: number of scored tokens (targets); ``n_bytes``: their UTF-8 bytes.
        nll: negative log-likelihood of the targets, in nats.
        hits: number of targets that were the most probable token.
        correct: number of pieces whose targets were all the most probable token.
        kl: sum of KL(full || method) over targets, None for ``full`` or if ``full`` failed.
        kl_bins: counts of per-token KL in logarithmic bins.
        top1: number of targets where the most probable token is that of the full cache.
        raw: text tokens of the block, passage or prefix; ``held``: entries held after it was read.
        visible: sum of entries visible / text tokens before, over scored queries; ``queries``: their number.
        peak: the most entries ever held in a piece.
        kv_logical, kv_physical, kv_full: bytes of the cache, summed over pieces: entries held x bytes per entry,
            distinct storages alive, and what the whole cache would take.
        bin: bin that the document belongs to, if any; results are also reported for each bin.
        seconds: time of the batches, divided among their rows.
        by_distance: targets in bins of their distance from the last place where entries were replaced by a summary:
            lower edge -> number of targets, their nll, and their nll minus that with the full cache.
        by_position: the same by the number of text tokens before the target.
    """

    document: str
    group: str
    pieces: int
    dropped: int
    tokens: int
    n_bytes: int
    nll: float
    hits: int
    correct: int
    kl: float | None
    kl_bins: dict[str, int] | None
    top1: int | None
    raw: int
    held: int
    visible: float
    queries: int
    peak: int
    kv_logical: float
    kv_physical: float
    kv_full: float
    bin: str | None = None
    seconds: float = 0.0
    by_distance: dict[str, tuple[int, float, float]] | None = None
    by_position: dict[str, tuple[int, float, float]] | None = None
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        return self.document

    @classmethod
    def load(cls, raw: dict[str, Any]) -> DocumentRecord:
        """Restore a record from the output of ``dataclasses.asdict``.

        Raises:
            TypeError: a field is missing or unknown.
        """
        return cls(**raw)


@dataclass(frozen=True)
class Output:
    """One text that was generated after a prefix.

    Attributes:
        decode: ``nucleus``, ``greedy``, or for human texts ``human`` (the reference) and ``after`` (what
            the author wrote after it).
        draw: index among the outputs of its kind.
        ids: the generated tokens, without the end token; ``text``: the text that they decode to.
        ended: whether the model ended the text before the maximum length.
        nll: negative log-likelihood of the text given the prefix under the scorer, in nats, over ``nll_tokens`` of
            its tokens; None if no scorer was requested.
        vector: the text's sentence embedding, half precision in base64; None if not requested.
        features: the same for MAUVE, if it does not use the sentence embedding.
    """

    decode: str
    draw: int
    ids: tuple[int, ...]
    text: str
    ended: bool
    nll: float | None = None
    nll_tokens: int = 0
    vector: str | None = None
    features: str | None = None


@dataclass(frozen=True)
class GenerationRecord:
    """The texts that were generated after one document's prefix under one cell.

    Attributes:
        group: unit that the bootstrap resamples (see ``DocumentRecord``).
        outputs: the texts.
        raw: text tokens of the prefix; ``held``: entries held after it was read. With the protocol ``decode``, of all
            that was read or written, as are the bytes.
        visible: sum of entries visible / text tokens before, over queries that chose a token (``queries``).
        peak: the most entries ever held.
        kv_logical, kv_physical, kv_full: bytes of the cache after the prefix was read (see ``DocumentRecord``).
        seconds: time of the batch, divided among its documents.
        prefix: text of the prefix; only in the record of the human texts.
        prefix_ids, prefix_vector: its tokens and its sentence embedding, likewise.
        prefix_ends: where its tokens end in its text, in characters, likewise.
        kept: how much is held of each token of the prefix, mean over layers and heads: a digit from 0 (none) to 9
            (all); None if entries are merged, stored in another form, stand for several tokens, or leave later.
        columns: what metrics count in the texts, in a record whose texts were taken out (``outputs`` is empty):
            kind of output -> metric -> column -> a number or a vector, mean over draws; None in any other record.
    """

    document: str
    group: str
    outputs: tuple[Output, ...]
    raw: int
    held: int
    visible: float
    queries: int
    peak: int
    kv_logical: float
    kv_physical: float
    kv_full: float
    seconds: float = 0.0
    prefix: str | None = None
    prefix_ids: tuple[int, ...] = ()
    prefix_vector: str | None = None
    prefix_ends: tuple[int, ...] = ()
    kept: str | None = None
    schema: int = SCHEMA
    columns: dict[str, dict[str, dict[str, Any]]] | None = None

    @property
    def key(self) -> str:
        return self.document

    @classmethod
    def load(cls, raw: dict[str, Any]) -> GenerationRecord:
        """Restore a record from the output of ``dataclasses.asdict``.

        Raises:
            TypeError, KeyError: a field is missing or unknown.
        """
        outputs = tuple(Output(**{**output, "ids": tuple(output["ids"])}) for output in raw["outputs"])
        listed = {name: tuple(raw.get(name, ())) for name in ("prefix_ids", "prefix_ends")}
        return cls(**{**raw, "outputs": outputs, **listed})

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its outputs."""
        return tuple(self.columns or dict.fromkeys(output.decode for output in self.outputs))

    def without_texts(self, columns: dict[str, dict[str, dict[str, Any]]]) -> GenerationRecord:
        """The record with what metrics count in its texts, and nothing that tells the texts or their tokens."""
        return dataclasses.replace(
            self, outputs=(), prefix=None, prefix_ids=(), prefix_vector=None, prefix_ends=(), kept=None, columns=columns
        )

    def of(self, decode: str) -> tuple[Output, ...]:
        """The outputs of one kind, in the order of their draws."""
        return tuple(output for output in self.outputs if output.decode == decode)


@dataclass(frozen=True)
class Failure:
    """Why a cell could not be finished, or the command if ``cell`` is empty.

    Attributes:
        left_out: whether the cell is infeasible, and left out of a sweep, which is not an error.
        incomplete: whether nothing went wrong, but documents are still to be measured; never on disk, where their
            records say it.
    """

    cell: str
    error: str
    hint: str = ""
    left_out: bool = False
    incomplete: bool = False

    @classmethod
    def to_go_on(cls, cell: Cell, what: str) -> Failure:
        """The failure of a cell that is not finished; ``what`` says how far it is."""
        return cls(cell.key, f"{cell.label}: {what}.", GOES_ON, incomplete=True)

    @property
    def word(self) -> str:
        if self.incomplete:
            return "incomplete"
        return "left out" if self.left_out else "failed"

    @property
    def sentence(self) -> str:
        """What is printed."""
        return f"{self.word}: {self.error} {self.hint}".strip()
