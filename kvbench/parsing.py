"""Byte sizes and durations, parsed and formatted, and parsing of JSON that may be damaged."""

from __future__ import annotations

import json
import re
from typing import Any

from kvbench.errors import UserError

CARD = "card"
"""Value of ``--memory-budget`` for all free memory of a GPU."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str, option: str = "--memory-budget") -> int:
    """Parse a size such as ``2GiB`` or ``800 MB`` into bytes; ``card``, all free memory of a GPU, gives 0.

    Raises:
        UserError: it is not a size above 0.
    """
    with_card = option == "--memory-budget"
    if text == CARD and with_card:
        return 0
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    try:
        size = int(float(found.group(1)) * _UNITS[found.group(2).upper()]) if found else 0
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UserError(
            f"{option} {text}: not a size in bytes above 0.",
            "Write 2GiB, 800MB or 4e9" + (f"; {CARD} on a GPU." if with_card else "."),
        )
    return size


def bytes_of(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def duration_of(seconds: float) -> str:
    """Format seconds as ``8 s``, ``12 min`` or ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def parse_duration(text: str, option: str) -> float:
    """Parse a duration such as ``90s``, ``30m`` or ``1.5h`` into seconds; a number alone is seconds.

    Raises:
        UserError: it is not a duration above 0.
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smh]?)\s*", text)
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]] if found else 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"{option} {text}: not a duration above 0.", "Write 90s, 30m or 2h.")
    return seconds


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: it is not JSON, or exceeds a limit of Python: integers of thousands of digits, or thousands of
            nested brackets.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError as error:
        if "digits" in str(error):  # drop Python's advice on how to raise the limit
            raise ValueError(str(error).partition(";")[0]) from None
        raise
