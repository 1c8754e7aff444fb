"""Document generation: a document is cut into a prefix, which is read, and the author's continuation as the reference.

The model generates as many tokens as the reference has, so that metrics compare texts of equal length by design. The
text after the reference is kept too: human text of the same documents, which is compared with the references to give an
upper bound.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from kvbench.data.documents import Document
from kvbench.data.tasks import GenerationSpec, Task
from kvbench.errors import UserError
from kvbench.methods import layout_id
from kvbench.protocols.base import BOS, CHUNK, Protocol, Setting
from kvbench.protocols.pieces import Cut, Piece, Tokenizer

NUCLEUS, GREEDY = "nucleus", "greedy"


PRESETS = {"paper": (128, 64), "standard": (512, 128), "long": (1024, 256)}
"""Tokens of the prefix and tokens to generate; words for ``paper``, whose numbers are recalled, not verified."""


@dataclass(frozen=True)
class Generate(Protocol):
    """Compresses a prefix, and has the model continue it.

    Attributes:
        prefix, new_tokens: tokens of the prefix and of the continuation; words if ``in_words``.
        decodings: how each document is continued: ``nucleus`` once per draw, ``greedy`` once.
        batch: documents generated at a time; 0 leaves the choice to kvbench.
        compresses_late: whether policies remove entries only while text is written.
    """

    name = "generate"
    kind = "generation"
    settings = {
        "preset": Setting("auto", ("task", *PRESETS)), "prefix": Setting("auto", least=32),
        "new_tokens": Setting("auto"), "decode": Setting("both", ("both", NUCLEUS, GREEDY)), "draws": Setting("1"),
        "top_p": Setting("0.9", share=(0.0, 1.0)), "temperature": Setting("1", share=(0.0, 100.0)),
        "batch": Setting("auto"), "chunk": CHUNK, "bos": BOS,
    }
    compresses_late: ClassVar[bool] = False
    length_option = "prefix"
    longer = "Give longer documents, or smaller --set prefix= and --set new_tokens=."

    prefix: int
    new_tokens: int
    in_words: bool
    decodings: tuple[str, ...]
    top_p: float
    temperature: float
    batch: int
    preset: str

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        assert task.generation is not None, "the task is of this kind"
        return cls.of(task.generation, options, context, model)

    @classmethod
    def of(cls, spec: GenerationSpec, options: Mapping[str, str], context: int, model: str) -> Self:
        """As :meth:`resolve`, from the generation settings of a task."""
        preset = options["preset"]
        prefix, new = (spec.prefix, spec.new_tokens) if preset == "task" else PRESETS[preset]
        if preset == "task" and options["prefix"] == options["new_tokens"] == "auto":
            new = min(new, context // 4)  # a model with a short context gets shorter texts, and the signature says so
            prefix = min(prefix, context - new)
        prefix = prefix if options["prefix"] == "auto" else int(options["prefix"])
        new = new if options["new_tokens"] == "auto" else int(options["new_tokens"])
        in_words = preset == "paper"
        if prefix + new > context and not in_words:
            raise UserError(
                f"A prefix of {prefix} tokens and {new} to write do not fit {model}: its context is {context} tokens.",
                f"Use --set prefix={max(32, context - new)}, or a smaller --set new_tokens=."
                if context - new >= 32 else "Use a smaller --set prefix= and --set new_tokens=.",
            )
        draws = (NUCLEUS,) * int(options["draws"]) if options["decode"] != GREEDY else ()
        greedy = (GREEDY,) if options["decode"] != NUCLEUS else ()
        return cls(
            int(options["chunk"]), options["bos"], prefix, new, in_words, draws + greedy, float(options["top_p"]),
            float(options["temperature"]), 0 if options["batch"] == "auto" else int(options["batch"]), preset,
        )

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        for document in documents:
            yield document, cut_for_generation(document, tokenizer, self)

    @property
    def unit(self) -> str:
        return "words" if self.in_words else "tokens"

    @property
    def lengths(self) -> str:
        return f"P:{self.prefix}|G:{self.new_tokens} {self.unit}"

    @property
    def seq_len(self) -> int:
        return self.prefix

    @property
    def required_length(self) -> str:
        return f"{self.prefix + self.new_tokens} {self.unit}"

    def within(self, tokens: int) -> str:
        return f"Keep sequences within {tokens} tokens, by smaller --set prefix= and --set new_tokens=."

    def signature(self, execution: str, has_bos: bool, tokenizer: str, version: int = 1) -> str:
        draws = f"nucleus:{self.decodings.count(NUCLEUS)},greedy:{self.decodings.count(GREEDY)}"
        step = "evicted" if execution == "streamed" else "masked"
        preset = "|preset:paper(recalled, not verified)" if self.preset == "paper" else ""
        return (
            f"{self.name}|{self.lengths}|{draws}|p:{self.top_p:g}|T:{self.temperature:g}"
            f"|{step}|bos:{'per_piece' if has_bos else 'none'}|tok:{tokenizer}{preset}|v:{version}"
        )


def cut_for_generation(document: Document, tokenizer: Tokenizer, protocol: Generate) -> Cut:
    """Cut a document into prefix, reference and the text after it; no piece if the document is too short."""
    version = 1
    cut = _words(document.text, protocol) if protocol.in_words else None
    if protocol.in_words and cut is None:
        return Cut((), 0)
    if cut is not None:
        parts = tuple(part.ids for part in tokenizer.split(cut))
        version = 1 if parts == tokenizer.apart(cut) else 2
        prefix, reference, after = ([*ids] for ids in parts)
        prefix = [*tokenizer.lead(), *prefix]
        if not prefix or not reference:
            return Cut((), 0)
    else:
        ids = [*tokenizer.lead(), *tokenizer.encode(document.text)[0]]
        stop = protocol.prefix + protocol.new_tokens
        prefix, reference = ids[: protocol.prefix], ids[protocol.prefix : stop]
        after = ids[stop : stop + protocol.new_tokens]
        if len(reference) < protocol.new_tokens:
            return Cut((), len(ids))
    piece = Piece(
        document.id, (*prefix, *reference), len(prefix), len(prefix), 0, layout_id(_name(prefix), 0),
        is_generated=True, after=tuple(after), version=version,
    )
    return Cut((piece,), 0)


def _words(text: str, protocol: Generate) -> tuple[str, str, str] | None:
    """The first words, the next, and up to as many after them; None if there are too few."""
    ends = [i for i in range(1, len(text) + 1)
            if not text[i - 1].isspace() and (i == len(text) or text[i].isspace())]
    first, last = protocol.prefix, protocol.prefix + protocol.new_tokens
    if len(ends) < last:
        return None
    stop = ends[min(last + protocol.new_tokens, len(ends)) - 1]
    return text[: ends[first - 1]], text[ends[first - 1] : ends[last - 1]], text[ends[last - 1] : stop]


def uniforms(piece: Piece, protocol: Generate, seed: int) -> NDArray[np.float64]:
    """Uniform random numbers for a document ``[outputs, new tokens]``, NaN where the output is greedy.

    They depend on the seed, the prefix and the index of the draw, and on nothing else.
    """
    size = len(piece.ids) - piece.context
    key = int(_name(piece.ids[: piece.context])[:16], 16)
    rows = [
        np.full(size, np.nan) if decoding == GREEDY else np.random.default_rng([seed, key, draw]).random(size)
        for draw, decoding in enumerate(protocol.decodings)
    ]
    return np.stack(rows)


def _name(ids: tuple[int, ...] | list[int]) -> str:
    """Hash of a prefix, so that the name or order of documents does not change what is generated."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()
