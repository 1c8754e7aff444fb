"""From a request to its cells in order of execution, and the run folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from kvbench.data.documents import Corpus, load_corpus
from kvbench.data.near_names import check_chosen
from kvbench.data.rows import TEXT
from kvbench.data.tasks import Task, expanded, load_task
from kvbench.errors import UserError, unknown
from kvbench.judges.choice import ENCODER, NOTHING, SENTENCES, JudgeChoice
from kvbench.methods import Method, parse_ratio, ratio_text
from kvbench.metrics import GENERATION_NAMES, NEED_ENCODER, NEED_SCORER
from kvbench.models.fingerprint import fingerprint
from kvbench.models.references import ModelReference, adapter_name, resolve_model
from kvbench.planning.adapters import Adapters, Entry
from kvbench.planning.methods import BASELINES, NO_BUDGET, Budget, Choice, entries_of, feasible, parse_choice
from kvbench.planning.request import MeasurementRequest
from kvbench.protocols.answer import TOGETHER
from kvbench.protocols.base import Protocol, settings_of
from kvbench.protocols.decode import Decode
from kvbench.protocols.recall import HIDDEN, KNOWN
from kvbench.protocols.registry import NAMES, chosen_protocol
from kvbench.store.records import HUMAN, ITSELF, Cell
from kvbench.store.source import source_of

EXECUTIONS = ("streamed", "onepass")
LONGEST_VALUE = 1000
"""Maximum length of an option's value in characters; Python refuses to parse integers of thousands of digits."""


@dataclass(frozen=True, kw_only=True)
class Request(MeasurementRequest):
    """The request of ``kvbench run`` or ``kvbench sweep``.

    Attributes:
        tasks: names of tasks, or paths of task files.
        data: the user's own corpus; ``column``: name of its text column, or of that in a data set on the hub.
        protocol: None for the default of each task.
        execution: ``streamed`` or ``onepass``.
        limit: maximum number of documents per task; 0 for all.
        scorer, mauve_features, metrics: judges and metrics of generated texts; None or empty for the defaults.
        budget: how much to keep, instead of ratios.
    """

    tasks: tuple[str, ...]
    data: Path | None
    protocol: str | None
    execution: str
    limit: int
    scorer: str | None = None
    mauve_features: str | None = None
    metrics: tuple[str, ...] = ()
    budget: Budget = NO_BUDGET
    column: str = TEXT


@dataclass(frozen=True)
class Plan:
    """Cells in order of execution (``full`` first within a task), and the run folder.

    Attributes:
        task_files: task name -> name or path that it was requested by.
        judging: the judges of generated texts.
        omitted: why some of the requested methods and ratios are infeasible.
    """

    request: Request
    model: ModelReference
    cells: tuple[Cell, ...]
    corpora: dict[str, Corpus]
    folder: Path
    content: str
    task_files: dict[str, str]
    judging: JudgeChoice
    omitted: tuple[str, ...] = ()


def parse_options(pairs: Sequence[str]) -> dict[str, str]:
    """Parse the ``key=value`` pairs of ``--set``.

    Raises:
        UserError: a pair has no ``=``, or is longer than any option.
    """
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {pair!r} is not of the form key=value.")
        if len(value) > LONGEST_VALUE:
            raise UserError(f"--set {key}={value[:20]}...: a value of {len(value)} characters, which no option has.")
        options[key.strip()] = value.strip()
    return options


