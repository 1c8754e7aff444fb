"""Accumulates the scores of a document's pieces into the record of the document."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from kvbench.data.documents import Document
from kvbench.protocols.pieces import Cut, Piece
from kvbench.protocols.scoring import DISTANCES, POSITIONS, BatchScore, kl_histogram, loss_by
from kvbench.store.records import DocumentRecord

Curve = dict[str, tuple[int, float, float]]
"""Bin -> number of targets, sum of their nll, and sum of their nll minus that of the full cache."""


class DocumentAccumulator:
    """Sums the scores of a document's pieces; ``record`` may be called once all have been added."""

    def __init__(self, document: Document, cut: Cut) -> None:
        self.document, self.cut = document, cut
        self.left = len(cut.pieces)
        self.sums: dict[str, Any] = defaultdict(float)
        self.bins: dict[str, int] = defaultdict(int)
        self.by_distance: Curve = {}
        self.by_position: Curve = {}
        self.has_kl, self.peak = True, 0

    @property
    def complete(self) -> bool:
        return self.left == 0

    def add(self, piece: Piece, score: BatchScore, row: int, rows: int, seconds: float) -> None:
        s = self.sums
        s["tokens"] += score.nll.shape[1]
        s["n_bytes"] += piece.n_bytes
        s["nll"] += float(score.nll[row].sum())
        s["hits"] += int(score.hit[row].sum())
        s["correct"] += int(score.hit[row].all())
        s["raw"] += piece.context
        s["held"] += score.held
        s["visible"] += score.visible
        s["queries"] += score.queries
        s["kv_logical"] += score.logical / rows
        s["kv_physical"] += score.physical / rows
        s["kv_full"] += score.full / rows
        s["seconds"] += seconds / rows
        self.peak = max(self.peak, score.peak)
        if score.kl is None or score.top1 is None:
            self.has_kl = False
        else:
            s["kl"] += float(score.kl[row].sum())
            s["top1"] += int(score.top1[row].sum())
            for place, count in kl_histogram(score.kl[row]).items():
                self.bins[place] += count
        nll = score.nll[row]
        loss = torch.zeros_like(nll) if score.loss is None else score.loss[row]
        _add(self.by_position, loss_by(score.position, POSITIONS, nll, loss))
        if score.loss is not None and score.since is not None:
            _add(self.by_distance, loss_by(score.since, DISTANCES, nll, loss))
        self.left -= 1

    def record(self) -> DocumentRecord:
        s, whole = self.sums, ("tokens", "n_bytes", "hits", "correct", "raw", "held", "queries")
        return DocumentRecord(
            document=self.document.id, group=self.document.group, pieces=len(self.cut.pieces),
            dropped=self.cut.dropped, **{name: int(s[name]) for name in whole},
            nll=s["nll"], visible=s["visible"], peak=self.peak,
            kl=s["kl"] if self.has_kl else None, kl_bins=dict(self.bins) if self.has_kl else None,
            top1=int(s["top1"]) if self.has_kl else None, kv_logical=s["kv_logical"],
            kv_physical=s["kv_physical"], kv_full=s["kv_full"], bin=self.cut.pieces[0].bin,
            seconds=round(s["seconds"], 4), by_distance=self.by_distance or None,
            by_position=self.by_position,
        )


def _add(curve: Curve, more: Curve) -> None:
    for place, (n, nll, loss) in more.items():
        before = curve.get(place, (0, 0.0, 0.0))
        curve[place] = (before[0] + n, before[1] + nll, before[2] + loss)
