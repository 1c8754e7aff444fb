"""The checks, one function each: what is tested, what was found, and what to do when it fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kvbench.doctor.examined import Subject, method_of
from kvbench.errors import UserError
from kvbench.inference.generation import generate, greedy, read_prompt
from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.sampling import Sampling
from kvbench.models.rope import fresh_rotations
from kvbench.profiling.clock import clock_of
from kvbench.profiling.passes import settled, time_request
from kvbench.profiling.request import SessionRequest
from kvbench.protocols.block import cut_blocks
from kvbench.statistics import GroupSums, bootstrap_intervals

LAYOUTS = (("window", "0.5"), ("local", "0.7"), ("sinks", "0.7"), ("scattered", "0.5"))
"""Layout methods without an adapter, and the ratios that they are tested at."""
POLICIES = (("knorm", "0.5"), ("h2o", "0.5"), ("snapkv", "0.7"), ("streaming-llm", "0.7"))
"""Policies and their ratios; tested if the model supports policies."""
NOISE, ROUNDS = {"cpu": 0.05, "cuda": 0.02}, 9
"""Largest A/A gap that timings may have, by device, and the number of pairs of requests that are timed for it."""
_Z = 1.959964


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: what was tested.
        ok: whether it held.
        found: the result, in words.
        advice: what to do if it did not hold.
    """

    name: str
    ok: bool
    found: str
    advice: str


def nothing_removed_is_full(subject: Subject) -> Check:
    """At ratio 0 every method gives the scores, and the greedy texts, of the full cache."""
    full = subject.score("full", "0")
    scores = [subject.score(name, "0") for name, _ in methods(subject)]
    worst = max(float((score.nll - full.nll).abs().mean()) for score in scores)
    # In half precision two kernels may decide a near tie differently: texts are compared in float32 only.
    exact = next(subject.loaded.model.parameters()).dtype == torch.float32
    names = ("full", *(name for name, _ in (*LAYOUTS[:2], *policies(subject)[:2]))) if exact else ()
    texts = [_written(subject, name) for name in names]
    same = all(torch.equal(text, texts[0]) for text in texts)
    return Check(
        "ratio 0 is the full cache", worst <= subject.tolerance and same,
        f"nll differs by {worst:.1e} nats" + (f", greedy texts {'equal' if same else 'DIFFER'}" if exact else ""),
        "This kernel or precision cannot repeat itself: use --dtype float32, or report the model.",
    )


def targets_are_scored_once(subject: Subject) -> Check:
    """Every token but the first of a block is scored exactly once, and the sums equal those of a plain loop."""
    wrong = 0
    for document in subject.documents:
        cut = cut_blocks(document, subject.tokenizer, subject.block)
        lead = len(subject.tokenizer.lead())
        joined = [i for piece in cut.pieces for i in piece.ids[lead:]]
        wrong += joined != list(subject.tokenizer.encode(document.text)[0])[: len(joined)]
        wrong += any(piece.scored != 1 for piece in cut.pieces)
    ids = subject.ids()
    with torch.inference_mode(), fresh_rotations(subject.loaded.model):
        logits = subject.loaded.model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    plain = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].double().cpu()
    apart = float((subject.score("full", "0").nll - plain).abs().mean())
    return Check(
        "targets are scored once", wrong == 0 and apart <= subject.tolerance,
        f"{len(subject.documents)} documents, {wrong} wrong cuts; {apart:.1e} nats from a plain loop",
        "The tokenizer or the model's own loss disagrees with the harness: report the model.",
    )


def batches_change_nothing(subject: Subject) -> Check:
    """A block scores the same alone and in a batch; a policy may differ by what rounding alone does to it.

    On a GPU a batch takes other kernels, which round otherwise, and a policy then keeps another of two entries whose
    scores are all but equal.
    """
    worst, is_close, ties = 0.0, True, []
    for name, ratio in methods(subject):
        together = subject.score(name, ratio).nll
        alone = _alone(subject, name, ratio)
        apart = float((together - alone).abs().mean())
        if apart > subject.tolerance and (name, ratio) in POLICIES:
            by_rounding = float((_alone(subject, name, ratio, rounded=True) - alone).abs().mean())
            is_close = is_close and apart <= 4 * by_rounding
            ties.append(f"; {name} by {apart:.1e}, and by {by_rounding:.1e} when rounded")
        else:
            worst = max(worst, apart)
    return Check(
        "a batch changes no score", is_close and worst <= subject.tolerance,
        f"differs by {worst:.1e} nats" + "".join(ties),
        "Use --set batch=1 where there is one, or --dtype float32.",
    )


def _alone(subject: Subject, name: str, ratio: str, rounded: bool = False) -> torch.Tensor:
    """Scores of all blocks, one at a time; ``rounded``: with embeddings that differ in their last digit."""
    generator = torch.Generator().manual_seed(0)

    def last_digit(_module: nn.Module, _inputs: object, out: torch.Tensor) -> torch.Tensor:
        return out * (1 + torch.finfo(out.dtype).eps * torch.randn(out.shape, generator=generator).to(out))

    embeddings: nn.Module = subject.loaded.model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(last_digit) if rounded else None
    try:
        return torch.cat([subject.score(name, ratio, [piece]).nll for piece in subject.pieces])
    finally:
        if handle is not None:
            handle.remove()


