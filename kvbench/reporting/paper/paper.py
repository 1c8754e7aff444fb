"""Writes the folder ``paper``: figures, tables, references, the set-up, and a document that includes all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from kvbench.errors import UserError
from kvbench.reporting.paper.bibliography import bibliography
from kvbench.reporting.paper.columns import paper_tables
from kvbench.reporting.paper.drawing import LEVELS, STYLE, coloured, draw, style
from kvbench.reporting.paper.plots import Plot, plots_of
from kvbench.reporting.paper.selection import comparisons, ranked
from kvbench.reporting.paper.setup import as_latex, as_text, setup_of
from kvbench.reporting.paper.widths import GAP, is_wide
from kvbench.reporting.parallel import in_parallel
from kvbench.reporting.tables.format import is_control, name_of
from kvbench.reporting.tables.latex import escaped, latex, slug
from kvbench.reporting.tables.plain import Table
from kvbench.store.folder import RunFolder, write_atomic
from kvbench.store.rows import Results

_SIZE = rf"\footnotesize\setlength{{\tabcolsep}}{{{GAP}pt}}"
_HEAD = r"""% Written by kvbench report --paper, and written again by the next one: copy what you need.
% pdflatex main, bibtex main, pdflatex main, pdflatex main
\documentclass[10pt,twocolumn,a4paper]{article}
\usepackage[textwidth=17cm,columnsep=1cm,textheight=24cm]{geometry}
\usepackage{graphicx}
\usepackage{booktabs}
\setlength{\belowcaptionskip}{5pt}
"""


@dataclass(frozen=True)
class Paper:
    """The files that were written; ``document`` includes all of them."""

    document: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]


def write_paper(runs: Sequence[Path], results: Results, out: Path, metrics: Sequence[str] = ()) -> Paper:
    """Write ``paper/`` into the folder of a report.

    Args:
        metrics: metrics to show beside the main one of each task.

    Raises:
        UserError: the folder cannot be written.
    """
    manifests = [RunFolder(run).manifest() for run in runs]
    rows = [replace(row, method=name_of(row), params={**row.params, "variant": None}) for row in results.rows]
    order, folder = ranked(rows), out / "paper"
    plots, tables = plots_of(rows, metrics), paper_tables(rows, order, metrics)
    paragraphs = setup_of(manifests, results.rows, results.failures)
    measured = {row.name for row in results.rows}
    cells = [cell for manifest in manifests for cell in manifest.cells if cell.name in measured]
    versions = sorted({str((m.environment.get("packages") or {}).get("kvbench") or "") for m in manifests} - {""})
    texts = {
        "main.tex": document(plots, tables, order),
        "setup.tex": as_latex(paragraphs), "setup.txt": as_text(paragraphs),
        "references.bib": bibliography(
            [cell.method for cell in cells], [cell.task for cell in cells], [key[1] for key in comparisons(rows)],
            versions,
        ),
        STYLE: files("kvbench.reporting.paper").joinpath(STYLE).read_text(encoding="utf-8"),
    }
    figures = [folder / "figures" / f"{plot.name}.pdf" for plot in plots]
    tabular = {
        folder / "tables" / f"{table.name}.tex": latex(table, is_wide(table), _SIZE, "r") for table in tables
    }
    drawn = in_parallel([partial(draw, plot, looks_of(plot, order)) for plot in plots]) if plots else []
    try:
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for path, content in zip(figures, drawn, strict=True):
            write_atomic(path, content)
        for path, text in {**tabular, **{folder / name: text for name, text in texts.items()}}.items():
            write_atomic(path, text)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error
    return Paper(folder / "main.tex", tuple(figures), tuple(tabular))


def looks_of(plot: Plot, order: Sequence[str]) -> dict[str, dict[str, object]]:
    """How the lines of a figure look: the same methods have the same colours in all figures of quality; lines of a
    profile, which are of a method at a ratio, are coloured in their order."""
    names = list(dict.fromkeys(line.name for panel in plot.panels for line in panel.lines))
    known = [name for name in order if name in names]
    return coloured(order if known else [name for name in names if not is_control(name)], style())


def document(plots: Sequence[Plot], tables: Sequence[Table], order: Sequence[str]) -> str:
    """The document: every figure and table, the set-up as an appendix, and the references."""
    floats = [_figure(plot, order) for plot in plots] + [[rf"\input{{tables/{table.name}}}"] for table in tables]
    # LaTeX sets what floats above the heading if that is on the same page; nothing is before the first page's.
    lines = [rf"\extrafloats{{{len(floats)}}} % LaTeX holds back only so many otherwise", r"\begin{document}"]
    lines += [r"\section{Results}", r"\suppressfloats[t]", _pointers(plots, tables), ""]
    for one in floats:
        lines += [*one, ""]
    lines += [
        r"\appendix", r"\section{Set-up}", r"\label{sec:setup}", r"\input{setup}", "",
        r"\clearpage", r"\nocite{*}", r"\bibliographystyle{plain}", r"\bibliography{references}", r"\end{document}",
    ]
    return _HEAD + "\n".join(lines) + "\n"


def _pointers(plots: Sequence[Plot], tables: Sequence[Table]) -> str:
    """Sentences that refer to everything by its label."""
    found = []
    for what, labels in (
        ("figure", [f"fig:{plot.name}" for plot in plots]), ("table", [f"tab:{slug(table.name)}" for table in tables]),
    ):
        ends = [rf"\ref{{{label}}}" for label in (labels if len(labels) < 3 else (labels[0], labels[-1]))]
        if ends:
            several = "s" if len(labels) > 1 else ""
            found.append(f"{what}{several}~{(' and ' if len(labels) < 3 else ' to ').join(ends)}")
    measured = f"What was measured: {'; '.join(found)}. " if found else ""
    return rf"{measured}How: appendix~\ref{{sec:setup}}."


def _figure(plot: Plot, order: Sequence[str]) -> list[str]:
    kind = "figure" if len(plot.panels) == 1 else "figure*"
    looks = looks_of(plot, order)
    names = dict.fromkeys(line.name for panel in plot.panels for line in panel.lines)
    grey = [name for name in names if name not in looks and name not in LEVELS]
    caption = f"{plot.caption} Grey: {', '.join(grey)}." if grey else plot.caption
    return [
        rf"\begin{{{kind}}}", r"\centering", rf"\includegraphics{{figures/{plot.name}.pdf}}",
        rf"\caption{{{escaped(caption)}}}", rf"\label{{fig:{plot.name}}}", rf"\end{{{kind}}}",
    ]