def build_plan(request: Request, skip_infeasible: bool = False) -> Plan:
    """Validate a request and create its cells.

    Args:
        skip_infeasible: leave out infeasible combinations of method and ratio, and note them, as a sweep does.

    Raises:
        UserError: the request cannot be carried out.
    """
    if request.execution not in EXECUTIONS:
        raise unknown("--execution", request.execution, EXECUTIONS)
    if request.protocol is not None and request.protocol not in NAMES:
        raise unknown("protocol", request.protocol, NAMES)
    asked = [parse_choice(text) for text in dict.fromkeys(request.methods)]
    ratios = [parse_ratio(text) for text in request.ratios]
    tasks = {name: load_task(name) for name in expanded(request.tasks)}
    _check_tasks(request, tasks)
    protocols = {name: chosen_protocol(task, request.protocol) for name, task in tasks.items()}
    kept = {name: _kept(protocol, request) for name, protocol in protocols.items()}
    wanted = {
        name: _entries(protocols[name], asked, ratios, kept[name], request.baselines) for name in tasks
    }
    request.check_options(
        (entry.method for entries in wanted.values() for entry in entries),
        (name for protocol in protocols.values() for name in protocol.settings),
    )
    omitted: list[str] = []
    for name, entries in wanted.items():
        in_chunks = protocols[name].in_chunks
        wanted[name] = feasible(entries, kept[name][0], in_chunks, omitted if skip_infeasible else None)
    for name, protocol in protocols.items():
        _check_protocol(protocol, [entry.method for entry in wanted[name]])
    _check_execution(request, [entry.method for entries in wanted.values() for entry in entries])
    model = resolve_model(request.model, request.revision)
    corpora = {name: load_corpus(task, request.data, request.column) for name, task in tasks.items()}
    judging, judged = _judging(request, any(protocol.kind == "generation" for protocol in protocols.values()))
    adapters = Adapters(request.adapters, model)
    cells = []
    variants = [
        (name, of_task) for name, protocol in protocols.items()
        for of_task in _variants(settings_of(protocol, _asked(request.options)))
    ]
    for name, of_task in variants:
        task, options = tasks[name], of_task
        measured: dict[str, Any] = {
            "model": model.name, "revision": model.revision, "model_hash": model.fingerprint,
            "dtype": request.cell_dtype, "device": request.device, "task": task.name, "task_version": task.version,
            "data_hash": corpora[name].hash, "protocol": protocols[name].name, "execution": request.execution,
            "seed": request.seed,
        }
        if protocols[name].kind == "generation":
            options = {**options, **judged}
            cells.append(Cell(
                method=HUMAN, ratio_asked=None, role="control" if request.baselines else "reference",
                options=options, adapter=None, adapter_hash=None, **measured,
            ))
        for method, role, adapter, variant in adapters.given_to(wanted[name]):
            with_ratio = not kept[name][0].is_constant and method.uses_ratio(protocols[name].in_chunks)
            cells.append(Cell(
                method=method.name, ratio_asked=ratio_text(method.ratio) if with_ratio else None, role=role,
                options={**options, **method.resolved, **method.budget_given},
                adapter=None if adapter is None else adapter_name(adapter),
                adapter_hash=None if adapter is None else fingerprint(adapter),
                position_rule=method.position_rule, removes=method.removes(), version=method.rule_version,
                note=method.note, variant=variant, source=source_of(type(method)), **measured,
            ))
    content = _content(cells)
    named = re.sub("[:=,]", "-", "+".join(dict.fromkeys(request.methods)))[:40]
    shown = request.budget.label or "+".join(dict.fromkeys(map(ratio_text, ratios)))[:40]
    folder = request.out or request.reports / f"{named}-{shown}-{content}"
    return Plan(
        request, model, tuple(cells), {t.name: corpora[asked] for asked, t in tasks.items()}, folder,
        content, {t.name: asked for asked, t in tasks.items()}, judging, tuple(dict.fromkeys(omitted)),
    )


def _kept(protocol: type[Protocol], request: Request) -> tuple[Budget, dict[str, str]]:
    """How much is kept with a protocol, and the options of methods: ``decode`` decides both.

    Raises:
        UserError: the request says otherwise.
    """
    if not issubclass(protocol, Decode):
        return request.budget, request.options
    if request.budget != NO_BUDGET or "step" in request.options:
        said = f"--set step={request.options['step']}" if "step" in request.options else "a budget"
        raise UserError(
            f"With --protocol decode, {said} is given otherwise.",
            "Use --set entries= for what is kept, and --set every= for how often.",
        )
    given = settings_of(protocol, request.options)
    return Budget(tokens=int(given["entries"])), {**request.options, "step": given["every"]}


def _entries(
    protocol: type[Protocol], asked: Sequence[Choice], ratios: Sequence[Fraction],
    kept: tuple[Budget, dict[str, str]], with_baselines: bool,
) -> list[Entry]:
    """The methods of a task; with ``decode`` they are compared only with what holds a constant number of entries."""
    is_decode = issubclass(protocol, Decode)
    baselines = () if not with_baselines else ("sinks",) if is_decode else BASELINES
    try:
        return entries_of(asked, ratios, *kept, baselines, protocol.in_chunks)
    except UserError as error:
        if not is_decode:
            raise
        raise UserError(
            f"With --protocol decode every method holds a constant number of entries: {error.message}", "Leave it out."
        ) from error


def _asked(options: dict[str, str]) -> dict[str, str]:
    """Options of protocols: questions in turns are hidden, unless something else is said."""
    return {"question": HIDDEN, **options} if options.get("turns") == TOGETHER else options