def documents_leave_nothing_behind(subject: Subject) -> Check:
    """Documents score the same in another order."""
    worst = 0.0
    there = [subject.score("sinks", "0.7", [piece]).nll for piece in subject.pieces]
    back = [subject.score("sinks", "0.7", [piece]).nll for piece in reversed(subject.pieces)]
    for one, other in zip(there, reversed(back), strict=True):
        worst = max(worst, float((one - other).abs().max()))
    return Check(
        "documents leave nothing behind", worst <= subject.tolerance, f"differs by {worst:.1e} nats in another order",
        "The model keeps a state of its own between calls, which the harness cannot reset.",
    )


def masked_is_removed(subject: Subject) -> Check:
    """Entries masked in one pass and entries really removed give the same scores."""
    worst, at = 0.0, ""
    for name, ratio in LAYOUTS:
        masked = subject.score(name, ratio, execution="onepass").nll
        for chunk in (7, 64):
            apart = float((subject.score(name, ratio, chunk=chunk).nll - masked).abs().mean())
            worst, at = max((worst, at), (apart, f"{name} in chunks of {chunk}"))
    return Check(
        "masked is removed", worst <= subject.tolerance, f"differs by {worst:.1e} nats ({at})",
        "Results of this model must not be trusted: its attention does not take the masks it is given.",
    )


def removed_is_freed(subject: Subject) -> Check:
    """Removed entries take no memory: bytes of distinct storages against bytes of the entries held."""
    worst = 0.0
    for name, ratio in methods(subject):
        score = subject.score(name, ratio)
        worst = max(worst, score.physical / score.logical)
    return Check(
        "what is removed is freed", 1 <= worst <= 1.05, f"physical / logical bytes {worst:.3f}",
        "Another part of the model holds on to the cache: memory figures would be wrong.",
    )


def time_repeats(subject: Subject) -> Check:
    """Timings of the full cache against itself agree."""
    new, length = 16, subject.block - 16
    model, device = subject.loaded.model, subject.device
    text, prompt = Text(length, subject.block, (0,)), subject.ids()[:1, :length]

    def seconds() -> float:
        found = time_request(
            lambda watch: SessionRequest(
                open_session(model, method_of("full", "0"), text, at_once=True, overhead=watch.overhead),
                model, prompt, new,
            ), clock_of(device), device, None,
        )
        return found.timeline.tpot_s

    with settled():
        seconds()
        pairs = [(seconds(), seconds()) for _ in range(ROUNDS)]
    gap = abs(float(np.median([a / b for a, b in pairs])) - 1)
    most = NOISE[device.type]
    return Check(
        "timings repeat", gap <= most, f"A/A gap {100 * gap:.1f} % (up to {100 * most:.0f} %)",
        "Something else is using this machine, or its clock changes: do not profile on it now.",
    )


def intervals_are_right(subject: Subject) -> Check:
    """The bootstrap interval of a mean agrees with the closed form, on known numbers."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(400, 1))
    low, high = bootstrap_intervals([GroupSums(values)], lambda tables: tables[0].T / len(values), 0)[0]
    closed = float(values.std(ddof=1) / np.sqrt(len(values)))
    apart = abs((high - low) / (2 * _Z) / closed - 1)
    return Check(
        "intervals are right", bool(apart <= 0.05), f"standard error {100 * apart:.1f} % from the closed form",
        "NumPy or SciPy differ from the tested versions: install with -c constraints.txt.",
    )


def _written(subject: Subject, method: str) -> torch.Tensor:
    """Greedy text after half of a block, with nothing removed."""
    half, new, model = subject.block // 2, 16, subject.loaded.model
    with torch.inference_mode(), prepared(model, None, half + new):
        session = open_session(model, method_of(method, "0"), Text(half, half + new, (0,)))
        logits = read_prompt(session, subject.ids()[:1, :half])
        return torch.stack(list(generate(session, logits, greedy(1, new), Sampling())), 1)


def run_check(run: Callable[[Subject], Check], subject: Subject) -> Check:
    """Run a check; if it cannot be made, it has failed: an unsuitable model may fail in any way."""
    try:
        return run(subject)
    except (RuntimeError, ValueError, IndexError, TypeError, UserError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Check(run.__name__.replace("_", " "), False, f"could not be made: {reason}", "Report the model.")


def halves_are_alike(subject: Subject) -> Check:
    """MAUVE of two halves of one collection of texts is close to 1."""
    from kvbench.doctor.mauve import compare_halves  # the encoder is loaded for this one only

    found, ok = compare_halves(str(subject.device))
    return Check(
        "MAUVE finds people like people", ok, found,
        "The sentence encoder or mauve-text differ from the tested versions: install with -c constraints.txt.",
    )


def policies(subject: Subject) -> tuple[tuple[str, str], ...]:
    """The policies to test, with ratios; none if the model does not support policies."""
    return () if subject.facts.policy_refusal else POLICIES


def methods(subject: Subject) -> tuple[tuple[str, str], ...]:
    """All methods to test on the model, of both mechanisms and without an adapter, with ratios."""
    return (*LAYOUTS, *policies(subject))
