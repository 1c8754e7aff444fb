"""End-to-end training: check, load, train, measure, and write a folder with its card."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import kvbench
from kvbench.data.files import KNOWN
from kvbench.data.rows import TEXT, read_rows
from kvbench.errors import UserError, unknown
from kvbench.methods import METHODS, Method, make_method
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.device import pick_device
from kvbench.models.facts import ModelFacts
from kvbench.models.fingerprint import fingerprint
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import resolve_model
from kvbench.models.rope import has_rotary
from kvbench.probe.cached import probed
from kvbench.protocols.pieces import Tokenizer
from kvbench.training.adapter_training import AdapterPlan, train_adapter
from kvbench.training.base_training import BasePlan, new_model, train_base, train_tokenizer
from kvbench.training.data import load_stream
from kvbench.training.held_out import HeldOut
from kvbench.training.loop import CHECKPOINT, Progress
from kvbench.training.mixture import Mixture
from kvbench.training.team import assemble, processes

Measure = Callable[[int, float], dict[str, Any] | None]
Follow = Callable[[Iterator[Progress], int, Measure, int], float]
"""Runs a training to its end, shows its progress, and calls the measurement at regular steps."""

_CHOICES = {"objective": ("text", "distil"), "autocast": ("bfloat16", "none")}


@dataclass(frozen=True)
class AdapterRequest:
    """The user's request; names are not yet checked."""

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


