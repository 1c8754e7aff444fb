"""The protocol ``answer``: questions about a long context, which is compressed before they are known, or with them.

A sample keeps context, question and the beginning of the answer apart. With the question hidden, the context is
compressed once, and each question is read behind a copy of it; with the question known, prompt and beginning of the
answer are compressed as well, up to the last token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from kvbench.data.documents import Document
from kvbench.data.samples.sample import Filler, Question, Recipe, Sample, make_sample
from kvbench.data.tasks import Task
from kvbench.errors import UserError
from kvbench.methods import layout_id
from kvbench.protocols.base import BOS, CHUNK, Protocol, Setting, check_length
from kvbench.protocols.pieces import Asked, Cut, Piece, Tokenizer
from kvbench.protocols.recall import HIDDEN, KNOWN

LENGTHS = (4096, 2048, 1024)
"""Default lengths: the largest that the model's context has room for."""
LINE, END = "line", "end"
APART, TOGETHER = "apart", "together"
"""Whether each question is read behind a copy of the context, or behind the questions and answers before it."""
TURNS = Setting(APART, (APART, TOGETHER), unwritten=True)


MARK = "\u2042"
"""Stands for an answer, where the text around it is looked for."""


def checked_turns(options: Mapping[str, str]) -> str:
    """The option ``turns``.

    Raises:
        UserError: questions in turns are asked for, and are known.
    """
    turns = options.get("turns", APART)
    if turns == TOGETHER and options.get("question", HIDDEN) == KNOWN:
        raise UserError(
            "With --set turns=together questions follow answers, which are not known when a context is compressed.",
            "Add --set question=hidden.",
        )
    return turns


