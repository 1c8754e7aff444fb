"""The set-up of a run in words, for an appendix: made from the manifests and rows, as text and as LaTeX."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvbench.reporting.paper.selection import comparisons
from kvbench.reporting.tables.latex import escaped
from kvbench.statistics import EXCHANGES, LEVEL, MOST_FLIPS, RESAMPLES, SIGNIFICANT
from kvbench.store.faults import faults_in, remarks_of
from kvbench.store.manifest import PROFILE, Manifest
from kvbench.store.papers import KVBENCH, Paper, papers_of
from kvbench.store.records import IMPORTED, WRITING, Cell, Failure
from kvbench.store.rows import Row


@dataclass(frozen=True)
class Code:
    """Text that is set as it is: a name, a hash, a signature."""

    text: str


@dataclass(frozen=True)
class Cite:
    """References by their keys."""

    keys: tuple[str, ...]


Part = str | Code | Cite

_LATEX_HEAD = (
    "% Written by kvbench report --paper.",
    r"% Its \cite commands need references.bib: your document needs \bibliographystyle{plain}, or another style, and",
    r"% \bibliography{references} (with the folder before it, if it is in another), and a run of bibtex.",
)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph with its heading."""

    heading: str
    parts: tuple[Part, ...]


def setup_of(manifests: Sequence[Manifest], rows: Sequence[Row], failures: Sequence[Failure] = ()) -> list[Paragraph]:
    """Describe models, data, methods, metrics, statistics, software and hardware of one or several runs."""
    cells = [cell for manifest in manifests for cell in manifest.cells]
    found = [
        Paragraph("Models", tuple(_models(manifests))), Paragraph("Data and protocols", tuple(_tasks(manifests, rows))),
        Paragraph("Methods", tuple(_methods(cells, rows))), Paragraph("Metrics", tuple(_metrics(rows))),
        Paragraph("Statistics", (_statistics(rows),)), Paragraph("Software and hardware", tuple(_machines(manifests))),
        Paragraph("Commands", tuple(_commands(manifests))),
        Paragraph("Incomplete", tuple(_incomplete(manifests, failures))),
    ]
    return [paragraph for paragraph in found if any(paragraph.parts)]


def as_text(paragraphs: Sequence[Paragraph]) -> str:
    """Format paragraphs as plain text; references are in brackets."""
    def shown(part: Part) -> str:
        match part:
            case Cite(keys):
                return f" [{', '.join(keys)}]"
            case Code(text):
                return text
            case text:
                return text

    return "\n\n".join(
        f"{paragraph.heading}\n\n{''.join(map(shown, paragraph.parts)).strip()}" for paragraph in paragraphs
    ) + "\n"


def as_latex(paragraphs: Sequence[Paragraph]) -> str:
    """Format paragraphs as LaTeX, to be included in a section; long names break at their punctuation."""
    def shown(part: Part) -> str:
        match part:
            case Cite(keys):
                return rf"~\cite{{{','.join(keys)}}}"
            case Code(text):
                pieces = re.split(r"(?<=[|,/:=;_.-])", text)
                return rf"\texttt{{{(chr(92) + 'allowbreak{}').join(map(escaped, pieces))}}}"
            case text:
                after = "\n\n" if text.endswith("\n") else " " * text.endswith(" ")
                return " " * text.startswith(" ") + escaped(text) + after

    lines = [*_LATEX_HEAD, r"\begingroup\sloppy"]
    for paragraph in paragraphs:
        lines += ["", rf"\paragraph{{{escaped(paragraph.heading)}.}}", "".join(map(shown, paragraph.parts)).strip()]
    return "\n".join([*lines, "", r"\par\endgroup"]) + "\n"


def _models(manifests: Sequence[Manifest]) -> Iterable[Part]:
    probes: dict[str, dict[str, Any]] = {name: probe for m in manifests for name, probe in m.probes.items()}
    cells = [cell for manifest in manifests for cell in manifest.cells]
    for model, revision, fingerprint, dtype, device in dict.fromkeys(
        (cell.model, cell.revision, cell.model_hash, cell.dtype, cell.device) for cell in cells
    ):
        kind = probes.get(model, {}).get("kind")
        yield from (Code(model), f" ({kind})" if kind else "")
        if revision:
            yield from (", revision ", Code(revision))
        yield from (", fingerprint of its files ", Code(fingerprint or "unknown"))
        yield f", precision {dtype}, device {device}. "
    for name, fingerprint in dict.fromkeys((cell.name, cell.adapter_hash) for cell in cells if cell.adapter_hash):
        yield from ("Adapter of ", Code(name), ": fingerprint ", Code(fingerprint or ""), ". ")


