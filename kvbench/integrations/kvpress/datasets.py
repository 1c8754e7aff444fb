"""The data sets of kvpress' evaluation whose answers can be scored, and the published rule of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from kvbench.data.samples import qa_scoring, scoring
from kvbench.data.samples.scoring import Scoring
from kvbench.errors import UserError

ALL = ""
"""Key of the rule of all subtasks that have none of their own."""


def _as_it_is(answer: str, subtask: str) -> str:
    return answer


def _without_control_characters(answer: str, subtask: str) -> str:
    return re.sub(r"[\x00-\x1f]", "", answer.strip()).strip()


def _begun(answer: str, subtask: str) -> str:
    """The answer without blanks before it; only its first line where LongBench reads no more."""
    text = answer.lstrip()
    return text.split("\n")[0] if subtask in ("trec", "triviaqa", "samsum", "lsht") else text


@dataclass(frozen=True)
class Dataset:
    """How the answers of a data set are scored.

    Attributes:
        rules: subtask, or what it begins with up to ``_``, -> rule; ``ALL`` stands for all others.
        references: column of the references; ``is_list`` whether it holds lists.
        has_subtasks: whether a column ``task`` names subtasks.
        own_contexts: whether every sample has a context of its own.
        told_apart: whether no two samples have the same question and references.
        clean: what is done with an answer of a subtask before it is scored.
    """

    rules: Mapping[str, Scoring]
    references: str = "answer"
    is_list: bool = True
    has_subtasks: bool = True
    own_contexts: bool = False
    told_apart: bool = False
    clean: Callable[[str, str], str] = field(default=_as_it_is)

    def rule(self, subtask: str) -> Scoring | None:
        """The rule of a subtask; None if none is known."""
        names = (subtask, subtask.partition("_")[0], ALL)
        return next((self.rules[name] for name in names if name in self.rules), None)

    @property
    def scored(self) -> str:
        """The rules as text, for signatures."""
        return ",".join(f"{name}:{rule.__name__}" if name else rule.__name__ for name, rule in self.rules.items())


_LONGBENCH = Dataset(
    {
        **dict.fromkeys(
            ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"),
            qa_scoring.qa_f1,
        ),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), qa_scoring.rouge_l),
        **dict.fromkeys(("lcc", "repobench-p"), qa_scoring.code_similarity),
        "passage_count": qa_scoring.number_share, "passage_retrieval_en": qa_scoring.number_share,
    },
    references="answers", clean=_begun,
)
DATASETS = {
    "ruler": Dataset(
        {"qa": scoring.contains_any, ALL: scoring.contains_all}, own_contexts=True, told_apart=True,
        clean=_without_control_characters,
    ),
    "infinitebench": Dataset({
        "passkey": qa_scoring.first_digits, "number_string": qa_scoring.first_digits, "kv_retrieval": qa_scoring.word,
        "kv_retrieval_prefix": qa_scoring.word, "kv_retrieval_both": qa_scoring.word,
        "longdialogue_qa_eng": scoring.contains_any, "longbook_qa_eng": qa_scoring.qa_f1,
    }),
    "longbench": _LONGBENCH,
    "longbench-e": _LONGBENCH,
    "longbench-v2": Dataset({ALL: qa_scoring.choice_sentence}, is_list=False, has_subtasks=False, own_contexts=True),
    "aime25": Dataset({ALL: qa_scoring.last_boxed}, is_list=False, has_subtasks=False, own_contexts=True),
    "math500": Dataset({ALL: qa_scoring.first_boxed}, is_list=False, has_subtasks=False, own_contexts=True),
}


def dataset_of(name: str) -> Dataset:
    """The data set of that name.

    Raises:
        UserError: none of its rules is known.
    """
    if name not in DATASETS:
        raise UserError(f"No rule is known that scores answers of kvpress' data set {name!r}.", f"{_known()}.")
    return DATASETS[name]


def _known() -> str:
    return f"Known: {', '.join(DATASETS)}"


def rule_of(dataset: str, subtask: str, where: str) -> Scoring:
    """The rule of a subtask.

    Args:
        where: file and line, for the message.

    Raises:
        UserError: it has none here.
    """
    known = dataset_of(dataset)
    found = known.rule(subtask.removesuffix("-e"))
    if found is None:
        raise UserError(
            f"{where}: no rule is known that scores answers of {dataset}'s task {subtask!r}.",
            f"{_known()}; of {dataset}: {', '.join(known.rules)}.",
        )
    return found
