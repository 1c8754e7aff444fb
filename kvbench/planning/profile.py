"""From a request to the cells that are profiled, in groups that are timed in turn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from kvbench.errors import UserError, unknown
from kvbench.methods import METHODS, Method, make_method, parse_ratio, ratio_text
from kvbench.models.fingerprint import fingerprint
from kvbench.models.random_models import check_shape, is_shape
from kvbench.models.references import ModelReference, adapter_name, resolve_model
from kvbench.parsing import parse_bytes
from kvbench.planning.adapters import Adapters, Entry, known_adapter
from kvbench.planning.methods import parse_choice
from kvbench.planning.request import MeasurementRequest
from kvbench.store.manifest import PROFILE
from kvbench.store.profile_records import AGAIN, FULL, STOCK
from kvbench.store.records import Cell
from kvbench.store.source import source_of

FILLS = ("real", "synthetic")
RANDOM = "random"
"""Adapter of a trained method without one for this model: its values do not affect time and memory."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest(MeasurementRequest):
    """The request of ``kvbench profile``.

    Attributes:
        seq_lens, batch_sizes: lengths of the prompt in tokens, and numbers of prompts per batch.
        new_tokens: number of tokens to generate; ``chunk``: prompt tokens per forward pass.
        fill: ``real`` to read a prompt, ``synthetic`` to start from a random cache.
        repeats: number of processes; ``rounds``: timed requests of each cell in each of them, 0 for 4, or fewer
            if they are slow; ``warmups``: maximum number of warm-up requests before them.
        budget: memory within which the largest batch is searched for, such as ``2GiB``; None for no search.
        timeout: seconds after which a probe of a batch size is killed.
    """

    seq_lens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    new_tokens: int
    chunk: int
    fill: str
    repeats: int
    rounds: int
    warmups: int
    budget: str | None
    timeout: int


@dataclass(frozen=True)
class ProfilePlan:
    """Groups of cells that are timed in turn, and the run folder.

    Attributes:
        model: None for ``shape:NAME``.
        searches: cells whose largest batch within ``budget`` bytes is searched for (0: the memory of the GPU).
    """

    request: ProfileRequest
    model: ModelReference | None
    groups: tuple[tuple[Cell, ...], ...]
    searches: tuple[Cell, ...]
    budget: int
    folder: Path
    content: str

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (*(cell for group in self.groups for cell in group), *self.searches)

    @property
    def positions(self) -> int:
        """Number of positions that the longest text needs, including those of special tokens beyond its end."""
        methods = [make_method(c.method, Fraction(0), c.options) for c in self.groups[0] if c.method in METHODS]
        return max(self.request.seq_lens) + self.request.new_tokens + max(m.extra_positions for m in methods)


def build_profile_plan(request: ProfileRequest) -> ProfilePlan:
    """Validate a request and create its cells.

    Raises:
        UserError: the request cannot be carried out.
    """
    _check_numbers(request)
    ratios = [parse_ratio(text) for text in request.ratios]
    wanted = _wanted(request, ratios)
    request.check_options(entry.method for entry in wanted)
    for method, *_ in wanted:
        for length in request.seq_lens:
            method.check(length, in_chunks=False)
            method.check_kept(length)
            method.check_text(length + request.new_tokens, length, request.seed)
    budget = parse_bytes(request.budget) if request.budget else 0
    model = None
    if is_shape(request.model):
        check_shape(request.model)
        if request.revision:
            raise UserError(f"--revision is for models on the hub; {request.model} is a shape.", "Leave it out.")
    else:
        model = resolve_model(request.model, request.revision)
    folders = _adapters(request, model, [entry.method for entry in wanted])

    def cell(entry: Entry, name: str, length: int, batch: int, **more: str) -> Cell:
        method = entry.method
        folder = folders.get(method)
        return Cell(
            model=request.model, revision=model.revision if model else None,
            model_hash=model.fingerprint if model else "",
            dtype=request.cell_dtype, device=request.device, method=name,
            ratio_asked=ratio_text(method.ratio) if method.uses_ratio(False) else None,
            role=entry.role, task=PROFILE, task_version=1, data_hash="random ids", protocol=PROFILE,
            execution="streamed",
            options={
                "seq_len": str(length), "batch_size": str(batch), "new_tokens": str(request.new_tokens),
                "fill": request.fill, "chunk": str(request.chunk), "threads": str(request.threads),
                "rounds": str(request.rounds), **more,
                **method.resolved,
            },
            adapter=(adapter_name(folder) if folder else RANDOM) if method.adapter_kinds else None,
            adapter_hash=fingerprint(folder) if folder else None, seed=request.seed,
            position_rule=method.position_rule, removes=method.removes(), version=method.version, note=method.note,
            variant=entry.variant, source=source_of(type(method)),
        )

    controls = [(wanted[0], name) for name in (AGAIN, STOCK)]
    named = [(wanted[0], FULL), *(controls if request.baselines else ())]
    named += [(entry, entry.method.name) for entry in wanted[1:]]
    groups = tuple(
        tuple(cell(entry, name, length, batch) for entry, name in named)
        for length in request.seq_lens for batch in request.batch_sizes
    )
    searches = tuple(
        cell(entry, name, length, 0, memory_budget=request.budget or "")
        for length in request.seq_lens for entry, name in named if name != AGAIN
    ) if request.budget else ()
    plan = ProfilePlan(request, model, groups, searches, budget, Path(), "")
    content = hashlib.sha256(json.dumps(sorted(c.request for c in plan.cells)).encode()).hexdigest()[:10]
    asked = "+".join(dict.fromkeys(entry.method.name for entry in wanted[1:]))[:40] or "full"
    lengths = "+".join(str(length) for length in request.seq_lens)[:40]
    folder = request.out or request.reports / f"profile-{asked}-{lengths}-{content}"
    return replace(plan, folder=folder, content=content)


