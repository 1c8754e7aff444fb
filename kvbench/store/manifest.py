"""``run.json`` as typed records: what was requested, and what is known of tasks, models and machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from kvbench.parsing import parse_json
from kvbench.store.records import Cell

PROFILE = "profile"
"""Name of the task and of the protocol of a profile, and the kind of its entry."""


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """A task after its documents were cut into token sequences for one model.

    Attributes:
        kind: ``lm``, ``recall``, ``online``, ``generation``, ``answer`` or ``questions``.
        answers: whether its targets are answers, for which accuracy is reported.
        version: version of the task.
        signature: how its documents were cut and read.
        seq_len: tokens per sequence, None if they differ; ``new_tokens``: tokens to generate after it, if any.
        documents: their ids, in order; ``lengths``: their numbers of tokens.
        skipped_documents: number of documents too short or too long for the protocol.
        dropped_tokens: number of tokens that are in no sequence; ``tokens``: sum of the lengths.
    """

    kind: str
    answers: bool = False
    version: int = 1
    signature: str
    seq_len: int | None
    new_tokens: int | None = None
    documents: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    skipped_documents: int = 0
    dropped_tokens: int = 0
    tokens: int = 0

    @property
    def asks(self) -> bool:
        """Whether questions about contexts are answered."""
        return self.kind in ("answer", "questions")


@dataclass(frozen=True, kw_only=True)
class ProfileInfo:
    """What all cells of a profile share.

    Attributes:
        repeats: number of processes requested.
        notes: remarks on the model that its name does not tell, such as that its weights are random.
        device: where it was measured.
        budget: bytes within which the largest batch is searched for.
        signature: fill, precision, device, threads and attention kernel.
    """

    kind: str = PROFILE
    repeats: int
    notes: tuple[str, ...] = ()
    device: str = "cpu"
    documents: tuple[str, ...] = ()
    budget: int | None = None
    signature: str


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of a profile, and the sizes of the model on it.

    Attributes:
        notes: as in :class:`ProfileInfo`; ``mark``: text appended to the attention kernel in signatures.
        probe: what a probe of the model has found, by name.
        weights: bytes of the weights; ``entry``: bytes of one cache entry of one row, over all layers.
        threads: number of CPU threads.
        device_name, device_bytes: name and memory of the GPU; None on a CPU.
    """

    notes: tuple[str, ...] = ()
    mark: str = ""
    probe: dict[str, Any] = field(default_factory=dict)
    weights: int = 0
    entry: int = 0
    threads: int | None = None
    device: str | None = None
    dtype: str | None = None
    device_name: str | None = None
    device_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``run.json``.

    Attributes:
        content: hash of the request.
        started, finished: ISO times; ``finished`` is None until every cell is complete.
        command: the command line.
        limit: documents per task, or repeats of a profile; 0 for all.
        sources: task -> where its documents come from.
        tasks: setting (:attr:`Cell.setting`) -> its task; ``profiles`` likewise.
        probes: model -> what a probe of it has found.
        machine: the machine of a profile; None for a run.
        environment: versions of packages, processor, commit (:mod:`kvbench.store.environment`).
        without_texts: whether texts and paths were taken out, for a bundle (``kvbench report --bundle``).
        cells: in the order of the plan.
    """

    content: str
    started: str = ""
    command: tuple[str, ...] = ()
    limit: int = 0
    finished: str | None = None
    sources: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    profiles: dict[str, ProfileInfo] = field(default_factory=dict)
    probes: dict[str, dict[str, Any]] = field(default_factory=dict)
    machine: Machine | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    without_texts: bool = False
    cells: tuple[Cell, ...]

    @classmethod
    def parse(cls, text: str) -> Manifest:
        """Read the text of ``run.json``.

        Raises:
            ValueError: it is not what :meth:`text` writes.
        """
        raw = parse_json(text)
        if not isinstance(raw, dict) or not {"cells", "tasks", "content"} <= set(raw):
            raise ValueError("it lacks what a run has")
        from pydantic import TypeAdapter, ValidationError  # imported late: timing on a GPU does not need it

        try:
            infos = TypeAdapter(dict[str, dict[str, Any]]).validate_python(raw["tasks"])
            profiles = {name: info for name, info in infos.items() if info.get("kind") == PROFILE}
            tasks = {name: info for name, info in infos.items() if name not in profiles}
            found: Manifest = _adapter().validate_python({**raw, "tasks": tasks, "profiles": profiles})
            return found
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error

    def text(self) -> str:
        """The text of ``run.json``."""
        content = {"schema": 1, **dataclasses.asdict(self)}
        content["tasks"] |= content.pop("profiles")
        for name in ("probes", "machine", "without_texts"):
            if not content[name]:
                del content[name]
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    def describes(self, content: str, limit: int) -> bool:
        """Whether this describes a run of that content and limit."""
        return (self.content, self.limit) == (content, limit)

    @property
    def knows_models(self) -> bool:
        """Whether the results of a probe are recorded for every model that is not only profiled."""
        return {cell.model for cell in self.cells if not cell.is_profile} <= set(self.probes)

    def signature_of(self, setting: str) -> str | None:
        """The signature of the records of a setting; None if there are none."""
        info = self.tasks.get(setting)
        return info.signature if info else None


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)
