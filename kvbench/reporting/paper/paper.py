"""Writes the folder ``paper``: figures, tables, references, the set-up, and a document that includes all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path

from kvbench.errors import UserError
from kvbench.reporting.paper.bibliography import bibliography
from kvbench.reporting.paper.columns import is_wide, paper_tables
from kvbench.reporting.paper.drawing import LEVELS, STYLE, coloured, draw, style
from kvbench.reporting.paper.plots import Plot, plots_of
from kvbench.reporting.paper.selection import comparisons, ranked
from kvbench.reporting.paper.setup import as_latex, as_text, setup_of
from kvbench.reporting.parallel import in_parallel
from kvbench.reporting.tables.format import CONTROLS, name_of
from kvbench.reporting.tables.latex import escaped, latex
from kvbench.reporting.tables.plain import Table
from kvbench.store.folder import RunFolder, write_atomic
from kvbench.store.rows import Results

_AT_ONCE = 12
"""Figures and tables after which the document begins a page, since LaTeX holds back only so many."""
_HEAD = r"""% Written by kvbench report --paper, and written again by the next one: copy what you need.
% pdflatex main, bibtex main, pdflatex main, pdflatex main
\documentclass[10pt,twocolumn,a4paper]{article}
\usepackage[textwidth=17cm,columnsep=1cm,textheight=24cm]{geometry}
\usepackage{graphicx}
\usepackage{booktabs}
\setlength{\tabcolsep}{3pt}
\setlength{\belowcaptionskip}{5pt}
\begin{document}
"""


def write_paper(runs: Sequence[Path], results: Results, out: Path, metrics: Sequence[str] = ()) -> Path:
    """Write ``paper/`` into the folder of a report.

    Args:
        metrics: metrics to show beside the main one of each task.

    Returns:
        The document that includes everything.

    Raises:
        UserError: the folder cannot be written.
    """
    manifests = [RunFolder(run).manifest() for run in runs]
    rows = [replace(row, method=name_of(row), params={**row.params, "variant": None}) for row in results.rows]
    order, folder = ranked(rows), out / "paper"
    plots, tables = plots_of(rows, metrics), paper_tables(rows, order, metrics)
    paragraphs = setup_of(manifests, results.rows, results.failures)
    cells = [cell for manifest in manifests for cell in manifest.cells]
    versions = sorted({str((m.environment.get("packages") or {}).get("kvbench") or "") for m in manifests} - {""})
    texts = {
        "main.tex": document(plots, tables, order),
        "setup.tex": as_latex(paragraphs), "setup.txt": as_text(paragraphs),
        "references.bib": bibliography(
            [cell.method for cell in cells], [cell.task for cell in cells], [key[1] for key in comparisons(rows)],
            versions,
        ),
        STYLE: files("kvbench.reporting.paper").joinpath(STYLE).read_text(encoding="utf-8"),
        **{f"tables/{table.name}.tex": latex(table, is_wide(table), r"\footnotesize", "r") for table in tables},
    }
    drawn = in_parallel([partial(draw, plot, looks_of(plot, order)) for plot in plots]) if plots else []
    try:
        for name in ("figures", "tables"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for plot, content in zip(plots, drawn, strict=True):
            write_atomic(folder / "figures" / f"{plot.name}.pdf", content)
        for name, text in texts.items():
            write_atomic(folder / name, text)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written: {error.strerror}.") from error
    return folder / "main.tex"


def looks_of(plot: Plot, order: Sequence[str]) -> dict[str, dict[str, object]]:
    """How the lines of a figure look: the same methods have the same colours in all figures of quality; lines of a
    profile, which are of a method at a ratio, are coloured in their order."""
    names = list(dict.fromkeys(line.name for panel in plot.panels for line in panel.lines))
    known = [name for name in order if name in names]
    return coloured(order if known else [name for name in names if name not in CONTROLS], style())


def document(plots: Sequence[Plot], tables: Sequence[Table], order: Sequence[str]) -> str:
    """The document: the set-up, every figure and table, and the references."""
    floats = [_figure(plot, order) for plot in plots] + [[rf"\input{{tables/{table.name}}}"] for table in tables]
    lines = [r"\section{Set-up}", r"\input{setup}", "", r"\section{Results}", ""]
    for number, one in enumerate(floats, 1):
        lines += [*one, *([r"\clearpage"] if number % _AT_ONCE == 0 else []), ""]
    lines += [
        r"\clearpage", r"\nocite{*}", r"\bibliographystyle{plain}", r"\bibliography{references}", r"\end{document}",
    ]
    return _HEAD + "\n".join(lines) + "\n"


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
