"""Code blocks of README.md and docs/, and the commands that a shell would call in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))

_FENCE = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", flags=re.S | re.M)
_SHELL = """
command_not_found_handle() { printf '%s\\0' "$@" ''; }
cd() { command_not_found_handle cd "$@"; }
PATH=/nowhere
"""


class Fence(NamedTuple):
    language: str
    code: str


def fences(page: str) -> list[Fence]:
    return [Fence(*found[1:]) for found in _FENCE.findall((ROOT / page).read_text(encoding="utf-8"))]


def commands(fence: Fence, folder: Path) -> list[list[str]]:
    """The words of each command, as bash reads them in a folder: loops, globs, quotes and comments are its business.

    Nothing is run: there is no program, and what bash does not find it hands over.
    """
    code = fence.code
    if fence.language == "console":  # with what is printed
        code = "\n".join(re.findall(r"^\$ (.*)$", code, flags=re.M))
    done = subprocess.run(
        ["/bin/bash", "-u", "-c", _SHELL + code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert not done.stderr, done.stderr
    return [call.split("\0") for call in done.stdout.removesuffix("\0\0").split("\0\0")]
