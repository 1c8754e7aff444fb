"""Self-contained HTML page of runs: what they say, figures and tables to ask, and the recipe behind every number."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from kvbench.reporting.page.content import content_of
from kvbench.reporting.page.documents import answers_of, survival_of, texts_of, worst_documents
from kvbench.reporting.page.summary import summary_of
from kvbench.reporting.tables.tables import tables_of
from kvbench.store.folder import RunFolder, write_atomic
from kvbench.store.manifest import Manifest
from kvbench.store.records import Failure
from kvbench.store.rows import Row

_SCRIPTS = ("vendor/plotly.min.js", "vendor/tabulator.min.js", "figures.js", "page.js")
_STYLES = ("vendor/tabulator.min.css", "page.css")
_FEW = 4
"""Number of runs that the heading names."""


def write_page(runs: Sequence[tuple[RunFolder, Sequence[Row]]], failures: Sequence[Failure], out: Path) -> Path:
    """Write ``report.html`` of one or more runs, each with its rows, into a folder.

    The page loads nothing from elsewhere, and its policy allows no script but those in it: names and texts of documents
    cannot become code.
    """
    folders = [folder for folder, _ in runs]
    manifests = [folder.manifest() for folder in folders]
    rows = [row for _, mine in runs for row in mine]
    commands = [shlex.join(["kvbench", *manifest.command[1:]]) for manifest in manifests]
    content = content_of(list(zip(commands, (mine for _, mine in runs), strict=True)))
    content |= {
        "texts": [one for folder in folders for one in texts_of(folder)],
        "answers": [one for folder in folders for one in answers_of(folder)],
        "survival": [one for folder in folders for one in survival_of(folder)],
        "masks": {name: mask for folder in folders for name, mask in folder.masks().items()},
    }
    scripts = [_read(name) for name in _SCRIPTS]
    text = Environment(autoescape=True, trim_blocks=True).from_string(_read("page.html.j2")).render(
        name=_name([folder.path.resolve().name for folder in folders]), about=list(map(_about, manifests)),
        failures=[failure for failure in failures if not failure.left_out],
        left_out=list(dict.fromkeys(failure.sentence for failure in failures if failure.left_out)),
        summary=summary_of(rows), content=content, commands=commands,
        worst=[one for folder in folders for one in worst_documents(folder)],
        notes=list(dict.fromkeys(note for table in tables_of(rows) for note in table.notes)),
        environment=json.dumps([manifest.environment for manifest in manifests], indent=1, ensure_ascii=False),
        data=_packed(content), styles=[Markup(_read(name)) for name in _STYLES], scripts=list(map(Markup, scripts)),
        allowed=" ".join(map(_digest, scripts)),
    )
    path = out / "report.html"
    write_atomic(path, text)
    return path


def _read(name: str) -> str:
    return files("kvbench.reporting.page").joinpath(name).read_text(encoding="utf-8")


def _name(runs: Sequence[str]) -> str:
    named = runs if len(runs) <= _FEW else [*runs[: _FEW - 1], f"and {len(runs) - _FEW + 1} more runs"]
    return ", ".join(named)


def _packed(content: dict[str, Any]) -> str:
    """JSON, compressed, in letters that cannot end the element that they stand in; names may hold half characters."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _digest(script: str) -> str:
    """What the policy of the page calls a script that it allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _about(manifest: Manifest) -> str:
    environment = manifest.environment
    code = environment.get("code") or {}
    elsewhere = environment.get("imported_from")
    parts = [
        f"imported from {elsewhere} {manifest.started}" if elsewhere else f"measured {manifest.started}",
        environment.get("processor") or "",
        "" if elsewhere else f"torch {environment.get('packages', {}).get('torch', '')}",
        f"kvbench {environment.get('packages', {}).get('kvbench', '')}"
        + (f" at {code['commit'][:10]}{' with changes' if code.get('dirty') else ''}" if code.get("commit") else ""),
    ]
    return " · ".join(part for part in parts if part)
