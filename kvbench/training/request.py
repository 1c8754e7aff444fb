"""What an adapter training is asked for, and the settings that follow from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from kvbench.data.rows import TEXT
from kvbench.errors import UserError, unknown
from kvbench.methods import METHODS, make_method
from kvbench.models.sharing import MARK
from kvbench.training.adapter_training import AdapterPlan
from kvbench.training.data import hash_of
from kvbench.training.held_out import DOCUMENTS, RATIOS

_CHOICES = {
    "objective": ("text", "distil"), "autocast": ("bfloat16", "none"), "stored": ("float32", "bfloat16"),
    "keep": ("last", "best"),
}


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
        warmup: steps of linear warm-up; 0 for a tenth of all, at most 100.
        shared: folder for states from which trainings begin that differ in their length only; None for none.
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
    warmup: int = 0
    shared: Path | None = None


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
    if given.get("keep") == "best" and request.held_out is None:
        raise UserError("--set keep=best needs text to choose by.", "Give --held-out FILE.")
    method = make_method(request.method, Fraction(0), given)
    if boundary != 1 and not method.feeds_rows:
        raise UserError(
            f"--set boundary= weighs the loss behind compressed pieces of text, and {request.method} makes none.",
            "Leave it out.",
        )
    if MARK in request.model and given.get("objective") == "distil":
        raise UserError(
            "Under --share, --set objective=distil would learn from the shared model itself, not from the one that "
            "shares nothing.", "Leave it out.",
        )
    added = {name for name, option in kind.options().items() if option.later}
    options = {
        name: value for name, value in method.trained_options.items()
        if not (name in added and value == kind.options()[name].default)  # as adapters from before they were added
    }
    return AdapterPlan(
        method=request.method, adapter=given.get("adapter", kind.adapter_kinds[0]), steps=request.steps,
        batch=request.batch, length=request.length, lr=request.lr, rank=request.rank,
        dropout=dropout, seed=request.seed, autocast=given.get("autocast", "bfloat16"),
        objective=given.get("objective", "text"), options=options, boundary=boundary,
        stored=given.get("stored", "float32"), keep=given.get("keep", "last"),
        warmup=request.warmup or min(100, max(1, request.steps // 10)),
    )


def held_out_key(request: AdapterRequest) -> str:
    """A hash of what is measured on which held-out text; empty if nothing is.

    Raises:
        UserError: the file cannot be read.
    """
    if request.held_out is None:
        return ""
    known = (request.column, request.documents, request.recall, request.length, list(request.ratios))
    text = hash_of(request.held_out)
    return hashlib.sha256(json.dumps([text, *known]).encode()).hexdigest()[:16]


def alike(plan: AdapterPlan) -> str:
    """A hash of all settings but the length of the training."""
    settings = {name: value for name, value in dataclasses.asdict(plan).items() if name not in ("steps", "held_out")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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
