"""JSON that others wrote: whatever is wrong with it is one kind of error."""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, or more than Python reads: whole numbers of thousands of digits, brackets
            within brackets thousands deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except ValueError as error:
        if "digits" in str(error):  # Python's own advice follows, which is of no use here
            raise ValueError(str(error).partition(";")[0]) from None
        raise
