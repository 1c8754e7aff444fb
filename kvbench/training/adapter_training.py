"""Training the adapter of a compression method on a frozen base model.

Each step is one forward pass under a layout's mask, which trains all spans (or chunks) of a sequence at once, or under
a mask that a policy makes in every layer. Spans and ratio are sampled anew for every batch, so that one adapter serves
all ratios. The loss is over all text tokens: the language-model loss (``text``, as published), or the KL divergence
from the uncompressed base model's predictions (``distil``), which takes a second pass and is free of the noise of the
text itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.inference.opening import one_pass
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS
from kvbench.methods.layouts.layout import Layout, plain_tokens, sees_everything
from kvbench.methods.policies.policy import CachePolicy
from kvbench.models.adapter import Adapter
from kvbench.models.rope import fixed_rotations
from kvbench.training.loop import (
    DivergedError,
    Progress,
    Running,
    Stateful,
    falls_after,
    rate_factor,
    read_state,
    restore_checkpoint,
    save_checkpoint,
    write_state,
)
from kvbench.training.mixture import Mixture
from kvbench.training.team import Team

ALONE = Team()
AFTER = 8
"""Number of tokens behind a compressed piece of text whose loss ``AdapterPlan.boundary`` weights."""


@dataclass(frozen=True)
class AdapterPlan:
    """All settings that determine the trained weights, besides the base model and the data.

    Attributes:
        method: name of the trained method.
        adapter: what is trained: low-rank pairs on special tokens (``gated``) or on every token (``plain``), or every
            weight (``full``); see ``AdapterCard``.
        steps: optimiser steps.
        batch: sequences per step; they share one layout.
        length: text tokens per sequence.
        lr: peak learning rate (AdamW; warm-up, constant, linear to 3 %).
        rank: rank of the low-rank pairs; alpha is the same, so the scale is 1.
        dropout: dropout on the input of the low-rank pairs.
        warmup: steps of linear warm-up.
        decay_from: fraction of the steps after which the learning rate decays.
        seed: seed of the weights, the data and the layouts.
        autocast: ``bfloat16`` or ``none``.
        objective: ``distil`` or ``text``.
        base_hash, data, held_out: fingerprints of the base model, of the data files, and of what is measured on which
            held-out text.
        options: the method's options that the adapter learns; it is refused with other values.
        stored: dtype of the low-rank pairs in the adapter's file.
        keep: ``last``, the weights after the last step, or ``best``, those with the lowest loss on held-out text.
        boundary: weight of the loss on the :data:`AFTER` tokens behind a compressed piece of text; 1 elsewhere.
    """

    method: str
    adapter: str = "gated"
    steps: int = 2000
    batch: int = 4
    length: int = 512
    lr: float = 2e-3
    rank: int = 32
    dropout: float = 0.0
    warmup: int = 100
    decay_from: float = 0.7
    seed: int = 0
    autocast: str = "bfloat16"
    objective: str = "text"
    base_hash: str = ""
    data: str = ""
    held_out: str = ""
    options: dict[str, str] = field(default_factory=dict)
    boundary: float = 1.0
    stored: str = "float32"
    keep: str = "last"


def step_sample(plan: AdapterPlan, step: int) -> Layout | CachePolicy:
    """What a step reads its text under: ratio and spans are functions of (seed, step)."""
    rng = np.random.default_rng([plan.seed, step, 1])
    return METHODS[plan.method].training_sample(plan.length, rng, plan.options)


def text_loss(logits: Tensor, ids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of all text tokens but the first, which ``logits`` predict, in nats.

    Args:
        weights: ``[predicted tokens]``, of each in the mean; None for equal ones.
    """
    every = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return _mean(every, weights)


