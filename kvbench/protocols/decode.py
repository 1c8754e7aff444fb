"""The protocol ``decode``: entries are removed while text is written, as for long chains of thought.

The prefix is read whole. While the model writes, a policy removes entries after every ``every`` tokens, down to
``entries`` per layer and head, those of the prefix and of the written text alike. Methods that hold a constant number
of entries from the start (``sinks``, ``window``) hold ``entries`` of them throughout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from kvbench.data.tasks import GenerationSpec
from kvbench.errors import UserError
from kvbench.protocols.base import Setting
from kvbench.protocols.generate import Generate

NEW_TOKENS = 1024
"""Default number of tokens to write, if the model's context has room for them."""


@dataclass(frozen=True)
class Decode(Generate):
    """Generates long texts from a cache of constant size.

    Attributes:
        entries: per layer and head, after every removal; ``every``: tokens between two removals.
    """

    name = "decode"
    compresses_late = True
    settings = {
        **{name: setting for name, setting in Generate.settings.items() if name != "preset"},
        "decode": replace(Generate.settings["decode"], default="greedy"),
        "entries": Setting("512"), "every": Setting("128"),
    }

    entries: int = 512
    every: int = 128

    @classmethod
    def of(cls, spec: GenerationSpec, options: Mapping[str, str], context: int, model: str) -> Self:
        new = options["new_tokens"]
        if new == "auto":
            prefix = spec.prefix if options["prefix"] == "auto" else int(options["prefix"])
            new = str(max(1, min(NEW_TOKENS, context - prefix)))
        made = super().of(spec, {**options, "new_tokens": new, "preset": "task"}, context, model)
        entries, every = int(options["entries"]), int(options["every"])
        if made.new_tokens <= every or made.prefix + made.new_tokens <= entries:
            raise UserError(
                f"With a prefix of {made.prefix} tokens, {made.new_tokens} to write, entries={entries} and "
                f"every={every} nothing would ever be removed.",
                "Use smaller --set entries= and --set every=, or a longer text.",
            )
        return replace(made, entries=entries, every=every)

    def check_held(self, method: str, held: int, tokens: int) -> None:
        """Check that a method holds a constant number of entries.

        Raises:
            UserError: it holds more than it is to keep, after that many tokens.
        """
        if held > self.entries:
            raise UserError(
                f"{method} holds {held} entries after {tokens} tokens, and the protocol decode keeps {self.entries}.",
                "Leave it out: it holds a share of what was read, or stores it in another form.",
            )

    @property
    def lengths(self) -> str:
        return f"{super().lengths}|E:{self.entries}|every:{self.every}"
