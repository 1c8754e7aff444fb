"""Training an adapter from files to a folder: check, load, train, measure, and write the adapter with its card."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch

import kvbench
from kvbench.data.rows import TEXT
from kvbench.errors import UserError, unknown
from kvbench.methods import METHODS, Method, make_method
from kvbench.models.adapter import CARD, Adapter, AdapterCard
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import ModelReference, resolve_model
from kvbench.models.rope import has_rotary
from kvbench.probe.cached import probed
from kvbench.training.adapter_training import AdapterPlan, train_adapter
from kvbench.training.curve import LOG, Point, Scores, read_curve, write_curve
from kvbench.training.data import Stream, encode_in_context, load_stream
from kvbench.training.folder import check_out, make_folder
from kvbench.training.held_out import DOCUMENTS, RATIOS, HeldOut
from kvbench.training.loop import Follow, Running
from kvbench.training.mixture import Mixture
from kvbench.training.team import Team, assemble

_CHOICES = {"objective": ("text", "distil"), "autocast": ("bfloat16", "none")}


@dataclass(frozen=True)
class AdapterRequest:
    """The user's request; names are not yet checked.

    Attributes:
        data: files of training text; ``held_out``: one of other text; ``column``: what their text is called.
        out: folder to write.
        steps, batch, length: optimiser steps, sequences per step, and text tokens per sequence.
        every: steps between checkpoints and measurements.
        options: of the method and of the training, as given with ``--set``.
        threads: number of CPU threads; 0 for PyTorch's choice.
        fresh: start anew even if there is a checkpoint.
        ratios, documents, recall: what is measured on held-out text: at which ratios, on how many documents, and
            whether facts are to be recalled.
    """

    method: str
    data: tuple[Path, ...]
    out: Path
    model: str
    revision: str | None
    steps: int
    batch: int
    length: int
    lr: float
    rank: int
    held_out: Path | None
    every: int
    seed: int
    options: dict[str, str]
    device: str
    threads: int
    fresh: bool = False
    column: str = TEXT
    ratios: tuple[str, ...] = RATIOS
    documents: int = DOCUMENTS
    recall: bool = True


def _check_model(name: str, loaded: Loaded, facts: ModelFacts, length: int, method: Method) -> None:
    """Check that the method can be trained on the model, on texts of that length.

    Raises:
        UserError: it cannot.
    """
    facts.check(name)
    facts.check_length(name, length, f"Use --length {facts.window} or less.")
    if method.n_rows:
        facts.check_embeddings(name, method.name)
    context = loaded.context
    if length > context:
        raise UserError(
            f"--length {length} does not fit {name}: its context is {context} tokens.",
            f"Use --length {context} or less.",
        )
    if length + method.extra_positions > context and not has_rotary(loaded.model):
        raise UserError(
            f"{name} has learned positions up to {context}, and {method.name} needs {method.extra_positions} "
            "after its text.",
            f"Use --length {context - method.extra_positions} or less.",
        )


class Materials:
    """Models and texts, each loaded once however many adapters are trained with them."""

    def __init__(self) -> None:
        self._models: dict[Any, tuple[ModelReference, Loaded]] = {}
        self._streams: dict[Any, Stream] = {}
        self._held_out: dict[Any, HeldOut] = {}

    def model(self, request: AdapterRequest, device: str) -> tuple[ModelReference, Loaded]:
        """The base model, in float32."""
        key = request.model, request.revision, device
        if key not in self._models:
            reference = resolve_model(request.model, request.revision)
            loaded = load_model(reference, device, "float32")
            reference.check_unchanged()
            self._models[key] = reference, loaded
        return self._models[key]

    def stream(self, request: AdapterRequest, tokenizer: Any) -> Stream:
        """The training text."""
        key = request.model, request.revision, request.data, request.column, request.length
        if key not in self._streams:
            self._streams[key] = load_stream(request.data, tokenizer, 2 * request.length, request.column)
        return self._streams[key]

    def held_out(self, request: AdapterRequest, tokenizer: Any) -> HeldOut | None:
        """The held-out text; None if there is none."""
        if request.held_out is None:
            return None
        key = (
            request.model, request.revision, request.held_out, request.column, request.length, request.documents,
            request.recall,
        )
        if key not in self._held_out:
            self._held_out[key] = HeldOut.from_file(
                request.held_out, tokenizer, request.length, request.documents, request.column, request.recall
            )
        return self._held_out[key]


class Measured(NamedTuple):
    """Scores of a method without training, to be shown beside those of adapters."""

    method: str
    scores: Scores


def run_adapter_training(
    request: AdapterRequest, follow: Follow, until: int | None = None, materials: Materials | None = None
) -> bool:
    """Train an adapter and write it to ``request.out``; the checkpoint is deleted at the end.

    Args:
        until: step after which training pauses, with a checkpoint; None to go on to the end.
        materials: models and texts that are loaded already.

    Returns:
        Whether it is finished.

    Raises:
        UserError: the request cannot be carried out.
    """
    plan, materials = make_plan(request), materials or Materials()
    check_out(request.out, CARD)
    team = assemble(request.device, plan.batch)
    if request.threads:
        torch.set_num_threads(request.threads)
    reference, loaded = materials.model(request, team.device(request.device))
    model, tokenizer, method = loaded.model, loaded.tokenizer, make_method(plan.method, Fraction(0), plan.options)
    _check_model(request.model, loaded, probed(loaded, reference.fingerprint), plan.length, method)
    stream, held = materials.stream(request, tokenizer), materials.held_out(request, tokenizer)
    plan = replace(plan, base_hash=reference.fingerprint, data=stream.hash)
    card = AdapterCard(
        method=plan.method, gate=plan.adapter, rank=plan.rank, alpha=float(plan.rank),
        n_rows=method.n_rows, options=plan.options,
        base_model=reference.short_name, base_hash=reference.fingerprint,
    )
    torch.manual_seed(plan.seed)
    adapter = Adapter.fresh(card, model, plan.dropout)
    data = Mixture(stream.ids, lambda text: encode_in_context(tokenizer, text), plan.length, plan.seed)
    if team.leads:
        make_folder(request.out, request.fresh)
    team.wait()
    running = Running()

    def measure(step: int, loss: float) -> Scores | None:
        if held is None or not team.leads:
            return None
        curve = read_curve(request.out)
        known = [point for point in curve if point.step == step]  # it was interrupted after measuring
        if known:
            return known[0].held_out
        adapter.eval()
        found = held.measure(model, adapter, plan.method, request.ratios, plan.options)
        adapter.train()
        write_curve(request.out, [*curve, Point(step, loss, found)])
        return found

    last = min(until or plan.steps, plan.steps)
    steps = train_adapter(plan, model, adapter, data, request.out, request.every, team, last, running)
    follow(steps, last, measure, request.every)
    if last < plan.steps or not team.leads:
        return last == plan.steps
    adapter.card = replace(card, held_out=measure(plan.steps, running.loss) or {}, training={
        **{k: v for k, v in dataclasses.asdict(plan).items() if k not in ("base_hash", "data")},
        "tokens": plan.steps * plan.batch * plan.length,
        "loss": None if math.isnan(running.loss) else round(running.loss, 4), "data": list(stream.sources),
        "stream_tokens": len(stream.ids), "seconds": round(running.seconds),
        "kvbench": kvbench.__version__, "torch": torch.__version__,
    })
    log = request.out / LOG
    adapter.save(request.out, request.model, {LOG: log.read_text(encoding="utf-8")} if log.exists() else None)
    return True


def measure_untrained(
    request: AdapterRequest, methods: Sequence[str], materials: Materials
) -> list[Measured]:
    """Measure methods that need no training on the held-out text of a request.

    Raises:
        UserError: a method is unknown or needs an adapter, or a file cannot be read.
    """
    free = [name for name, kind in METHODS.items() if not kind.adapter_kinds]
    for name in methods:
        if name not in free:
            raise unknown("method without an adapter", name, free)
    _, loaded = materials.model(request, Team().device(request.device))
    held = materials.held_out(request, loaded.tokenizer)
    return [] if held is None else [
        Measured(name, held.measure(loaded.model, None, name, request.ratios)) for name in methods
    ]


def make_plan(request: AdapterRequest) -> AdapterPlan:
    """The settings of the training, checked.

    Raises:
        UserError: an unknown method, key or value.
    """
    trained = [name for name, kind in METHODS.items() if kind.adapter_kinds]
    if request.method not in trained:
        raise unknown("trained method", request.method, trained)
    given = dict(request.options)
    dropout = _number(given, "dropout", 0.0, most=1.0)
    boundary = _number(given, "boundary", 1.0)
    kind = METHODS[request.method]
    bound = [name for name, option in kind.options().items() if option.trained]
    choices = {**_CHOICES, "adapter": kind.adapter_kinds}
    for key, value in given.items():
        if key not in (*choices, *bound):
            raise unknown("--set key", key, (*choices, "dropout", "boundary", *bound))
        if key in choices and value not in choices[key]:
            raise unknown(f"value for --set {key}=", value, choices[key])
    options = make_method(request.method, Fraction(0), given).trained_options
    return AdapterPlan(
        method=request.method, adapter=given.get("adapter", kind.adapter_kinds[0]), steps=request.steps,
        batch=request.batch, length=request.length, lr=request.lr, rank=request.rank,
        dropout=dropout, seed=request.seed, autocast=given.get("autocast", "bfloat16"),
        objective=given.get("objective", "text"), options=options, boundary=boundary,
        warmup=min(100, max(1, request.steps // 10)),
    )


def _number(given: dict[str, str], name: str, default: float, most: float = math.inf) -> float:
    """Take a number from 0 up to below ``most`` out of what was given.

    Raises:
        UserError: it is no such number.
    """
    text = given.pop(name, str(default))
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < most:
        bounds = "of at least 0" if math.isinf(most) else f"in [0, {most:g})"
        raise UserError(f"--set {name}={text} is not a number {bounds}.")
    return value
