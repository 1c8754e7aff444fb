"""The documentation as a site: built strictly, and without anything that is fetched from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.helpers.pages import ROOT


class Resources(HTMLParser):
    """What a browser loads by itself, other than where a link leads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = {"src", "srcset", "data", "poster"} | ({"href"} if tag in ("link", "use", "image") else set())
        self.found += [value or "" for name, value in attrs if name in names]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The site, and what was imported to build it."""
    site = tmp_path_factory.mktemp("site")
    done = subprocess.run(  # not --quiet, which counts no warnings
        [sys.executable, "-X", "importtime", "-m", "mkdocs", "build", "--strict", "-f",
         str(ROOT / "docs" / "site" / "mkdocs.yml"), "-d", str(site)],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(said)
    return site, done.stderr


@pytest.mark.heavy
def test_every_page_is_there(built: tuple[Path, str]) -> None:
    """A broken link or anchor, or a page that is not in the navigation, is an error of the build."""
    site, _ = built
    pages = [path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")]
    for page in (*pages, "index.html", "CHANGELOG.html", "reports/reference/report.html"):
        assert (site / page).is_file(), page
    commands = (site / "reference" / "cli.html").read_text(encoding="utf-8")
    assert 'id="kvbench-import-kvpress"' in commands
    assert "--budget-tokens" in commands
    assert 'id="kvbench.methods.CachePolicy.scores"' in (site / "reference" / "api.html").read_text(encoding="utf-8")


@pytest.mark.heavy
def test_nothing_is_fetched_from_elsewhere(built: tuple[Path, str]) -> None:
    site, _ = built
    for page in site.rglob("*.html"):
        resources = Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert not [name for name in resources.found if re.match(r"(https?:)?//", name)], page
    outside = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\s]*")
    for sheet in site.rglob("*.css"):
        assert not outside.findall(sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.heavy
def test_docstrings_are_read_without_importing(built: tuple[Path, str]) -> None:
    assert not re.search(r"\|\s+(torch|transformers|kvbench)(\.|$)", built[1], flags=re.M)


def test_what_is_loaded_is_told_from_links() -> None:
    page = Resources()
    page.feed('<a href="https://a.org">a</a><link href="//b.org/x.css"><script src="https://c.org/x.js"></script>')
    page.feed('<img src="d.png">')
    assert page.found == ["//b.org/x.css", "https://c.org/x.js", "d.png"]
