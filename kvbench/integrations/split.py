"""Where the part of a prompt that is compressed ends, and the question begins.

Harnesses hand over one flat string. What is compressed without knowledge of the question, and what is read afterwards
from the compressed cache, must be said by a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvbench.errors import UserError


@dataclass(frozen=True)
class SplitRule:
    """How much at the end of a prompt is read after the compression; at least its last token.

    Attributes:
        name: ``none``, ``last:N`` or ``regex:PATTERN``, as it was given.
        count: tokens at the end that are the question, if their number is given.
        pattern: the question begins where this matches last, if it is given.
    """

    name: str
    count: int = 1
    pattern: re.Pattern[str] | None = None

    @classmethod
    def parse(cls, text: str) -> SplitRule:
        """The rule that a user has named.

        Raises:
            UserError: there is no such rule, or its argument is wrong.
        """
        kind, _, argument = text.partition(":")
        if text == "none":
            return cls(text)
        if kind == "last" and re.fullmatch("0*[1-9][0-9]{0,8}", argument):
            return cls(text, int(argument))
        if kind == "regex" and argument:
            try:
                return cls(text, pattern=re.compile(argument))
            except (re.error, OverflowError) as error:
                raise UserError(f"The split rule {text!r} is no regular expression: {error}.") from error
        raise UserError(
            f"There is no split rule {text!r}.",
            "Use none, last:N (N tokens, at least 1), or regex:PATTERN (the question begins where it matches last).",
        )

    def tokens(self, prompt: str, encode: Callable[[str], Sequence[int]]) -> int:
        """Number of tokens at the end of a prompt that are read after the compression.

        Args:
            encode: tokenizes a string as the prompt is.

        Raises:
            UserError: the pattern does not match.
        """
        if self.pattern is None:
            return self.count
        starts = [found.start() for found in self.pattern.finditer(prompt)]
        if not starts:
            raise UserError(
                f"The split rule {self.name!r} does not match the prompt that ends in {prompt[-60:]!r}.",
                "Give a pattern that every prompt has, or run these tasks with another rule.",
            )
        whole, before = encode(prompt), encode(prompt[: starts[-1]])
        same = 0
        while same < min(len(whole), len(before)) and whole[same] == before[same]:
            same += 1
        return max(1, len(whole) - same)