def run_adapter_training(request: AdapterRequest, follow: Follow) -> Path:
    """Train and write an adapter.

    Returns:
        The adapter folder, which is ``request.out``; the checkpoint is deleted at the end.

    Raises:
        UserError: the request cannot be carried out.
    """
    plan = _plan(request)
    _check_out(request.out, "card.json")
    team = assemble(request.device, plan.batch)
    reference = resolve_model(request.model, request.revision)
    if request.threads:
        torch.set_num_threads(request.threads)
    loaded = load_model(reference, team.device(request.device), "float32")
    reference.check_unchanged()
    model, tokenizer, method = loaded.model, loaded.tokenizer, make_method(plan.method, Fraction(0), plan.options)
    _check_model(request.model, loaded, probed(loaded, reference.fingerprint), plan.length, method)
    stream = load_stream(request.data, tokenizer, 2 * plan.length, request.column)
    plan = replace(plan, base_hash=reference.fingerprint, data=stream.hash)
    held = None
    if request.held_out:
        held = HeldOut.from_file(request.held_out, tokenizer, plan.length, column=request.column)
    card = AdapterCard(
        method=plan.method, gate=plan.adapter, rank=plan.rank, alpha=float(plan.rank),
        n_rows=method.n_rows, options=plan.options,
        base_model=reference.short_name, base_hash=reference.fingerprint,
    )
    torch.manual_seed(plan.seed)
    adapter = Adapter.fresh(card, model, plan.dropout)
    data = Mixture(stream.ids, lambda text: encode_in_context(tokenizer, text), plan.length, plan.seed)
    if team.leads:
        _make(request.out, request.fresh)
    team.wait()
    started = time.perf_counter()
    measured: dict[str, Any] = {}

    def measure(step: int, loss: float) -> dict[str, Any] | None:
        if held is None or not team.leads:
            return None
        adapter.eval()
        found = held.measure(model, adapter, plan.method, options=plan.options)
        adapter.train()
        measured.update(found)
        line = {"step": step, "loss": round(loss, 4), "held_out": found}
        with (request.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        return found

    steps = train_adapter(plan, model, adapter, data, request.out, request.every, team)
    loss = follow(steps, plan.steps, measure, request.every)
    if not team.leads:
        return request.out
    if not measured:  # resumed after its last step
        measure(plan.steps, loss)
    adapter.card = replace(card, held_out=measured, training={
        **{k: v for k, v in dataclasses.asdict(plan).items() if k not in ("base_hash", "data")},
        "tokens": plan.steps * plan.batch * plan.length,
        "loss": None if math.isnan(loss) else round(loss, 4), "data": list(stream.sources),
        "stream_tokens": len(stream.ids), "seconds": round(time.perf_counter() - started),
        "kvbench": kvbench.__version__, "torch": torch.__version__,
    })
    log = request.out / "log.jsonl"
    curve = log.read_text(encoding="utf-8") if log.exists() else None
    adapter.save(request.out, request.model)
    if curve is not None:
        (request.out / "log.jsonl").write_text(curve, encoding="utf-8")
    return request.out


def run_base_training(
    plan: BasePlan, data: tuple[Path, ...], out: Path, tokenizer_folder: Path | None, device: str,
    threads: int, every: int, follow: Follow, fresh: bool = False, column: str = TEXT,
) -> Path:
    """Train and write a base model with its tokenizer.

    Raises:
        UserError: the request cannot be carried out.
    """
    from transformers import AutoTokenizer

    _check_out(out, "config.json")
    if processes() > 1:
        raise UserError("kvbench train base runs in one process.", "Start it without accelerate launch.")
    if threads:
        torch.set_num_threads(threads)
    where = pick_device(device)
    if not data:
        raise UserError("Training needs text.", f"Give --data FILE: {KNOWN}.")
    if tokenizer_folder is not None:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder))
        except (OSError, ValueError) as error:
            raise UserError(f"There is no tokenizer in {tokenizer_folder}: {error}.") from error
    else:
        texts = (row["text"] for row in read_rows(data[0], column))
        tokenizer = train_tokenizer(_at_most(texts, 25_000_000), plan.vocabulary, plan.length)
    stream = load_stream(data, tokenizer, 2 * plan.length, column)
    known = fingerprint(tokenizer_folder) if tokenizer_folder is not None else "trained"
    plan = replace(plan, tokenizer=known, data=stream.hash)
    model = new_model(plan, len(tokenizer), tokenizer.eos_token_id).to(where)
    mixture = Mixture(stream.ids, lambda text: encode_in_context(tokenizer, text), plan.length, plan.seed)
    _make(out, fresh)
    follow(train_base(plan, model, mixture, out, every), plan.steps, lambda step, loss: None, every)
    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[operator]
    tokenizer.save_pretrained(out)
    card = {**dataclasses.asdict(plan), "data": list(stream.sources), "kvbench": kvbench.__version__}
    (out / "training.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (out / CHECKPOINT).unlink(missing_ok=True)
    return out


def _plan(request: AdapterRequest) -> AdapterPlan:
    trained = [name for name, kind in METHODS.items() if kind.adapter_kinds]
    if request.method not in trained:
        raise unknown("trained method", request.method, trained)
    given = dict(request.options)
    try:
        dropout = float(given.pop("dropout", "0"))
    except ValueError:
        dropout = -1.0
    if not 0 <= dropout < 1:
        raise UserError(f"--set dropout={request.options['dropout']} is not a number in [0, 1).")
    kind = METHODS[request.method]
    bound = [name for name, option in kind.options().items() if option.trained]
    choices = {**_CHOICES, "adapter": kind.adapter_kinds}
    for key, value in given.items():
        if key not in (*choices, *bound):
            raise unknown("--set key", key, (*choices, "dropout", *bound))
        if key in choices and value not in choices[key]:
            raise unknown(f"value for --set {key}=", value, choices[key])
    options = make_method(request.method, Fraction(0), given).trained_options
    return AdapterPlan(
        method=request.method, adapter=given.get("adapter", kind.adapter_kinds[0]), steps=request.steps,
        batch=request.batch, length=request.length, lr=request.lr, rank=request.rank,
        dropout=dropout, seed=request.seed, autocast=given.get("autocast", "bfloat16"),
        objective=given.get("objective", "text"), options=options, warmup=min(100, max(1, request.steps // 10)),
    )


def _check_out(out: Path, marker: str) -> None:
    """Check that the output folder is missing, empty, or holds an unfinished training."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file.", "Give a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / marker).exists():
        raise UserError(f"--out {out} already holds a finished training.", "Choose another folder.")
    if not (out / CHECKPOINT).exists() and not (out / "log.jsonl").exists():
        raise UserError(f"--out {out} holds something else.", "Choose an empty or a new folder.")


def _make(out: Path, fresh: bool) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (CHECKPOINT, "log.jsonl") if fresh else ():
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.", "Choose another folder.") from error


def encode_in_context(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text within another text, without what some tokenizers prepend to a text."""
    return list(Tokenizer(tokenizer, None).split(("a", text))[1].ids)


def _at_most(texts: Iterator[str], characters: int) -> Iterator[str]:
    count = 0
    for text in texts:
        if count >= characters:
            return
        count += len(text)
        yield text