def _check_tasks(request: Request, tasks: Mapping[str, Task]) -> None:
    """Check that the tasks can be measured together, and that the requested protocol suits one of them.

    Raises:
        UserError: they cannot, or it suits none.
    """
    if request.data is not None and len(tasks) > 1:
        raise UserError(
            f"--data is the text of one task, and this command measures {len(tasks)} ({', '.join(tasks)}).",
            "Add --task books for running text of your own, or --task books-gen where text is to be written; "
            "'kvbench list tasks' shows the others.",
        )
    if len({task.name for task in tasks.values()}) < len(tasks):
        raise UserError("Two of the tasks have the same name.", "Give each task file a name of its own.")
    if request.protocol is not None and not any(request.protocol in task.measurable for task in tasks.values()):
        allowed = dict.fromkeys(p for task in tasks.values() for p in task.measurable)
        raise UserError(
            f"{'Task' if len(tasks) == 1 else 'None of the tasks'} {', '.join(map(repr, tasks))} is"
            f"{' not' if len(tasks) == 1 else ''} measured with protocol {request.protocol!r}.",
            f"Allowed: {', '.join(allowed)}.",
        )


def _variants(options: dict[str, str]) -> list[dict[str, str]]:
    """Options of each variant of a task: one variant per requested question, if the task has two of them.

    The hidden question is not written into the options, so that the keys of older runs, which had no other, stay
    valid.
    """
    rest = {name: value for name, value in options.items() if name != "question"}
    asked = options.get("question", HIDDEN)
    return [{**rest, **more} for question, more in ((HIDDEN, {}), (KNOWN, {"question": KNOWN}))
            if asked in ("both", question)]


def _content(cells: Sequence[Cell]) -> str:
    """Hash of the cells that identifies a run; it does not change if ``known`` is asked in addition to ``hidden``."""
    hidden = {cell.task for cell in cells if cell.workload == cell.task}
    keys = [cell.request for cell in cells if cell.workload == cell.task or cell.task not in hidden]
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()[:10]


def _check_protocol(protocol: type[Protocol], methods: Sequence[Method]) -> None:
    for method in methods:
        if method.needs_continuation and protocol.scores_context:
            raise UserError(
                f"{method.name} compresses a context for what follows it: --protocol {protocol.name}, which scores the "
                "context itself, cannot be had.", "Use --protocol prefix, or a task with questions.",
            )


def _check_execution(request: Request, methods: Sequence[Method]) -> None:
    for method in methods:
        if request.execution not in method.executions:
            raise UserError(
                f"{method.name} has no form in one masked pass: --execution {request.execution} cannot be had.",
                "Leave --execution out.",
            )


def _judging(request: Request, writes: bool) -> tuple[JudgeChoice, dict[str, str]]:
    """The judges of generated texts, and the cell options that record them.

    Raises:
        UserError: a metric is unknown, or judges are given that no requested task or metric uses.
    """
    for name in request.metrics:
        check_chosen(name)
    given = {"--scorer": request.scorer, "--mauve-features": request.mauve_features, "--metric": request.metrics}
    asked = [option for option, value in given.items() if value]
    if not writes:
        if asked:
            raise UserError(
                f"{asked[0]} is for tasks that write text, and none is asked for.", "Add --task minidocs-gen."
            )
        return JudgeChoice(), {}
    wanted = request.metrics or GENERATION_NAMES
    if request.scorer and not set(NEED_SCORER) & set(wanted):
        raise UserError("--scorer is for gen_ppl, and --metric leaves it out.", "Add --metric gen_ppl.")
    if request.mauve_features and "mauve" not in wanted:
        raise UserError("--mauve-features is for mauve, and --metric leaves it out.", "Add --metric mauve.")
    scorer = (request.scorer or ITSELF) if set(NEED_SCORER) & set(wanted) else NOTHING
    features = request.mauve_features or (SENTENCES if "mauve" in wanted else NOTHING)
    models = {name: resolve_model(name) for name in (scorer, features) if name not in (NOTHING, ITSELF, SENTENCES)}
    judging = JudgeChoice(
        scorer, bool(set(NEED_ENCODER) & set(wanted)) or features == SENTENCES, features,
        "mauve" in request.metrics or request.mauve_features is not None, models,
    )
    named = {name: _named(model) for name, model in models.items()}
    return judging, {
        "scorer": named.get(scorer, scorer), "encoder": ENCODER if judging.encoder else NOTHING,
        "mauve_features": ENCODER if features == SENTENCES else named.get(features, features),
    }


def _named(model: ModelReference) -> str:
    """Name of a judge, with its fingerprint if known."""
    return f"{model.short_name}@{model.fingerprint}" if model.fingerprint else model.short_name