def at_batch(cell: Cell, batch: int) -> Cell:
    """The cell of a search at a given batch size."""
    return dataclasses.replace(cell, options={**cell.options, "batch_size": str(batch)})


def _wanted(request: ProfileRequest, ratios: Sequence[Fraction]) -> list[Entry]:
    """Expand the request into entries: the full cache, then the requested methods, once per ratio if they use one."""
    found = [Entry(METHODS[FULL](), "control")]
    for choice in (parse_choice(text) for text in dict.fromkeys(request.methods)):
        name, options = choice.name, {**request.options, **choice.options}
        if name == FULL:
            continue
        with_ratio = make_method(name, Fraction(0), options).uses_ratio(False)
        for ratio in dict.fromkeys(ratios) if with_ratio else [Fraction(0)]:
            method = make_method(name, ratio, options)
            if method.depends_on_words:
                raise UserError(
                    f"{name} with sampler=published draws spans of words, and profiled prompts are random tokens.",
                    "Leave out --set sampler=published.",
                )
            found.append(Entry(method, "method", variant=choice.variant(request.options)))
    return found


def _adapters(
    request: ProfileRequest, model: ModelReference | None, methods: Sequence[Method]
) -> dict[Method, Path | None]:
    """Folders of adapters by method; None if a random adapter is used."""
    trained = [method for method in methods if method.adapter_kinds]
    if model is None:
        if request.adapters:
            raise UserError(
                f"--adapter cannot be used with {request.model}: its weights are random, and so are its adapters.",
                "Leave it out.",
            )
        return dict.fromkeys(trained, None)
    given = Adapters(request.adapters, model)
    entries = [Entry(method, "method") for method in trained if given.has(method)]
    found: dict[Method, Path | None] = {entry.method: entry.adapter for entry in given.given_to(entries)}
    for method in trained:
        if method not in found:
            try:
                found[method] = known_adapter(method, model)
            except UserError:
                found[method] = None
    return found


def _check_numbers(request: ProfileRequest) -> None:
    least = {
        "--seq-len": (request.seq_lens, 32, "tokens of a prompt"),
        "--batch-size": (request.batch_sizes, 1, "prompts at a time"),
        "--new-tokens": ((request.new_tokens,), 2, "tokens to write; the first is in none of the gaps"),
        "--chunk": ((request.chunk,), 1, "tokens of the prompt that are fed at a time"),
        "--repeats": ((request.repeats,), 1, "processes"),
        "--rounds": ((request.rounds,), 0, "timed requests per process; 0 leaves it to kvbench"),
        "--warmups": ((request.warmups,), 0, "requests before the timed ones"),
        "--probe-timeout": ((request.timeout,), 1, "seconds"),
    }
    for option, (values, low, what) in least.items():
        for value in values:
            if value < low:
                raise UserError(f"{option} {value} is below {low}.", f"It is the number of {what}.")
    if request.fill not in FILLS:
        raise unknown("--fill", request.fill, FILLS)


BUSY = 20.0
"""Load by other processes, in per cent of all cores, above which timings are unreliable."""


def doubts(threads: int, busy: float) -> list[str]:
    """Warnings about what makes timings unreliable: more threads than cores, or other processes.

    Args:
        busy: load by other processes, in per cent of all cores.
    """
    found = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads > cores:
        found.append(
            f"--threads {threads}: there are {cores} cores, and threads that wait for one another only add noise."
        )
    if busy > BUSY:
        found.append(
            f"Other processes keep {busy:.0f} % of the processor busy: timings beside them can be many times too "
            "long."
        )
    return found