def distil_loss(logits: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean KL(base || compressed) per predicted token, in nats; ``teacher``: logits of the base model."""
    wanted = teacher.flatten(0, 1).float().log_softmax(-1)
    given = logits.flatten(0, 1).float().log_softmax(-1)
    return _mean(functional.kl_div(given, wanted, reduction="none", log_target=True).sum(-1), weights)


def _mean(every: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return every.mean()
    rows = weights.repeat(len(every) // len(weights))
    return (every * rows).sum() / rows.sum()


def boundary_weights(plan: AdapterPlan, drawn: Layout | CachePolicy) -> Tensor | None:
    """The weight of each predicted token; None if all are equal."""
    since = None if plan.boundary == 1 else drawn.since_boundary(torch.arange(1, plan.length))
    if since is None:
        return None
    return torch.where((since >= 0) & (since < AFTER), plan.boundary, 1.0)


def step_loss(
    plan: AdapterPlan, model: nn.Module, reader: Reader, ids: Tensor, drawn: Layout | CachePolicy
) -> Tensor:
    """The loss of one step under the plan's objective; what the last text token predicts is left out."""
    weights = boundary_weights(plan, drawn)
    weights = None if weights is None else weights.to(ids.device)
    if plan.objective == "text":
        return text_loss(one_pass(reader, ids, drawn, slice(0, -1)), ids, weights)
    with torch.no_grad(), reader.without_adapter():
        # The base model reads the text alone: no special tokens, nothing hidden.
        plain = Layout(plain_tokens(plan.length), torch.arange(plan.length), sees_everything, plan.length)
        teacher = Reader(model).one_pass(ids, plain, slice(0, -1))
    return distil_loss(one_pass(reader, ids, drawn, slice(0, -1)), teacher, weights)


def train_adapter(
    plan: AdapterPlan, model: nn.Module, adapter: Adapter, data: Mixture, out: Path,
    checkpoint_every: int, team: Team = ALONE, turn: int | None = None, running: Running | None = None,
    stable: Path | None = None,
) -> Iterator[Progress]:
    """Train ``adapter`` in place; yields after every step.

    A checkpoint in ``out`` is resumed exactly: the weights are those of an uninterrupted training on the same machine
    with the same number of threads. Its own step is yielded first, as it may not have been measured yet.

    Args:
        turn: steps after which training pauses, with a checkpoint; None to go on to the end.
        running: where loss and time are added up.
        stable: file for the state before the rate falls, where a training begins that differs in its length only.

    Raises:
        UserError: ``out`` holds the checkpoint of another plan.
    """
    device = next(model.parameters()).device
    adapter.to(device).train()
    optimiser = torch.optim.AdamW(
        adapter.parameters(), lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    running = running or Running()
    parts: dict[str, Stateful] = {"adapter": adapter, "optimiser": optimiser, "running": running}
    first, falls = restore_checkpoint(out, plan, parts), falls_after(plan.steps, plan.decay_from)
    if not first and stable is not None:
        first = read_state(stable, parts, falls)
    last = plan.steps if turn is None else min(first + turn, plan.steps)
    if first:
        yield Progress(first, running.loss)
    reader = Reader(model, adapter)
    with reader.ready(), fixed_rotations(model, plan.length):
        for step in range(first, last):
            started = time.perf_counter()
            torch.manual_seed(plan.seed * 1_000_003 + step)  # for dropout
            for group in optimiser.param_groups:
                group["lr"] = plan.lr * rate_factor(step, plan.steps, plan.warmup, plan.decay_from)
            ids = team.own_rows(torch.from_numpy(data.batch(step, plan.batch))).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.autocast != "none"):
                loss = step_loss(plan, model, reader, ids, step_sample(plan, step))
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            team.average_gradients(adapter.parameters())
            nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimiser.step()
            if not math.isfinite(now := float(loss.detach())):
                raise DivergedError(
                    f"{out.name}: the loss of step {step + 1} is not finite.", "Train with a lower learning rate."
                )
            running.add(now, time.perf_counter() - started)
            if ((step + 1) % checkpoint_every == 0 or step + 1 == last) and team.leads:
                save_checkpoint(out, plan, step + 1, parts)
            if step + 1 == falls and stable is not None and team.leads:
                write_state(stable, plan, step + 1, parts)
            yield Progress(step + 1, running.loss)
    adapter.eval().requires_grad_(False)