def _tasks(manifests: Sequence[Manifest], rows: Sequence[Row]) -> Iterable[Part]:
    for manifest in manifests:
        for setting, info in manifest.tasks.items():
            cell = next((cell for cell in manifest.cells if cell.setting == setting), None)
            if cell is None:
                continue
            groups = sorted({
                row.groups for row in rows
                if (row.task, row.protocol, row.seed) == (cell.task, cell.protocol, cell.seed)
                and (row.params.get("question") or "hidden") == cell.options.get("question", "hidden")
                and row.params.get("bin") is None
            })
            many = f" in {_range(groups)} groups" if groups else ""
            yield from (Code(cell.workload), _cited(papers_of(tasks=[cell.task])))
            yield f" on {cell.model}: {len(info.documents)} documents{many}"
            yield f", {info.tokens:,} tokens" if info.tokens else ""
            source = manifest.sources.get(cell.task)
            yield from (", from ", Code(source)) if source else ()
            yield from (", data ", Code(cell.data_hash), f", version {info.version} of the task, seed {cell.seed}")
            left = [f"{info.skipped_documents:,} documents were skipped"] if info.skipped_documents else []
            left += [f"{info.dropped_tokens:,} tokens are in no sequence"] if info.dropped_tokens else []
            yield f"; {' and '.join(left)}" if left else ""
            yield from ("; protocol ", Code(info.signature), ". ")
        for setting, profile in manifest.profiles.items():
            cell = next((cell for cell in manifest.cells if cell.setting == setting), None)
            if cell is not None:
                yield from ("Profile of ", Code(cell.model), f", seed {cell.seed}, in {profile.repeats} processes: ")
                yield from (Code(profile.signature), ". ")


def _methods(cells: Sequence[Cell], rows: Sequence[Row]) -> Iterable[Part]:
    """What was measured of every method; one that was only asked for is not in it."""
    shared = {name for cell in cells if cell.method == "full" for name in cell.options}
    measured = {row.name for row in rows}
    for name in dict.fromkeys(cell.name for cell in cells if cell.name in measured):
        mine = [cell for cell in cells if cell.name == name]
        options = sorted({
            f"{key}={value}" for cell in mine for key, value in cell.options.items() if key not in shared
        })
        about = _ratios([row for row in rows if row.name == name])
        about += [f"removal {', '.join(dict.fromkeys(cell.removal for cell in mine))}"]
        about += [f"version {cell.version}" for cell in mine[:1] if cell.version > 1]
        about += [] if papers_of([mine[0].method]) else ["no reference given"]
        yield from (Code(name), _cited(papers_of([mine[0].method])), f" ({'; '.join(about)}")
        yield from ("; ", Code(", ".join(options))) if options else ()
        yield "). "
    yield " ".join(faults_in((cell.method, remarks_of(cell)) for cell in cells))


def _ratios(rows: Sequence[Row]) -> list[str]:
    """The ratios that a method was measured at: those of most tasks, then those of tasks where they are others."""
    by_task: dict[str, set[float]] = {}
    for row in rows:
        if row.ratio_asked is not None:
            by_task.setdefault(row.task, set()).add(row.ratio_asked)
    shown = {task: ", ".join(f"{ratio:g}" for ratio in sorted(ratios)) for task, ratios in by_task.items()}
    sets = list(shown.values())
    usual = max(sets, key=sets.count, default="")
    others = {task: ratios for task, ratios in shown.items() if ratios != usual}
    found = [f"ratio {usual}"] if usual else []
    return found + [
        f"in the profile {ratios}" if task == PROFILE else f"on {task} {ratios}" for task, ratios in others.items()
    ]


def _metrics(rows: Sequence[Row]) -> Iterable[Part]:
    used = [key[1] for key in comparisons(rows)]
    for metric in dict.fromkeys(used):
        signatures = {row.signature for row in rows if row.metric == metric and row.params.get("bin") is None}
        first, *others = (signature.split("|") for signature in sorted(signatures))
        common = [part for part in first if all(part in other for other in others)]
        yield from (Code(metric), _cited(papers_of(metrics=[metric])), ": ", Code("|".join(common)), ". ")


