"""Self-contained HTML page of runs: sortable tables, figures, failures, and the settings behind every number."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup

from kvbench.analysis.curves import is_of_curve
from kvbench.errors import UserError
from kvbench.reporting.tables.tables import tables_of
from kvbench.store.faults import named, remarks_of
from kvbench.store.folder import RunFolder, write_atomic
from kvbench.store.manifest import Manifest
from kvbench.store.records import Cell, DocumentRecord
from kvbench.store.rows import Results

WORST = 5
"""Number of documents listed for each method at each ratio."""


_OWN = ("metric", "value", "ci_low", "ci_high", "delta", "delta_ci_low", "delta_ci_high", "p_value", "signature")
"""Fields that differ between the rows of one cell."""


@dataclass(frozen=True)
class Worst:
    """A document on which a method loses most; ``more`` is in nats per token above the full cache."""

    task: str
    method: str
    ratio: str | None
    document: str
    more: float


def write_page(folders: Sequence[RunFolder], results: Results, figures: Sequence[Path], out: Path) -> Path:
    """Write ``report.html`` of one or more runs into a folder; the page loads nothing from elsewhere."""
    manifests = [folder.manifest() for folder in folders]
    template = Environment(autoescape=True, trim_blocks=True).from_string(
        files("kvbench.reporting").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    rows, recipes = _rows_and_recipes(results)
    text = template.render(
        name=", ".join(folder.path.resolve().name for folder in folders), about=list(map(_about, manifests)),
        failures=results.failures, sheets=tables_of(results.rows), count=len(rows),
        worst=[one for folder in folders for one in worst_documents(folder)],
        figures=[
            {"name": path.stem, "data": base64.b64encode(path.read_bytes()).decode("ascii")}
            for path in figures if path.suffix == ".png"
        ],
        commands=[shlex.join(["kvbench", *manifest.command[1:]]) for manifest in manifests],
        environment=json.dumps(
            [manifest.environment for manifest in manifests], indent=1, ensure_ascii=False
        ),
        rows=_as_text(rows), recipes=_as_text(recipes),
    )
    path = out / "report.html"
    write_atomic(path, text)
    return path


def _as_text(lines: list[str]) -> Markup:
    """Escape lines of JSON for HTML, except quotes, which need none and would make up two thirds of the page."""
    return Markup(html.escape("\n".join(lines), quote=False))


def _rows_and_recipes(results: Results) -> tuple[list[str], list[str]]:
    """Rows as lines of JSON, and the fields that many rows share as lines of their own, which rows refer to by number.

    Points of curves are left out, since they outnumber all other rows: they are in the figures and in rows.csv.
    """
    rows: list[str] = []
    recipes: dict[str, int] = {}
    for row in (row for row in results.rows if not is_of_curve(row)):
        whole = dataclasses.asdict(row)
        own = {name: whole.pop(name) for name in _OWN}
        own["bin"] = whole["params"].pop("bin", None)
        recipe = json.dumps(whole, ensure_ascii=False)
        own["recipe"] = recipes.setdefault(recipe, len(recipes))
        rows.append(json.dumps(own, ensure_ascii=False))
    return rows, [f"{number}: {recipe}" for recipe, number in recipes.items()]


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


def worst_documents(folder: RunFolder) -> list[Worst]:
    """The documents with the largest loss of each method on tasks that score text, by task, method and ratio."""
    cells = folder.cells()
    found: list[Worst] = []
    for setting, info in folder.manifest().tasks.items():
        if info.kind != "lm":
            continue
        full = next((c for c in cells if c.setting == setting and c.method == "full"), None)
        if full is None:
            continue
        base = _readable(folder, full)
        for cell in (c for c in cells if c.setting == setting and c.role == "method"):
            found += _worst_of(folder, cell, {name: r.nll / r.tokens for name, r in base.items() if r.tokens})
    return found


def _readable(folder: RunFolder, cell: Cell) -> dict[str, DocumentRecord]:
    """The records of a cell; empty if they are damaged, which is reported among the failures."""
    try:
        return folder.records(cell)
    except UserError:
        return {}


def _worst_of(folder: RunFolder, cell: Cell, base: dict[str, float]) -> list[Worst]:
    records = _readable(folder, cell)
    more = {name: r.nll / r.tokens - base[name] for name, r in records.items() if name in base and r.tokens}
    names = sorted(more, key=lambda name: -more[name])[:WORST]
    shown = named(cell.method, remarks_of(cell))
    return [Worst(cell.task, shown, cell.ratio_asked, name, more[name]) for name in names]
