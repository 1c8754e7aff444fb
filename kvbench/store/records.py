"""The record types: all that measuring and reporting share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

SCHEMA = 1

HUMAN = "human"
"""The method of the cell that holds the authors' own texts."""
ITSELF = "itself"
"""The scorer of texts that is the model which wrote them, uncompressed."""


@dataclass(frozen=True)
class Cell:
    """One cell of the plan: a model, a method at a ratio, a task under a protocol.

    Attributes:
        ratio_asked: as text, such as ``0.7``; None for methods that take none.
        position_rule: ``absolute``, or ``shared`` where a sentinel repeats its predecessor's position.
        role: ``method``, ``baseline`` or ``control``.
        options: resolved options of method and protocol.
        adapter: folder of the adapter, None if the method has none.
        adapter_hash: of the adapter's files.
        removes: the method makes the cache smaller; otherwise it saves computation, or shows quality only.
        version: of the method's rule; in the key above 1, so that the keys of all others are what they were.
        note: what rows say behind the name of the method.
        variant: options that the method was asked for with, apart from others, such as ``window=16``.
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
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # a key is of all that a cell says

    @cached_property
    def key(self) -> str:
        """Content key: equal for equal measurements, whatever the command or the limit."""
        return self._hash({"version": self.version} if self.version > 1 else {})

    @cached_property
    def request(self) -> str:
        """Equal for equal requests: the key without the version of the method."""
        return self._hash({})

    def _hash(self, more: dict[str, int]) -> str:
        content = dataclasses.asdict(self)
        for name in ("role", "adapter", "removes", "version", "note", "variant"):
            content.pop(name)
        content |= more
        text = json.dumps(content, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def removal(self) -> str:
        """``real``, ``masked`` where entries are only hidden, or ``none`` for methods that remove nothing."""
        return ("real" if self.execution == "streamed" else "masked") if self.removes else "none"

    @property
    def name(self) -> str:
        """The method as it was asked for: ``snapkv``, or ``snapkv:window=16``."""
        return f"{self.method}:{self.variant}" if self.variant else self.method

    @property
    def workload(self) -> str:
        """What is cut once: the task, and which question of it is asked where that is another than its first."""
        question = self.options.get("question")
        return self.task if question is None else f"{self.task}:{question}"

    @property
    def setting(self) -> str:
        """What is measured under the same: task, question, model and seed. Cells are compared within it."""
        return f"{self.workload}@{self.model}#{self.seed}"

    @property
    def writes(self) -> bool:
        """Whether its records are texts."""
        return self.protocol == "generate"

    @property
    def is_profile(self) -> bool:
        """Whether its records are of time and memory."""
        return self.protocol == "profile"

    @property
    def label(self) -> str:
        """For people: ``sentinel 0.7 on minidocs``."""
        ratio = f" {self.ratio_asked}" if self.ratio_asked is not None else ""
        if self.is_profile:
            return f"{self.name}{ratio} at {self.options['seq_len']} x {self.options['batch_size']}"
        return f"{self.name}{ratio} on {self.workload}"


@dataclass(frozen=True)
class DocumentRecord:
    """Sufficient statistics of one document under one cell; sums over its pieces.

    Attributes:
        group: unit of resampling.
        pieces: blocks, passages or prefixes.
        dropped: tokens of the document that no piece holds.
        tokens: scored tokens; ``n_bytes`` their UTF-8 bytes.
        nll: sum in nats.
        hits: targets that were the most probable token.
        correct: pieces whose targets were all the most probable token.
        kl: sum of KL(full || method) over targets, None for ``full`` or where ``full`` failed.
        kl_bins: counts of per-token KL in logarithmic bins.
        top1: targets where the most probable token is the full cache's.
        raw: text tokens read when the cache was looked at; ``held`` the entries it had then.
        visible: sum over ``queries`` of entries visible / text tokens before.
        peak: the most entries ever held in a piece.
        kv_logical, kv_physical, kv_full: bytes of the cache, summed over pieces.
        bin: what results are also reported by.
        seconds: time of the batches, shared out by tokens.
        by_distance: scored tokens, their nll, and what they cost more than with the full cache, by
            their distance from the last place where entries were replaced (the least of each bin).
        by_position: the same by the text tokens before the target.
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
        """From what ``dataclasses.asdict`` made of it.

        Raises:
            TypeError: something is missing, or too much.
        """
        return cls(**raw)


