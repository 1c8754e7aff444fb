"""The folder ``paper``: what authors include in LaTeX, written without PyTorch and without LaTeX."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure

from kvbench.methods import METHODS
from kvbench.reporting.paper.bibliography import bibliography
from kvbench.reporting.paper.drawing import COLUMN, MOST, PAGE, coloured, figure_of, style
from kvbench.reporting.paper.plots import Line, Panel, Plot
from kvbench.reporting.tables.latex import escaped, slug
from kvbench.store import faults
from kvbench.store.papers import papers, papers_of
from tests.helpers.command import kvbench
from tests.helpers.records import SINKS, made

ROOT = Path(__file__).parents[2]
STRANGE = r"a_b%c&d#e$f{g}h~i^j\k"
FULL = replace(SINKS, method="full", ratio_asked=None, role="control", model_hash="0123456789abcdef.1")
MINE = replace(SINKS, model_hash=FULL.model_hash)
WITHOUT_TORCH = """
import sys
from pathlib import Path
from kvbench.analysis.results import compute_results
from kvbench.reporting.paper.paper import write_paper
from kvbench.store.folder import RunFolder
run, out = map(Path, sys.argv[1:])
print(write_paper([run], compute_results(RunFolder(run)), out, ["kl"]).document)
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cells = [(FULL, 0.0), (MINE, 1.0), (replace(MINE, ratio_asked="0.7"), 3.0)]
    cells += [(replace(MINE, method=method, ratio_asked=ratio), 2.0 + more)
              for more, method in enumerate(("snapkv", "local", "cam")) for ratio in ("0.5", "0.7")]
    cells += [(replace(MINE, method="snapkv", variant=STRANGE, options={"window": "16"}), 9.0)]
    return made(tmp_path_factory.mktemp("paper") / "run_%1", cells, tokens=12345)


@pytest.fixture(scope="module")
def paper(run: Path) -> Path:
    out = run.parent / "out"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(run), str(out)], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, "PATH": "/nowhere"},  # nor is there LaTeX
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == out / "paper" / "main.tex"
    return out / "paper"


