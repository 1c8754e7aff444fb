"""Small profiles, and their rows."""

from __future__ import annotations

from typing import Any

from tests.helpers.command import Outcome

SMALL = ("--new-tokens", "6", "--warmups", "1", "--threads", "1")


def rows(outcome: Outcome, **wanted: Any) -> list[dict[str, Any]]:
    def fits(row: dict[str, Any]) -> bool:
        return all((row | row["params"])[k] == v for k, v in wanted.items())

    return [row for row in outcome.document["rows"] if fits(row)]
