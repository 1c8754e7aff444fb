"""What a report page holds besides its text."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from typing import Any


def numbers_of(page: Path) -> dict[str, Any]:
    """The packed numbers of a page."""
    found = re.search(r'<script type="application/gzip" id="data">(.*?)</script>', page.read_text(), re.S)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found.group(1))))  # type: ignore[no-any-return]