@dataclass(frozen=True)
class Output:
    """One text that was written after a prefix.

    Attributes:
        decode: ``nucleus``, ``greedy``, or for people ``human`` (the reference) and ``after`` (what
            the author wrote after it).
        draw: number among the outputs of its kind.
        ids: the tokens written, the end token left out; ``text`` what they say.
        ended: the model ended the text before the last token.
        nll: nats of the text given the prefix under the scorer, over ``nll_tokens`` of its tokens; None
            if no scorer was asked for.
        vector: the text's sentence embedding, half precision in base64; None if none was asked for.
        features: likewise, for MAUVE, where they are not the sentence embedding.
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
    """What was written after one document's prefix under one cell.

    Attributes:
        group: unit of resampling.
        outputs: the texts.
        raw: text tokens of the prefix; ``held`` the entries of the cache when it had been read.
        visible: sum over the ``queries`` that wrote a token of entries visible / text tokens before.
        peak: the most entries ever held.
        kv_logical, kv_physical, kv_full: bytes of the cache when the prefix had been read.
        seconds: time of the batch, shared out by documents.
        prefix: the prefix as text, in the record of the people's texts only.
        prefix_ids, prefix_vector: its tokens and its sentence embedding, likewise.
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
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        return self.document

    @classmethod
    def load(cls, raw: dict[str, Any]) -> GenerationRecord:
        """From what ``dataclasses.asdict`` made of it.

        Raises:
            TypeError, KeyError: something is missing, or too much.
        """
        outputs = tuple(Output(**{**output, "ids": tuple(output["ids"])}) for output in raw["outputs"])
        return cls(**{**raw, "outputs": outputs, "prefix_ids": tuple(raw.get("prefix_ids", ()))})

    def of(self, decode: str) -> tuple[Output, ...]:
        """The outputs of one kind, in the order of their draws."""
        return tuple(output for output in self.outputs if output.decode == decode)


@dataclass(frozen=True)
class Failure:
    """Why a cell could not be finished.

    Attributes:
        left_out: the method cannot do this at all, and a grid goes without it: no fault.
    """

    cell: str
    error: str
    hint: str = ""
    left_out: bool = False

    @property
    def word(self) -> str:
        return "left out" if self.left_out else "failed"


@dataclass(frozen=True)
class Row:
    """One number with its recipe and its uncertainty: a row of ``results.json``.

    ``value``, ``ci_low``, ``ci_high`` and the deltas are in the metric's own unit; what does not
    apply is None. ``p_value`` is Holm-adjusted within (task, metric).
    """

    task: str
    protocol: str
    model: str
    method: str
    ratio_asked: float | None
    ratio_realised: float | None
    ratio_mean: float | None
    entries_peak: int | None
    removal: str
    params: dict[str, Any]
    groups: int
    metric: str
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    unit: str
    delta: float | None
    delta_ci_low: float | None
    delta_ci_high: float | None
    p_value: float | None
    baseline: str | None
    seed: int
    signature: str

    @property
    def name(self) -> str:
        """The method as it was asked for: ``snapkv``, or ``snapkv:window=16``."""
        variant = self.params.get("variant")
        return f"{self.method}:{variant}" if variant else self.method


@dataclass(frozen=True)
class Results:
    """The document of the JSON contract."""

    run: str
    ok: bool
    failures: tuple[Failure, ...] = ()
    rows: tuple[Row, ...] = ()
    schema: int = field(default=SCHEMA)

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        ordered = {"schema": content.pop("schema"), **content}
        return json.dumps(ordered, indent=1, allow_nan=False, ensure_ascii=False)
