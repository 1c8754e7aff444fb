"""The table of protocols."""

from __future__ import annotations

from kvbench.data.tasks import Task
from kvbench.errors import unknown
from kvbench.protocols.answer import AnswerProtocol
from kvbench.protocols.base import Protocol
from kvbench.protocols.block import Block
from kvbench.protocols.decode import Decode
from kvbench.protocols.generate import Generate
from kvbench.protocols.online import Online
from kvbench.protocols.prefix import Prefix
from kvbench.protocols.question_rows import QuestionRows
from kvbench.protocols.recall import Recall
from kvbench.protocols.stream import Stream

PROTOCOLS: tuple[type[Protocol], ...] = (
    Block, Stream, Prefix, Recall, Online, Generate, Decode, AnswerProtocol, QuestionRows,
)
NAMES = tuple(dict.fromkeys(protocol.name for protocol in PROTOCOLS))


def protocol_of(task: Task, name: str) -> type[Protocol]:
    """The protocol of that name for the kind of the task.

    Raises:
        UserError: there is none.
    """
    found = {protocol.name: protocol for protocol in PROTOCOLS if protocol.kind == task.kind}
    if name not in found:
        raise unknown(f"protocol of task {task.name!r}", name, found)
    return found[name]


def chosen_protocol(task: Task, asked: str | None) -> type[Protocol]:
    """The requested protocol if the task supports it (the request may be for another task); else the task's first.

    Raises:
        UserError: the task names a protocol that does not exist.
    """
    known = {name: protocol_of(task, name) for name in task.measurable}
    return known[asked if asked in known else task.protocols[0]]
