"""References as they stand in a file of comma-separated values: a list of Python's, of JSON, or of NumPy's."""

from __future__ import annotations

import ast
import re

from kvbench.errors import UserError
from kvbench.parsing import parse_json

_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_ITEM = rf"(?:{_TEXT}|-?\d+(?:\.\d+)?)"
_LIST = re.compile(rf"\[\s*{_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*\s*\]", re.DOTALL)


def parse_references(text: str, where: str) -> tuple[str, ...]:
    """Parse a list of texts or numbers.

    pandas writes an array of texts without commas, ``['a' 'b']``, which Python would read as one text, ``ab``. So the
    items are found first, and read one by one.

    Args:
        where: file and line, for the message.

    Raises:
        UserError: it is no list, or an empty one.
    """
    whole = text.strip()
    try:
        items = parse_json(whole) if whole.startswith("[") else None
        if items and all(type(item) in (str, int, float) for item in items):
            return tuple(map(str, items))
    except ValueError:  # not JSON
        pass
    try:
        if _LIST.fullmatch(whole):
            return tuple(str(ast.literal_eval(item)) for item in re.findall(_ITEM, whole, re.DOTALL))
    except (ValueError, SyntaxError):  # an escape that Python does not know
        pass
    shown = whole if len(whole) <= 60 else f"{whole[:57]}..."
    raise UserError(f"{where}: the references are no list of texts: {shown}", "Write them as ['first', 'second'].")
