"""What the site has besides the pages of ``docs/``: files of the repository that pages link to, and the commands.

Links in pages are those of the repository, so that they can be followed there as well. Here a link out of ``docs/``
leads to a page in ``OUTSIDE``, or to a copy of the file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = {"index.md": "README.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
"""Pages of the site that are files at the top of the repository."""

COMMANDS = "reference/cli.md"
LINK = re.compile(r"\[([^]]*)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside ``docs/``, the commands, and every file outside that a page links to."""
    for name, source in OUTSIDE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    linked = {_place(page.src_uri, link) for page in files.documentation_pages()
              for _, link, _ in LINK.findall(page.content_string)}
    for path in sorted(linked - set(files.src_uris)):
        if (ROOT / path).is_file():
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    files.append(File.generated(config, COMMANDS, content=_commands()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn the links of the repository into those of the site; of a link to a folder, its words are left."""
    here = page.file.src_uri

    def turned(link: re.Match[str]) -> str:
        place = _place(here, link[2])
        if (ROOT / place).is_dir():
            return link[1]
        return f"[{link[1]}]({os.path.relpath(place, PurePosixPath(here).parent)}{link[3] or ''})"

    return LINK.sub(turned, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of Sphinx in docstrings."""
    return re.sub(r":(class|func|meth):(?=<code>)", "", html)


def _place(page: str, link: str) -> str:
    """Where on the site that stands which a page links to by its place in the repository."""
    source = OUTSIDE.get(page, f"docs/{page}")
    target = os.path.normpath(os.path.join(os.path.dirname(source), link))
    inside = {path: name for name, path in OUTSIDE.items()}
    return inside.get(target, target.removeprefix("docs/"))


def _commands() -> str:
    """The help of all commands, by Typer's own generator; examples in it are code."""
    asked = [sys.executable, "-m", "typer", "kvbench.cli.app", "utils", "docs", "--name", "kvbench"]
    made = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    made = re.sub(r"^  (?=kvbench )", "    ", made, flags=re.M)
    made = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+", "", made)  # sentences that are cut short; all follow
    return made.replace("# `kvbench`\n", "# Command line\n\nWhat `kvbench COMMAND --help` prints.\n", 1)
