"""Training an adapter from files to a folder: check, load, train, measure, and write the adapter with its card."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file

import kvbench
from kvbench.errors import UserError, unknown
from kvbench.methods import METHODS, Method, make_method
from kvbench.methods.adapters import fresh_adapter
from kvbench.models.adapter import CARD, Adapter, AdapterCard, recover
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded
from kvbench.models.references import ModelReference
from kvbench.models.rope import has_rotary
from kvbench.probe.cached import probed
from kvbench.training.adapter_training import AdapterPlan, train_adapter
from kvbench.training.curve import LOG, Point, Scores, read_curve, write_curve
from kvbench.training.data import Stream, encode_in_context
from kvbench.training.folder import BEST, check_out, make_folder
from kvbench.training.held_out import HeldOut
from kvbench.training.loop import DivergedError, Follow, Running
from kvbench.training.materials import Materials
from kvbench.training.mixture import Mixture
from kvbench.training.request import AdapterRequest, alike, held_out_key, make_plan
from kvbench.training.team import Team, assemble


def _check_model(name: str, loaded: Loaded, facts: ModelFacts, length: int, method: Method) -> None:
    """Check that the method can be trained on the model, on texts of that length.

    Raises:
        UserError: it cannot.
    """
    facts.check(name)
    facts.check_length(name, length, f"Use --length {facts.window} or less.")
    if method.feeds_rows:
        facts.check_embeddings(name, method.name)
    context = loaded.context
    if length > context:
        raise UserError(
            f"--length {length} does not fit {name}: its context is {context} tokens.",
            f"Use --length {context} or less.",
        )
    needed = method.positions_trained(length)
    if needed > context and not has_rotary(loaded.model):
        raise UserError(
            f"{name} has learned positions up to {context}, and {method.name} needs {needed} for --length {length}.",
            f"Use --length {max(32, context - needed + length)} or less, or a smaller --set n_comp=.",
        )


class Measured(NamedTuple):
    """Scores of a method without training, to be shown beside those of adapters."""

    method: str
    scores: Scores


class Prepared(NamedTuple):
    """All that a training needs, loaded and checked."""

    plan: AdapterPlan
    team: Team
    reference: ModelReference
    loaded: Loaded
    stream: Stream
    held_out: HeldOut | None


def prepare(request: AdapterRequest, materials: Materials) -> Prepared:
    """Load and check what a training needs; nothing is written.

    Raises:
        UserError: the request cannot be carried out.
    """
    plan = make_plan(request)
    recover(request.out)
    check_out(request.out, CARD)
    team = assemble(request.device, plan.batch)
    reference, loaded = materials.model(request, team.device(request.device))
    method = make_method(plan.method, Fraction(0), plan.options)
    _check_model(request.model, loaded, probed(loaded, reference.fingerprint), plan.length, method)
    stream, held = materials.stream(request, loaded.tokenizer), materials.held_out(request, loaded.tokenizer)
    if held is not None and not held.reached(plan.method, request.ratios, plan.options):
        raise UserError(
            f"{plan.method} can reach none of the ratios {', '.join(request.ratios)} on the held-out text.",
            "Measure at other ratios, or on longer text.",
        )
    plan = replace(plan, base_hash=reference.fingerprint, data=stream.hash, held_out=held_out_key(request))
    return Prepared(plan, team, reference, loaded, stream, held)


def run_adapter_training(
    request: AdapterRequest, follow: Follow, turn: int | None = None, materials: Materials | None = None
) -> bool:
    """Train an adapter and write it to ``request.out``; the checkpoint is deleted at the end.

    Args:
        turn: steps after which training pauses, with a checkpoint; None to go on to the end.
        materials: models and texts that are loaded already.

    Returns:
        Whether it is finished.

    Raises:
        UserError: the request cannot be carried out.
        DivergedError: the loss, or what the model predicts, is not finite.
    """
    plan, team, reference, loaded, stream, held = prepare(request, materials or Materials())
    model, tokenizer = loaded.model, loaded.tokenizer
    if request.threads:
        torch.set_num_threads(request.threads)
    card = AdapterCard(
        method=plan.method, gate=plan.adapter, rank=plan.rank, alpha=float(plan.rank),
        n_rows=make_method(plan.method, Fraction(0), plan.options).n_rows, options=plan.options,
        base_model=reference.short_name, base_hash=reference.fingerprint,
    )
    torch.manual_seed(plan.seed)
    adapter = fresh_adapter(card, model, plan.dropout)
    data = Mixture(stream.ids, lambda text: encode_in_context(tokenizer, text), plan.length, plan.seed)
    if team.leads:
        make_folder(request.out, request.fresh)
    team.wait()
    running = Running()

    def scores() -> Scores:
        assert held is not None, "there is held-out text"
        adapter.eval()
        try:
            return held.measure(model, adapter, plan.method, request.ratios, plan.options)
        except RuntimeError as error:
            raise DivergedError(f"{request.out.name}: {error}.", "Train with a lower learning rate.") from error
        finally:
            adapter.train()

    def measure(step: int, loss: float) -> Scores | None:
        if held is None or not team.leads:
            return None
        curve = read_curve(request.out)
        known = [point for point in curve if point.step == step]  # it was interrupted after measuring
        if known:
            return known[0].held_out
        point = Point(step, loss, scores())
        if plan.keep == "best" and all(point.mean < other.mean for other in curve):
            save_file(adapter.state_dict(), request.out / (BEST + ".part"))
            os.replace(request.out / (BEST + ".part"), request.out / BEST)
        write_curve(request.out, [*curve, point])
        return point.held_out

    stable = _stable(request, plan)
    steps = train_adapter(plan, model, adapter, data, request.out, request.every, team, turn, running, stable)
    follow(steps, plan.steps, measure, request.every)
    is_finished = running.steps == plan.steps
    if is_finished and team.leads:
        found = measure(plan.steps, running.loss) or {}
        kept, found = _best(request, adapter) if plan.keep == "best" else (plan.steps, found)
        if plan.stored != "float32":
            _round(adapter, getattr(torch, plan.stored))
            found = scores() if held is not None else {}
        _write(request, plan, adapter, running, stream, found, kept)
    return is_finished


def _stable(request: AdapterRequest, plan: AdapterPlan) -> Path | None:
    """The file for the state before the rate falls, which trainings share that differ in their length only; none if the
    best weights are kept, since those may lie before it."""
    if request.shared is None or plan.keep == "best":
        return None
    request.shared.mkdir(parents=True, exist_ok=True)
    return request.shared / f"{alike(plan)}.pt"


def _best(request: AdapterRequest, adapter: Adapter) -> tuple[int, Scores]:
    """Take the weights with the lowest loss on held-out text; returns their step and scores."""
    adapter.load_state_dict(load_file(request.out / BEST))
    best = min(read_curve(request.out), key=lambda point: point.mean)
    return best.step, best.held_out


def _round(adapter: Adapter, dtype: torch.dtype) -> None:
    """Round the low-rank pairs and the writer to what will be written."""
    writer = () if adapter.writer is None else adapter.writer.state_dict().values()
    with torch.no_grad():
        for tensor in (*adapter.pairs.parameters(), *writer):
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype))


def _write(
    request: AdapterRequest, plan: AdapterPlan, adapter: Adapter, running: Running, stream: Stream, held_out: Scores,
    kept: int,
) -> None:
    """Write a trained adapter, of the step ``kept``, with its card and curve."""
    adapter.card = replace(adapter.card, held_out=held_out, training={
        **{k: v for k, v in dataclasses.asdict(plan).items() if k not in ("base_hash", "data")},
        "kept_step": kept, "tokens": kept * plan.batch * plan.length,
        "loss": None if math.isnan(running.loss) else round(running.loss, 4), "data": list(stream.sources),
        "stream_tokens": len(stream.ids), "seconds": round(running.seconds),
        "kvbench": kvbench.__version__, "torch": torch.__version__,
    })
    log = request.out / LOG
    more = {LOG: log.read_text(encoding="utf-8")} if log.exists() else None
    adapter.save(request.out, request.model, more, getattr(torch, plan.stored))


def measure_untrained(
    request: AdapterRequest, methods: Sequence[str], materials: Materials
) -> list[Measured]:
    """Measure methods that need no training on the held-out text of a request.

    Raises:
        UserError: a method is unknown or needs an adapter, or a file cannot be read.
    """
    check_untrained(methods)
    _, loaded = materials.model(request, Team().device(request.device))
    held = materials.held_out(request, loaded.tokenizer)
    return [] if held is None else [
        Measured(name, held.measure(loaded.model, None, name, request.ratios)) for name in methods
    ]


def check_untrained(methods: Sequence[str]) -> None:
    """Check that methods need no adapter.

    Raises:
        UserError: one is unknown, or does.
    """
    free = [name for name, kind in METHODS.items() if not kind.adapter_kinds]
    for name in methods:
        if name not in free:
            raise unknown("method without an adapter", name, free)
