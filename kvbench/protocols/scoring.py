"""Scoring a batch of pieces under one method: log-likelihoods, agreement with the full cache,
and what the cache held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from kvbench.inference.opening import Text, open_session, prepared
from kvbench.inference.session import CacheBytes, Session
from kvbench.inference.shared_context import SharedContext, can_share
from kvbench.methods import Method
from kvbench.metrics.agreement import KL_BINS, KL_HIGH, KL_LOW
from kvbench.models.adapter import Adapter
from kvbench.protocols.pieces import Piece

DISTANCES = (0, 1, 2, 3, 4, 8, 16, 32, 64)
"""Lower edges of the bins of distance that the loss is recorded by; the last bin is open."""

POSITIONS = (0, *(base * 2**k for k in range(15) for base in (8, 12)))
"""Lower edges of the bins of position that the loss is recorded by: 0, 8, 12, 16, 24, 32, 48 ..."""


@dataclass(frozen=True)
class Reference:
    """The full cache's predictions for one batch; kept only as long as the batch is measured.

    Attributes:
        probabilities: ``[batch, targets, vocabulary]`` in float32.
        negentropy: ``[batch, targets]``, the sum of p log p.
        best: ``[batch, targets]``, the most probable token.
        nll: ``[batch, targets]``, negative log-likelihood of the targets.
    """

    probabilities: Tensor
    negentropy: Tensor
    best: Tensor
    nll: Tensor

    def rows(self, which: list[int]) -> Reference:
        """The reference for some of the batch's rows."""
        if which == list(range(len(self.best))):
            return self
        index = torch.tensor(which, device=self.best.device)
        fields = (self.probabilities, self.negentropy, self.best, self.nll)
        return Reference(*(t.index_select(0, index) for t in fields))

    @classmethod
    def of(cls, logits: Tensor, nll: Tensor) -> Reference:
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        return cls(p, (p * log_p).sum(-1), logits.argmax(-1), nll)


@dataclass(frozen=True)
class BatchScore:
    """The scores of a method on a batch; tensors are ``[batch, targets]`` in float64 on the CPU.

    Attributes:
        nll: negative log-likelihood of each target, in nats.
        hit: whether the target was the most probable token.
        kl: KL(full || method) at each target; None for the reference itself.
        top1: whether the most probable token is that of the full cache; None for the reference itself.
        loss: nll of each target minus that with the full cache, in nats; None for the reference itself.
        since: int64 ``[targets]``, text tokens since the last place where entries were replaced, -1 before the first;
            None if the method replaces none.
        position: int64 ``[targets]``, text tokens before each target.
        visible: sum over scoring queries of entries visible / text tokens before.
        queries: number of scoring queries with text before them.
        held: entries held after the context was read.
        peak: the most entries ever held.
        logical, physical, full: bytes of the cache after the context was read, for the whole batch.
    """

    nll: Tensor
    hit: Tensor
    kl: Tensor | None
    top1: Tensor | None
    loss: Tensor | None
    since: Tensor | None
    position: Tensor
    visible: float
    queries: int
    held: int
    peak: int
    logical: int
    physical: int
    full: int


def score_pieces(
    model: nn.Module, method: Method, pieces: Sequence[Piece], reference: Reference | None = None, *,
    adapter: Adapter | None = None, execution: str = "streamed", chunk: int = 64, seed: int = 0,
    keep_reference: bool = False, shared: SharedContext | None = None,
) -> tuple[BatchScore, Reference | None]:
    """Read a batch of pieces under a method, and score their targets.

    Args:
        pieces: of equal ``shape``, and such that they can share a session (``rows_together``).
        reference: the full cache's predictions for the batch, to compare with.
        execution, chunk: see :func:`kvbench.inference.opening.open_session`.
        keep_reference: return this batch's predictions, as the reference for other methods.
        shared: the contexts of the batch, which are read for several methods together; None to read them here.
    """
    first = pieces[0]
    with torch.inference_mode(), prepared(model, adapter, len(first.ids)):
        session = open_session(
            model, method, text_of(pieces), adapter=adapter, seed=seed, execution=execution, chunk=chunk
        )
        return score(session, pieces, reference, keep_reference, shared)


def text_of(pieces: Sequence[Piece]) -> Text:
    """The argument of ``open_session`` that describes a batch of pieces."""
    first = pieces[0]
    return Text(
        first.context, first.planned, tuple(piece.layout for piece in pieces), first.context < len(first.ids),
        first.structure,
    )


def score(
    session: Session, pieces: Sequence[Piece], reference: Reference | None = None, keep_reference: bool = False,
    shared: SharedContext | None = None,
) -> tuple[BatchScore, Reference | None]:
    """As :func:`score_pieces`, in a session that has just been opened."""
    first = pieces[0]
    ids = torch.tensor([piece.ids for piece in pieces], device=session.device)
    context, behind = ids[:, : first.context], ids[:, first.context :]
    rows = ScoreCollector(ids[:, first.scored :], first.scored, reference, keep_reference)
    if shared is not None:
        rows.add(first.context - 1, shared.read_into(session))
    else:
        for part in session.prefill(context, first.scored - 1, behind[:, : first.ahead]):
            rows.add(part.start, part.logits)
    kept, sizes = session.kept, session.bytes()
    for part in session.extend(behind[:, :-1]):
        rows.add(first.context + part.start, part.logits)
    queries = torch.arange(max(1, first.scored - 1), len(first.ids) - 1)
    targets = torch.arange(first.scored, len(first.ids))
    visible = float((session.visible(queries) / queries).sum())
    return rows.score(
        session.distance(targets), targets, visible, len(queries), kept, session.peak, sizes
    ), rows.collected()


