"""Tasks: one TOML file each, read and validated here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbench.config import read_toml
from kvbench.data.question_rows import QuestionRowsSpec
from kvbench.data.samples.registry import RECIPES
from kvbench.data.samples.sample import Recipe

GROUPS = ("ruler", "babi", "longbench", "scbench", "babilong", "infinitebench")
"""Names that stand for all tasks whose names begin with them, but those that stand apart."""
APART = ("ruler-qa", "longbench-v2")
"""The only one of its group that needs the hub, and another benchmark."""


_OWN_PROTOCOL = {
    "recall": "prefix", "generation": "generate", "online": "online", "answer": "answer", "questions": "answer",
}
"""The only protocol of tasks of a kind."""


class CorpusSpec(BaseModel):
    """Where the documents come from and how they are cut.

    Attributes:
        embedded: file in ``kvbench/assets``.
        hub: id of a data set on the Hugging Face hub, with its ``config`` and ``split``, or one of its ``files``.
        synthetic: generated set of dialogues, ``profiles`` or ``demonstrations``.
        cut: ``document`` (each row), ``wikitext-articles`` (at title rows), ``passages``, or ``turns``
            (each row has turns and an answer), or ``questions`` (each row has a context and questions about it).
        passage_chars: minimum number of characters of a passage, for ``cut = "passages"``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    embedded: str | None = None
    hub: str | None = None
    config: str | None = None
    files: str | None = None
    split: str = "test"
    synthetic: Literal["profiles", "demonstrations"] | None = None
    cut: Literal["document", "wikitext-articles", "passages", "turns", "questions"] = "document"
    passage_chars: int = Field(default=8000, ge=200)


class RecallSpec(BaseModel):
    """Recall of a fact that is stated within prose.

    Attributes:
        distances: tokens between the end of the fact and the question.
        trials: number of trials per distance.
        lead: minimum tokens of prose before the fact.
        context: minimum tokens of context, so that a near fact does not mean a short context and window.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    distances: tuple[int, ...] = (30, 60, 120, 240, 400, 600)
    trials: int = Field(default=20, ge=1)
    lead: int = Field(default=40, ge=0)
    context: int = Field(default=400, ge=32)

    def signature(self) -> str:
        """The settings that decide what a number means."""
        distances = ",".join(map(str, self.distances))
        return f"distances:{distances}|trials:{self.trials}|context:{self.context}"


class OnlineSpec(BaseModel):
    """Scoring a target given the compressed memory of t chunks.

    Attributes:
        steps: the values of t.
        query: ``next`` (turn t + 1 is the query, turn t + 2 the target), ``last`` (the last turn is
            the query at every step, the answer the target) or ``text`` (chunks of running text, and
            the next chunk is the target).
        between: text put between turns; ``before_answer``: text put before the answer.
        segment: tokens per chunk of running text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: tuple[int, ...] = (1, 2, 4, 6, 8, 12)
    query: Literal["next", "last", "text"] = "next"
    between: str = "\n\n"
    before_answer: str = "\n\n"
    segment: int = Field(default=64, ge=8, le=512)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps):
            raise ValueError("'steps' are different whole numbers of at least 1")
        return self

    def signature(self) -> str:
        """The settings that decide what a number means."""
        chunk = f"|segment:{self.segment}" if self.query == "text" else ""
        return f"steps:{','.join(map(str, self.steps))}|query:{self.query}{chunk}"


class GenerationSpec(BaseModel):
    """Lengths of prefix and continuation in a generation task.

    Attributes:
        prefix: tokens that are read and compressed.
        new_tokens: tokens that are generated; as many of the document's own are the reference.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    prefix: int = Field(default=256, ge=32)
    new_tokens: int = Field(default=64, ge=1)


class AnswerSpec(BaseModel):
    """How samples of a long-context task are made by rule.

    Attributes:
        recipe: name of the recipe (:mod:`kvbench.data.samples`), and its ``options``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipe: str
    options: dict[str, str | int | bool] = Field(default_factory=dict)

    def made(self) -> Recipe:
        """The recipe.

        Raises:
            ValueError: there is no such recipe, or it has no such option.
        """
        kind = RECIPES.get(self.recipe)
        if kind is None:
            raise ValueError(f"no recipe {self.recipe!r}; there are {', '.join(RECIPES)}")
        unknown_options = set(self.options) - {field.name for field in dataclasses.fields(kind)}
        if unknown_options:
            raise ValueError(f"recipe {self.recipe!r} has no option {min(unknown_options)!r}")
        return kind(**self.options)

    @model_validator(mode="after")
    def _known(self) -> Self:
        self.made()
        return self

    def signature(self) -> str:
        """The settings that decide what a number means."""
        options = "".join(f",{name}:{value}" for name, value in sorted(self.options.items()))
        return f"{self.recipe}{options}"