def _statistics(rows: Sequence[Row]) -> str:
    """What was done to the rows that there are."""
    kinds = {row.protocol for row in rows}
    said = []
    if kinds - {"profile"}:
        said.append(
            f"Intervals are {100 * LEVEL:g} % percentile bootstrap intervals over {RESAMPLES:,} resamples of the "
            "groups (articles, books, or the documents themselves). Differences to the full cache are paired by group."
        )
    if kinds - {"profile", *WRITING}:
        said.append(
            "Their p-values come from two-sided sign-flip permutation tests over the groups: exact with up to "
            f"{EXCHANGES.bit_length() - 1} groups, otherwise over up to {MOST_FLIPS:,} random flips."
        )
    if kinds & set(WRITING):
        said.append(
            "Metrics of written text are tested by exchanging method and full cache within random groups, "
            f"{EXCHANGES:,} times."
        )
    if any(row.metric == "distinct" for row in rows):
        said.append("The interval of distinct is the jackknife's over groups.")
    if any(row.metric == "mauve" for row in rows):
        said.append("The interval of mauve is a t-interval over seeds of its clustering; it has no p-value.")
    if kinds - {"profile"}:
        said.append(f"All p-values are adjusted by Holm's method within each task and metric; below {SIGNIFICANT:g} a "
                    "difference is called significant.")
    if "profile" in kinds:
        said.append("Times are medians over requests; their intervals are where the median of another such run will "
                    "lie, by order statistics.")
    return " ".join(said)


def _machines(manifests: Sequence[Manifest]) -> Iterable[Part]:
    for parts in dict.fromkeys(tuple(_machine(manifest)) for manifest in manifests if manifest.environment):
        yield from parts
    dates = sorted(manifest.started[:10] for manifest in manifests if manifest.started)
    if dates:
        yield f"Measured {dates[0]}." if dates[0] == dates[-1] else f"Measured {dates[0]} to {dates[-1]}."


def _machine(manifest: Manifest) -> Iterable[Part]:
    environment, machine = manifest.environment, manifest.machine
    if environment.get("imported_from"):
        yield f"Imported from {environment['imported_from']}. "
    packages = {name: version for name, version in (environment.get("packages") or {}).items() if version}
    code = environment.get("code") or {}
    yield from ("Measured by kvbench", Cite((KVBENCH,)), f" {packages.pop('kvbench', 'of unknown version')}")
    if code.get("commit"):
        yield from (" at commit ", Code(code["commit"]), " with changes" if code.get("dirty") else "")
    named = [f"Python {environment['python']}"] if environment.get("python") else []
    yield f", {', '.join([*named, *(f'{name} {version}' for name, version in packages.items())])}. "
    where = [str(environment[name]) for name in ("processor", "platform") if environment.get(name)]
    cores = [f"{environment['cores']} cores"] if environment.get("cores") else []
    if machine is not None and machine.device_name:
        cores.append(machine.device_name)
    yield f"{', '.join([*where, *cores])}. " if where or cores else ""


def _commands(manifests: Sequence[Manifest]) -> Iterable[Part]:
    for manifest in manifests:
        if manifest.command and not any(cell.execution == IMPORTED for cell in manifest.cells):
            yield from (Code(shlex.join(["kvbench", *manifest.command[1:]])), "\n")


def _incomplete(manifests: Sequence[Manifest], failures: Sequence[Failure]) -> Iterable[Part]:
    for manifest in manifests:
        if manifest.started and manifest.finished is None:
            tasks = dict.fromkeys(cell.task for cell in manifest.cells)
            yield from ("The run of ", Code(", ".join(tasks)), " was not finished. ")
    labels = {cell.key: cell.label for manifest in manifests for cell in manifest.cells}
    for failure in failures:
        label = labels.get(failure.cell, "")
        about = f"{label}: " if label and not failure.error.startswith(label) else ""
        yield f"{failure.word.capitalize()}: {about}{failure.error} "


def _cited(found: Sequence[Paper]) -> Part:
    """References, but for kvbench's own, which stand with its version."""
    keys = tuple(paper.key for paper in found if paper.key != KVBENCH)
    return Cite(keys) if keys else ""


def _range(counts: Sequence[int]) -> str:
    return f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
