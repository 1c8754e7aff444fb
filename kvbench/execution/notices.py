"""What a run says while it goes on, besides its progress: what was found, what is left out, what has failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from kvbench.store.manifest import TaskInfo
from kvbench.store.records import Failure


@dataclass(frozen=True)
class Notices:
    """Prints sentences above the progress display.

    Attributes:
        told: what has been said about documents and cells that are left out, so that neither another seed or round nor
            the tables say it again.
    """

    console: Console
    told: set[str] = field(default_factory=set)

    def once(self, sentence: str) -> None:
        if sentence not in self.told:
            self.told.add(sentence)
            self.say(sentence)

    def say(self, sentence: str) -> None:
        if sentence:
            self.console.print(sentence, highlight=False, markup=False)

    def skipped(self, tasks: Mapping[str, TaskInfo]) -> None:
        """Say how many documents and tokens of the tasks are not measured, if any."""
        for name, task in tasks.items():
            if task.skipped_documents or task.dropped_tokens:
                self.once(
                    f"{name}: {len(task.documents)} documents; {task.skipped_documents} too short or too long were "
                    f"skipped; {task.dropped_tokens} tokens are in no sequence."
                )

    def failed(self, failure: Failure) -> None:
        said = escape(f"{failure.error} {failure.hint}")
        self.console.print(f"[red]{failure.word}[/] {said}", highlight=False)
