"""The protocol ``answer`` for data sets: questions about contexts that are given, cut in the middle where too long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from kvbench.data.documents import Document
from kvbench.data.tasks import Task
from kvbench.errors import UserError
from kvbench.protocols.answer import LINE, AnswerProtocol, checked_turns, needed
from kvbench.protocols.base import check_length
from kvbench.protocols.pieces import Cut, Piece, Tokenizer
from kvbench.protocols.recall import HIDDEN, KNOWN

SHORTEST = 16
"""Least tokens of a context that are left on either side of a cut."""


@dataclass(frozen=True)
class QuestionRows(AnswerProtocol):
    """The questions of a data set; prompt and answer have ``length`` tokens at most.

    Of a longer prompt the first and the last half are kept, as in LongBench (arXiv 2308.14508); the question stands
    whole behind the context.
    """

    kind = "questions"
    settings = {
        name: replace(setting, default="auto") if name == "length" else setting
        for name, setting in AnswerProtocol.settings.items() if name != "samples"
    }

    @classmethod
    def resolve(cls, task: Task, options: Mapping[str, str], context: int, model: str) -> Self:
        rules = task.questions
        assert rules is not None, "the task is of this kind"
        length = context if options["length"] == "auto" else int(options["length"])
        check_length(length, context, model, f"--set length={context}")
        return cls(
            int(options["chunk"]), options["bos"], f"{task.name}:{rules.scoring}",
            options.get("question", HIDDEN) == KNOWN, length, options["template"] != "none" and rules.has_template,
            LINE if rules.stops_at_line else options["stop"], checked_turns(options),
        )

    def pieces(
        self, documents: Sequence[Document], tokenizer: Tokenizer, seed: int, with_words: bool
    ) -> Iterator[tuple[Document, Cut]]:
        for document in documents:
            assert document.sample is not None, "the corpus has questions"
            yield document, self._shortened(self.cut(document.id, document.sample, tokenizer))

    def _shortened(self, cut: Cut) -> Cut:
        """The questions, with the middle of the context cut out if the longest of them does not fit."""
        over = needed(cut.pieces) - self.length
        if over <= 0:
            return cut
        asked = [piece.asked for piece in cut.pieces if piece.asked is not None]
        read = min(one.asked_at for one in asked)
        head = (max(map(len, (piece.ids for piece in cut.pieces))) - over) // 2
        if head < SHORTEST or read - over < head + SHORTEST:
            raise UserError(
                f"{cut.pieces[0].document}: {self.length} tokens are too few for its questions.",
                "Use a larger --set length=.",
            )
        return Cut(tuple(_without(piece, head, over) for piece in cut.pieces), over)

    def limited(self, documents: Sequence[Document], limit: int | None) -> tuple[Sequence[Document], int | None]:
        return documents[:limit], limit


def _without(piece: Piece, start: int, count: int) -> Piece:
    """A piece without some tokens of its context."""
    return replace(
        piece, ids=piece.ids[:start] + piece.ids[start + count :], context=piece.context - count,
        scored=piece.scored - count,
    )
