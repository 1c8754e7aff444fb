"""Questions whose answer stands in one of many documents (RULER, arXiv 2404.06654, qa)."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvbench.data.samples.sample import EVIDENCE, Filler, Question, Recipe, Sample, joined
from kvbench.errors import UserError

ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@dataclass(frozen=True)
class DocumentQuestion(Recipe):
    """The document of a question among others, drawn without repetition, all in a random order.

    Published samples fill up with other paragraphs of the same article first; here all others are drawn alike.
    """

    name = "document-question"
    step = 1
    new_tokens: int = 32

    def most(self, filler: Filler) -> int:
        return len({sample.context for sample in filler.samples}) - 1

    def sample(self, units: int, random: Random, filler: Filler, index: int) -> Sample:
        if self.most(filler) < 1:
            raise UserError(
                "Questions are asked among documents, and there is only one.", "Give --data with several documents."
            )
        order = list(range(len(filler.samples)))
        Random("order").shuffle(order)  # any number of samples takes its questions from all documents
        gold = filler.samples[order[index % len(order)]]
        asked = gold.questions[index // len(order) % len(gold.questions)]
        others = sorted({sample.context for sample in filler.samples} - {gold.context})
        texts = [gold.context, *random.sample(others, units)]
        random.shuffle(texts)
        parts = [
            (f"Document {number}:\n{text}\n", EVIDENCE if text == gold.context else "")
            for number, text in enumerate(texts, 1)
        ]
        context, spans = joined(parts, "\n", f"{ASK}\n\nThe following are given documents.\n\n")
        return Sample(context, (Question(
            f"\n\n{ASK}\n\nQuestion: {asked.text}", " Answer:", asked.references, "contains_any", self.new_tokens,
        ),), spans)