class Task(BaseModel):
    """What is read, how it is cut, and which protocols it can be measured with.

    Attributes:
        protocols: supported protocols; the first is the default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    version: int
    summary: str
    kind: Literal["lm", "recall", "online", "generation", "answer", "questions"]
    protocols: tuple[str, ...] = Field(min_length=1)
    corpus: CorpusSpec
    recall: RecallSpec | None = None
    online: OnlineSpec | None = None
    generation: GenerationSpec | None = None
    answer: AnswerSpec | None = None
    questions: QuestionRowsSpec | None = None

    @property
    def measurable(self) -> tuple[str, ...]:
        """The protocols that it can be measured with: every text that is written can be compressed meanwhile."""
        return (*self.protocols, "decode") if self.kind == "generation" else self.protocols

    @property
    def has_answers(self) -> bool:
        """Whether the target is an answer, which is right or wrong."""
        return self.kind == "recall" or (self.online is not None and self.online.query == "last")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        tables = {
            "recall": self.recall, "generation": self.generation, "online": self.online, "answer": self.answer,
        }
        for kind, table in tables.items():
            if (self.kind == kind) != (table is not None):
                raise ValueError(f"a task of kind {kind!r} has a table [{kind}], and no other has one")
        if self.questions is None if self.kind == "questions" else self.questions is not None and self.answer is None:
            raise ValueError("a task of kind 'questions' has a table [questions]; of others 'answer' may have one")
        own = _OWN_PROTOCOL.get(self.kind)
        if own is not None and self.protocols != (own,):
            raise ValueError(f"a task of kind {self.kind!r} has protocols = [\"{own}\"]")
        taken = sorted(({*_OWN_PROTOCOL.values()} - {"prefix"}) & {*self.protocols}) if own is None else []
        if taken:
            raise ValueError(f"a task of kind {self.kind!r} is not measured with protocol {taken[0]!r}")
        self._check_corpus()
        return self

    def _check_corpus(self) -> None:
        if (self.questions is not None) != (self.corpus.cut == "questions"):
            raise ValueError("cut = \"questions\" goes with a table [questions]")
        sources = (self.corpus.embedded, self.corpus.hub, self.corpus.synthetic)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("the corpus has one of 'embedded', 'hub' and 'synthetic'")
        in_turns = self.online is not None and self.online.query != "text"
        if in_turns != (self.corpus.cut == "turns"):
            raise ValueError("cut = \"turns\" goes with [online] query = \"next\" or \"last\"")
        if (self.corpus.synthetic is not None and not in_turns) or (self.corpus.hub is not None and in_turns):
            raise ValueError("turns are 'embedded' or 'synthetic', and running text is not 'synthetic'")


def tasks_folder() -> Path:
    """The folder of task files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "tasks"
    return inside if inside.is_dir() else package.parent / "tasks"


def task_names() -> list[str]:
    return sorted(path.stem for path in tasks_folder().glob("*.toml"))


def expanded(names: Iterable[str]) -> list[str]:
    """Task names, with those of groups in place of their groups."""
    known = task_names()
    found = [
        one for name in names
        for one in (
            [task for task in known if task.startswith(f"{name}-") and task not in APART] if name in GROUPS else [name]
        )
    ]
    return list(dict.fromkeys(found))


def load_task(name: str) -> Task:
    """Load a task by its name, or from the path of a TOML file.

    Raises:
        UserError: there is no such task, or its file is not valid.
    """
    own = name.endswith(".toml")
    path = Path(name) if own else tasks_folder() / f"{name}.toml"
    if not own and name not in task_names():
        from kvbench.data.near_names import unknown_task  # takes a moment that only this error needs

        raise unknown_task(name, (*GROUPS, *task_names()))
    return read_toml(path, Task, "task file", "Give a path to a TOML file.")