def entries(text: str) -> dict[str, str]:
    return dict(re.findall(r"^@\w+\{([^,]+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))


def test_every_method_has_an_entry_with_the_number_that_the_method_states() -> None:
    for name, kind in METHODS.items():
        text = bibliography([name], [], [])
        assert "No reference" not in text, name
        found = entries(text)
        stated = re.findall(r"\d{4}\.\d{5}", kind.paper)
        mine = [key for key in found if key != "kvbench"]
        assert len(mine) == bool(kind.paper), name
        assert re.findall(r"eprint\s+= \{(.*)\}", "".join(found[key] for key in mine)) == stated, name


def test_a_method_of_another_package_is_said_to_have_none() -> None:
    assert bibliography(["theirs"], [], []).startswith("% No reference is known here for the method theirs.")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes methods of another package of classes with these attributes."""
    def install(**methods: dict[str, str]) -> None:
        faults.loaded_elsewhere.cache_clear()
        monkeypatch.setattr(faults, "entry_points", lambda group, name: [
            SimpleNamespace(load=lambda: SimpleNamespace(**methods[name])) for _ in methods.keys() & {name}
        ])
    yield install
    faults.loaded_elsewhere.cache_clear()


def test_a_method_of_another_package_gives_its_own_entry(elsewhere: Callable[..., None]) -> None:
    entry = "@article{doe2026ends,\n  title = {Ends},\n  author = {Doé, Jane}\n}"
    elsewhere(ends={"bibtex": f"\n{entry}\n"}, twin={"bibtex": entry}, empty={}, broken={"bibtex": "see my page"},
              ours={"bibtex": "@misc{li2024snapkv,\n}"})
    text = bibliography(["ends", "twin"], [], [])
    assert text.count(entry.replace("é", r"{\'e}")) == 1
    assert text.isascii()
    assert "No reference" not in text
    assert [paper.key for paper in papers_of(["ends", "snapkv"])] == ["li2024snapkv", "doe2026ends"]
    assert bibliography(["ours", "snapkv"], [], []).count("li2024snapkv") == 1  # BibTeX refuses a second one
    assert list(entries(bibliography(["ours"], [], []))) == ["kvbench", "li2024snapkv"]
    for name in ("empty", "broken"):
        assert bibliography([name], [], []).startswith(f"% No reference is known here for the method {name}.")


def test_tasks_have_the_papers_that_their_files_state() -> None:
    for path in (ROOT / "tasks").glob("*.toml"):
        stated = set(re.findall(r"\d{4}\.\d{5}", path.read_text(encoding="utf-8").partition("name =")[0]))
        found = set(re.findall(r"eprint\s+= \{(.*)\}", bibliography([], [path.stem], [])))
        assert found == stated, (path.name, found, stated)


def test_kvbench_is_cited_as_its_citation_file_says() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    own = next(paper for paper in papers() if paper.key == "kvbench")
    assert (own.title, own.authors) == (cited["title"], (f"{{{cited['authors'][0]['name']}}}",))
    by_number = {paper.arxiv: paper for paper in papers()}
    for reference in cited["references"]:
        mine = by_number[reference["identifiers"][0]["value"].removeprefix("arXiv:")]
        assert mine.title == reference["title"]
        assert mine.authors == tuple(f"{a['family-names']}, {a['given-names']}" for a in reference["authors"])


@pytest.mark.parametrize(("text", "wanted"), [
    ("a_b%c&d#e$", r"a\_b\%c\&d\#e\$"), ("{}", r"\{\}"),
    ("~^\\", r"\textasciitilde{}\textasciicircum{}\textbackslash{}"),
    ("--ratio", "-{}-ratio"), ("---", "-{}-{}-"), ("* [x", "{}* [x"), ("é Ré", r"{\'e} R{\'e}"), ("a 中", "a [U+4E2D]"),
    ("two\nlines", "two lines"), ("1 ±2", r"1 $\pm$2"),
])
def test_text_is_escaped(text: str, wanted: str) -> None:
    assert escaped(text) == wanted


def test_labels_of_files_have_nothing_that_latex_or_a_shell_misreads() -> None:
    assert re.fullmatch("[a-z0-9-]+", slug(STRANGE))
    assert slug("%$") == "x"


def test_at_most_eight_lines_are_coloured() -> None:
    names = [f"method-{i}" for i in range(12)]
    lines = tuple(Line(name, (0.5, 0.7), (i, i + 1.0), (i, i), (i + 2.0, i + 2.0)) for i, name in enumerate(names))
    panel = Panel("", lines, "x", "y", (("full", 0.0),))
    for count, width in ((1, COLUMN), (2, PAGE)):
        with rc_context():
            rcParams.update(style())
            figure = figure_of(Plot("p", (panel,) * count, ""), coloured(names, style()))
        assert figure.get_size_inches()[0] == pytest.approx(width)
        looks = [
            (line.get_color(), line.get_linestyle(), line.get_marker()) for line in figure.axes[0].get_lines()
            if len(set(map(float, line.get_xdata()))) > 1 and line.get_label() in names
        ]
        assert len(set(looks)) == len(looks) == MOST == 8
        dashes_and_markers = {look[1:] for look in looks}
        assert len(dashes_and_markers) == 8  # what grey print leaves
        (legend,) = figure.legends
        assert legend.get_window_extent().width <= figure.bbox.width
        labels = [text.get_text() for text in legend.get_texts()]
        assert labels == ["full", *names[:8], "others"]


def drawn(panels: int, lines: tuple[Line, ...]) -> Figure:
    with rc_context():
        rcParams.update(style())
        plot = Plot("p", (Panel("", lines, "x", "y"),) * panels, "")
        figure = figure_of(plot, coloured([line.name for line in lines], style()))
        figure.draw_without_rendering()
    return figure


def test_a_legend_stands_where_a_single_panel_has_room() -> None:
    """Above lines that rise, but for a line along the top; then it is below the panel, and the figure is higher."""
    rising = tuple(Line(f"method-{i}", (0.3, 0.6, 0.9), (0, i, 20 + i), (0, i, 20), (0, i, 30)) for i in range(6))
    figure = drawn(1, rising)
    (place,) = figure.axes
    legend = place.get_legend()
    assert legend is not None
    assert not figure.legends
    box = legend.get_window_extent()
    outer = place.get_window_extent()
    assert outer.x0 <= box.x0 < box.x1 <= outer.x1
    assert outer.y0 <= box.y0 < box.y1 <= outer.y1
    for line in place.get_lines():
        assert not line.get_transform().transform_path(line.get_path()).intersects_bbox(box, filled=False)
    everywhere = tuple(Line(f"method-{i}", (0.3, 0.6, 0.9), (i, 5 - i, i), (0, 0, 0), (5, 5, 5)) for i in range(6))
    full = drawn(1, everywhere)
    assert full.axes[0].get_legend() is None
    assert len(full.legends) == 1
    assert full.legends[0].get_window_extent().y1 <= full.axes[0].get_window_extent().y0
    assert full.get_size_inches()[1] > figure.get_size_inches()[1]


def test_a_legend_stands_in_the_place_that_panels_leave_empty() -> None:
    figure = drawn(5, (Line("method", (0.3, 0.9), (0, 1), (0, 1), (0, 1)),))
    assert not figure.legends
    assert [place.get_legend() is not None for place in figure.axes] == [False] * 5 + [True]


def test_figures_have_embedded_truetype_fonts(paper: Path) -> None:
    found = list((paper / "figures").glob("*.pdf"))
    assert {path.stem for path in found} == {
        f"{what}-{metric}-minidocs" for what in ("removal", "bytes") for metric in ("ppl", "kl")
    }
    for path in found:
        data = path.read_bytes()
        assert b"/FontFile2" in data
        assert b"/Type3" not in data
        (box,) = re.findall(rb"/MediaBox \[ ?0 0 ([\d.]+)", data)
        assert float(box) == pytest.approx(72 * COLUMN, abs=0.1)


def test_the_setup_says_what_the_manifest_says(run: Path, paper: Path) -> None:
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (task,) = manifest["tasks"].values()
    text = (paper / "setup.txt").read_text(encoding="utf-8")
    for said in (
        task["signature"], manifest["cells"][0]["model_hash"], manifest["cells"][0]["data_hash"], "12,345 tokens",
        f"{len(task['documents'])} documents in 20 groups", "snapkv [li2024snapkv] (ratio 0.5, 0.7; removal real",
        "window=16", "sign-flip", "Holm",
    ):
        assert said in text, said
    assert "outdated" in text  # the first version of cam is known to be wrong
    latex = (paper / "setup.tex").read_text(encoding="utf-8").replace(r"\allowbreak{}", "")
    assert escaped(task["signature"]) in latex
    assert escaped(f"snapkv:{STRANGE}") in latex


def test_tables_have_the_best_in_bold_and_half_intervals(paper: Path) -> None:
    text = (paper / "tables" / "ppl-above-full-minidocs.tex").read_text(encoding="utf-8")
    assert text.isascii() or text.partition("\n% ")[0].isascii()
    line = next(line for line in text.splitlines() if line.startswith("sinks &"))
    assert len(re.findall(r"\\textbf\{\+\d+\.\d\d\$\\pm\$\d+\.\d\d\*\}", line)) == 1  # at 0.5; at 0.7 snapkv is best
    assert escaped(f"snapkv:{STRANGE}") in text
    assert r"\caption{Perplexity above that of the full cache on minidocs" in text


def test_the_command_names_the_figures(run: Path, paper: Path, tmp_path: Path) -> None:
    done = kvbench("report", run, "--out", tmp_path / "out", "--paper", cwd=tmp_path, env={"COLUMNS": "400"})
    assert done.code == 0, done.err
    named = {line.partition(": ")[2] for line in done.out.splitlines() if line.startswith("paper figure: ")}
    assert {Path(name).name for name in named} == {f"{what}-ppl-minidocs.pdf" for what in ("removal", "bytes")}
    assert all(Path(name).is_file() for name in named)
    assert f"paper tables: 2 files in {tmp_path / 'out' / 'paper' / 'tables'}" in done.out.splitlines()


def test_the_document_includes_everything(paper: Path) -> None:
    text = (paper / "main.tex").read_text(encoding="utf-8")
    assert set(re.findall(r"\\includegraphics\{(.*)\}", text)) == {
        f"figures/{path.name}" for path in (paper / "figures").iterdir()
    }
    assert text.index(r"\section{Results}") < text.index(r"\suppressfloats[t]") < text.index(r"\begin{figure")
    assert set(re.findall(r"\\input\{tables/(.*)\}", text)) == {path.stem for path in (paper / "tables").iterdir()}
    cited = re.findall(r"\\cite\{(.*?)\}", (paper / "setup.tex").read_text(encoding="utf-8"))
    known = entries((paper / "references.bib").read_text(encoding="utf-8"))
    assert cited
    assert {key for keys in cited for key in keys.split(",")} <= set(known)
    assert {"kvbench", "li2024snapkv", "zhang2024cam", "ren2023sentinel", "xiao2023streaming"} == set(known)
    shipped = ROOT / "kvbench" / "reporting" / "paper" / "kvbench.mplstyle"
    assert (paper / "kvbench.mplstyle").read_bytes() == shipped.read_bytes()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_the_document_compiles(paper: Path, tmp_path: Path) -> None:
    folder = tmp_path / "paper"
    shutil.copytree(paper, folder)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "main.tex"], cwd=folder, capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:].decode(errors="replace")
    assert b"Overfull" not in done.stdout