def _with_lead(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Token ids with a BOS before them, unless a chat template has written it."""
    lead = tokenizer.lead()
    return tuple(ids) if lead and tuple(ids[:1]) == lead else (*lead, *ids)


def needed(pieces: Sequence[Piece]) -> int:
    """Tokens of the longest session about a context: of its longest question and answer, or of all in turns."""
    asked = [piece.asked for piece in pieces if piece.asked is not None]
    if asked[0].follow is None:
        return max(len(piece.ids) + one.new_tokens for piece, one in zip(pieces, asked, strict=True))
    later = sum(len(one.follow or ()) for one in asked[1:])
    return len(pieces[0].ids) + later + sum(one.new_tokens for one in asked)


def usual_length(context: int) -> int:
    """The default length of samples for a model with that context length."""
    return next((length for length in LENGTHS if length <= context), context)


@dataclass(frozen=True)
class AnswerProtocol(Protocol):
    """Samples of ``length`` tokens, prompt and answer together.

    Attributes:
        recipe: what makes the samples; ``made`` its settings as text.
        known: whether the question is part of what is compressed.
        samples: how many are made.
        has_template: whether prompts of models with a chat template are put into it.
        stop: where an answer ends: at the ``end`` token, or also with its first ``line``.
        turns: whether the questions about a context are asked ``apart``, or ``together`` in one session.
    """

    name = "answer"
    kind = "answer"
    settings = {
        "length": Setting("auto", least=256), "samples": Setting("20"),
        "question": Setting("both", ("both", HIDDEN, KNOWN)), "template": Setting("auto", ("auto", "none")),
        "stop": Setting("auto", (END, LINE)), "turns": TURNS, "chunk": CHUNK, "bos": BOS,
    }
    length_option = "length"
    longer = "Use another --set length=."

    made: str
    known: bool
    length: int
    has_template: bool
    stop: str
    turns: str
    recipe: Recipe | None = None
    samples: int = 0

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        assert task.answer is not None, "the task is of this kind"
        given = options["length"]
        length = usual_length(context) if given == "auto" else int(given)
        check_length(length, context, model, f"--set length={context}")
        return cls(
            int(options["chunk"]), options["bos"], task.answer.signature(), options.get("question", HIDDEN) == KNOWN,
            length, options["template"] != "none", options["stop"], checked_turns(options),
            task.answer.made().prepare(length), int(options["samples"]),
        )

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        assert self.recipe is not None, "samples of this kind are made by rule"
        filler = Filler(
            [document.text for document in documents],
            [document.sample for document in documents if document.sample is not None],
        )

        def count(sample: Sample) -> int:
            if self.turns == TOGETHER:
                return needed(self.cut("", sample, tokenizer).pieces)
            return max(
                len(_with_lead(tokenizer.encode("".join(self.parts(sample, question, tokenizer)))[0], tokenizer))
                + question.new_tokens for question in sample.questions
            )

        for index in range(self.samples):
            sample = make_sample(self.recipe, filler, self.length, seed, index, count)
            name = f"{self.recipe.name}-{seed}-{index:03d}"
            yield Document(name, name, ""), self.cut(name, sample, tokenizer)

    def parts(self, sample: Sample, question: Question, tokenizer: Tokenizer) -> tuple[str, str, str]:
        """The prompt in parts: what stands before the context, the context, and all that follows it.

        Raises:
            UserError: the chat template changes the context.
        """
        if not (self.has_template and getattr(tokenizer.hf, "chat_template", None)):
            return "", sample.context, question.text + question.prefix
        said = sample.context + question.text
        whole = tokenizer.hf.apply_chat_template(
            [{"role": "user", "content": said}], tokenize=False, add_generation_prompt=True
        )
        place = whole.find(said.strip())
        if place < 0:
            raise UserError("The chat template changes what the user says.", "Use --set template=none.")
        before = whole[:place]
        context = sample.context.lstrip()
        return before, context, whole[place + len(context) :] + question.prefix.lstrip()

    def cut(self, name: str, sample: Sample, tokenizer: Tokenizer) -> Cut:
        """The questions about a sample, each with its context."""
        return Cut(tuple(self._piece(name, sample, question, tokenizer) for question in sample.questions), 0)

    def _piece(self, name: str, sample: Sample, question: Question, tokenizer: Tokenizer) -> Piece:
        before, context, after = self.parts(sample, question, tokenizer)
        parts = tokenizer.split((before + context, after))
        first = _with_lead(parts[0].ids, tokenizer)
        ids, read = (*first, *parts[1].ids), len(first)
        asked = Asked(
            question.references, question.scoring, question.new_tokens,
            self._spans(sample, before, context, after, tokenizer, read - len(parts[0].ids)), read, question.first_line,
            self._follow(question, tokenizer) if self.turns == TOGETHER else None,
        )
        return Piece(
            name, ids, len(ids) - 1 if self.known else read, len(ids), 0, layout_id(name, 0),
            bin=sample.bin or None, asked=asked,
        )

    def _follow(self, question: Question, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens of a question as it follows the answer to another: in a new turn of the chat, or of the text."""
        said = question.text.strip()
        if not (self.has_template and getattr(tokenizer.hf, "chat_template", None)):
            return tuple(tokenizer.encode(f"\n\n{said}{question.prefix}")[0])
        turns = [("user", "."), ("assistant", MARK), ("user", said)]
        whole = tokenizer.hf.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False, add_generation_prompt=True
        )
        _, mark, after = whole.partition(MARK)
        if not mark or said not in after:
            raise UserError("The chat template changes what is said.", "Use --set template=none.")
        return tuple(tokenizer.encode(after + question.prefix.lstrip())[0])

    @staticmethod
    def _spans(
        sample: Sample, before: str, context: str, after: str, tokenizer: Tokenizer, lead: int
    ) -> tuple[tuple[str, int, int], ...] | None:
        """The spans of a sample in tokens, those included that are only in part inside."""
        _, ends = tokenizer.encode(before + context + after)
        if ends is None:
            return None
        shift = len(before) - (len(sample.context) - len(context))
        found = []
        for name, start, stop in sample.spans:
            first = next((i for i, end in enumerate(ends) if end > start + shift), len(ends))
            last = next((i for i, end in enumerate(ends) if end >= stop + shift), len(ends) - 1)
            found.append((name, lead + first, lead + last + 1))
        return tuple(found)

    @property
    def lengths(self) -> str:
        template = "auto" if self.has_template else "none"
        question = KNOWN if self.known else HIDDEN
        turns = f"|turns:{self.turns}" if self.turns != APART else ""
        return f"L:{self.length}|{self.made}|question:{question}|template:{template}|stop:{self.stop}{turns}"

    def limited(self, documents: Sequence[Document], limit: int | None) -> tuple[Sequence[Document], int | None]:
        """All documents are filler; samples are limited."""
        return documents, limit
