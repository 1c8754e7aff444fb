"""Tasks: one TOML file each, read and checked here."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kvbench.config import read_toml
from kvbench.errors import unknown


class CorpusSpec(BaseModel):
    """Where the documents come from and how they are cut.

    Attributes:
        embedded: file in ``kvbench/assets``; None if the corpus is on the hub.
        hub: data set id on the Hugging Face hub, with ``config`` and ``split``, or with one of its ``files``.
        synthetic: a set made by a rule, ``profiles`` or ``demonstrations``.
        cut: ``document`` (each row), ``wikitext-articles`` (at title rows), ``passages``, or ``turns``
            (each row has turns and an answer).
        passage_chars: least characters in a passage, for ``cut = "passages"``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    embedded: str | None = None
    hub: str | None = None
    config: str | None = None
    files: str | None = None
    split: str = "test"
    synthetic: Literal["profiles", "demonstrations"] | None = None
    cut: Literal["document", "wikitext-articles", "passages", "turns"] = "document"
    passage_chars: int = Field(default=8000, ge=200)


class RecallSpec(BaseModel):
    """Facts among prose.

    Attributes:
        distances: tokens from the end of the fact to the question.
        trials: per distance.
        lead: least tokens of prose before the fact.
        context: least tokens of context, so that windows are not short just because the fact is near.
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
    """What is scored given the memory of t chunks.

    Attributes:
        steps: the numbers t of chunks.
        query: ``next`` (turn t + 1 is the query, turn t + 2 the target), ``last`` (the last turn is
            the query at every step, the answer the target) or ``text`` (chunks of running text, and
            the next chunk is the target).
        between: put between turns; ``before_answer`` before the answer.
        segment: tokens of a chunk of running text.
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
    """How much of a document is given, and how much is written after it.

    Attributes:
        prefix: tokens that are read and compressed.
        new_tokens: tokens that are written, and that the document's own text has after the prefix.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    prefix: int = Field(default=256, ge=32)
    new_tokens: int = Field(default=64, ge=1)


class Task(BaseModel):
    """What to read, how to cut it, which protocols it may be measured with.

    Attributes:
        protocols: allowed protocols; the first is the default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    version: int
    summary: str
    kind: Literal["lm", "recall", "online", "generation"]
    protocols: tuple[str, ...] = Field(min_length=1)
    corpus: CorpusSpec
    recall: RecallSpec | None = None
    online: OnlineSpec | None = None
    generation: GenerationSpec | None = None

    @property
    def has_answers(self) -> bool:
        """Whether what is scored is an answer, right or wrong."""
        return self.kind == "recall" or (self.online is not None and self.online.query == "last")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.kind == "recall") != (self.recall is not None):
            raise ValueError("a task of kind 'recall' has a table [recall], and no other has one")
        if self.kind == "recall" and self.protocols != ("prefix",):
            raise ValueError("a task of kind 'recall' has protocols = [\"prefix\"]")
        if (self.kind == "generation") != (self.generation is not None):
            raise ValueError("a task of kind 'generation' has a table [generation], and no other has one")
        if (self.kind == "generation") != (self.protocols == ("generate",)):
            raise ValueError("a task of kind 'generation', and no other, has protocols = [\"generate\"]")
        if (self.kind == "online") != (self.online is not None):
            raise ValueError("a task of kind 'online' has a table [online], and no other has one")
        if (self.kind == "online") != (self.protocols == ("online",)):
            raise ValueError("a task of kind 'online', and no other, has protocols = [\"online\"]")
        sources = (self.corpus.embedded, self.corpus.hub, self.corpus.synthetic)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("the corpus has one of 'embedded', 'hub' and 'synthetic'")
        in_turns = self.online is not None and self.online.query != "text"
        if in_turns != (self.corpus.cut == "turns"):
            raise ValueError("cut = \"turns\" goes with [online] query = \"next\" or \"last\"")
        if (self.corpus.synthetic is not None and not in_turns) or (self.corpus.hub is not None and in_turns):
            raise ValueError("turns are 'embedded' or 'synthetic', and running text is not 'synthetic'")
        return self


def tasks_folder() -> Path:
    """The folder of task files: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "tasks"
    return inside if inside.is_dir() else package.parent / "tasks"


def task_names() -> list[str]:
    return sorted(path.stem for path in tasks_folder().glob("*.toml"))


def load_task(name: str) -> Task:
    """A task by its name, or by the path of a TOML file of your own.

    Raises:
        UserError: no such task, or its file is not a valid task.
    """
    own = name.endswith(".toml")
    path = Path(name) if own else tasks_folder() / f"{name}.toml"
    if not own and name not in task_names():
        raise unknown("task", name, task_names())
    return read_toml(path, Task, "task file", "Give a path to a TOML file.")