def share_context(
    model: nn.Module, methods: Sequence[Method], pieces: Sequence[Piece], *, chunk: int, seed: int
) -> tuple[SharedContext | None, list[Method]]:
    """The contexts of a batch of pieces for those of the methods that can share them, and these methods.

    Only what is scored behind the context is shared: there the context is compressed at its end.
    """
    first = pieces[0]
    if first.scored != first.context or first.context >= len(first.ids) or first.ahead or first.is_generated:
        return None, []
    with torch.inference_mode(), prepared(model, None, len(first.ids)):
        opened = [
            (method, open_session(model, method, text_of(pieces), seed=seed, chunk=chunk)) for method in methods
        ]
        sharing = [(method, session) for method, session in opened if can_share(session)]
        if len(sharing) < 2:
            return None, []
        ids = torch.tensor([piece.ids[: first.context] for piece in pieces], device=sharing[0][1].device)
        shared = SharedContext(model, ids, [session for _, session in sharing], chunk)
    return shared, [method for method, _ in sharing]


class ScoreCollector:
    """Collects scores from logits that arrive in consecutive runs."""

    def __init__(self, targets: Tensor, scored: int, reference: Reference | None, keep: bool) -> None:
        self.targets, self.scored, self.reference = targets, scored, reference
        self.nll: list[Tensor] = []
        self.hit: list[Tensor] = []
        self.kl: list[Tensor] = []
        self.top1: list[Tensor] = []
        self.loss: list[Tensor] = []
        self._kept: list[Reference] | None = [] if keep else None

    def add(self, start: int, logits: Tensor) -> None:
        """Score logits ``[batch, m, vocabulary]`` that follow the text tokens start .. start + m - 1."""
        first = start + 1 - self.scored  # the target that the first of these logits predicts
        skip = max(0, -first)
        first += skip
        logits = logits[:, skip : skip + self.targets.shape[1] - first]
        exact = logits.dtype == torch.float32
        logits = logits.float()
        count = logits.shape[1]
        if count <= 0:
            return
        targets = self.targets[:, first : first + count]
        nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        chosen = logits.gather(-1, targets[..., None])[..., 0]
        highest = logits.amax(-1)
        # An argmax is much slower than a maximum, and only needed where half precision makes ties.
        best = None if exact else logits.argmax(-1)
        if not bool(torch.isfinite(nll).all()):
            raise RuntimeError("the model's predictions are not finite (overflow, or damaged weights)")
        self.nll.append(nll.double().cpu())
        self.hit.append((chosen == highest if best is None else best == targets).cpu())
        if self.reference is not None:
            here = slice(first, first + count)
            cross = torch.linalg.vecdot(self.reference.probabilities[:, here], logits - highest[..., None])
            kl = self.reference.negentropy[:, here] - cross + (nll + (chosen - highest))
            self.loss.append((nll - self.reference.nll[:, here]).double().cpu())
            if not bool(torch.isfinite(kl).all()):
                raise RuntimeError("the model's predictions are not comparable (a probability of exactly 0)")
            self.kl.append(kl.clamp(min=0).double().cpu())
            wanted = self.reference.best[:, here]
            theirs = logits.gather(-1, wanted[..., None])[..., 0]
            self.top1.append((theirs == highest if best is None else best == wanted).cpu())
        if self._kept is not None:
            self._kept.append(Reference.of(logits, nll))

    def score(
        self, since: Tensor | None, position: Tensor, visible: float, queries: int, held: int, peak: int,
        sizes: CacheBytes,
    ) -> BatchScore:
        """Combine the collected scores with the measurements of the cache."""
        return BatchScore(
            torch.cat(self.nll, 1), torch.cat(self.hit, 1), torch.cat(self.kl, 1) if self.kl else None,
            torch.cat(self.top1, 1) if self.top1 else None, torch.cat(self.loss, 1) if self.loss else None,
            since, position, visible, queries, held, peak, *sizes,
        )

    def collected(self) -> Reference | None:
        if not self._kept:
            return None
        parts = [(p.probabilities, p.negentropy, p.best, p.nll) for p in self._kept]
        return Reference(*(torch.cat(field, 1) for field in zip(*parts, strict=True)))


def loss_by(
    where: Tensor, bins: tuple[int, ...], nll: Tensor, loss: Tensor
) -> dict[str, tuple[int, float, float]]:
    """By bin of ``where``: number of targets, summed nll and summed loss; negative values are in no bin."""
    place = torch.bucketize(where, torch.tensor(bins), right=True) - 1
    found = {}
    for p in torch.unique(place[where >= 0]).tolist():
        chosen = (place == p) & (where >= 0)
        found[str(bins[p])] = (int(chosen.sum()), float(nll[chosen].sum()), float(loss[chosen].sum()))
    return found


def kl_histogram(values: Tensor) -> dict[str, int]:
    """Counts of per-token KL in logarithmic bins, empty ones left out."""
    span = math.log(KL_HIGH / KL_LOW)
    place = (values.clamp(KL_LOW, KL_HIGH) / KL_LOW).log() / span * KL_BINS
    bins, counts = torch.unique(place.long().clamp(max=KL_BINS - 1), return_counts=True)
    return {str(int(b)): int(c) for b, c in zip(bins, counts, strict=True)}
