"""What is held of the evidence of a question, of each kind of text, and of each token, after compression."""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.data.samples.sample import EVIDENCE
from kvbench.inference.session import Session
from kvbench.protocols.pieces import Piece

Survival = tuple[tuple[float, ...], ...]
"""A share by layer and KV head."""
Spans = dict[str, tuple[int, float]]
"""Name of a kind of text: number of its tokens, and how many of them have entries (mean over heads)."""


def kept_of(session: Session, piece: Piece) -> tuple[Survival | None, Spans | None]:
    """What is held of the evidence, by layer and head, and of each kind of text, after the context was read."""
    held = session.held_positions()
    asked = piece.asked
    if held is None or asked is None or asked.spans is None:
        return None, None
    kinds: dict[str, Tensor] = {}
    filler = torch.ones(piece.context, dtype=torch.bool)
    for name, start, stop in asked.spans:
        inside = kinds.setdefault(name, torch.zeros(piece.context, dtype=torch.bool))
        inside[start:stop] = True
        filler[start:stop] = False
    kinds["filler"] = filler
    present = torch.stack([_present(layer[0], piece.context) for layer in held])  # [layers, heads, tokens]
    spans = {name: (int(inside.sum()), float(present[..., inside].sum(-1).double().mean()))
             for name, inside in kinds.items() if bool(inside.any())}
    if EVIDENCE not in spans:
        return None, spans
    shares = present[..., kinds[EVIDENCE]].double().mean(-1)
    return tuple(tuple(round(share, 4) for share in layer) for layer in shares.tolist()), spans


def kept_by_token(session: Session, rows: int, tokens: int) -> list[str | None]:
    """How much is held of each of the first tokens, for each row of the batch.

    Returns:
        A digit for each token, from 0 to 9 for none to all of its entries over layers and heads; None if the session
        does not know which tokens its entries are of.
    """
    held = session.held_positions()
    if held is None:
        return [None] * rows
    found: list[str | None] = []
    for row in range(rows):
        present = torch.stack([_present(layer[row], tokens) for layer in held]).double().mean(dim=(0, 1))
        found.append("".join(map(str, (9 * present).ceil().int().tolist())))
    return found


def _present(positions: Tensor, tokens: int) -> Tensor:
    """Whether each token has an entry: bool ``[heads, tokens]`` from positions ``[heads, entries]``, -1 for none."""
    places = positions.cpu().masked_fill(positions.cpu() < 0, tokens)
    seen = torch.zeros(len(places), tokens + 1, dtype=torch.bool)
    return seen.scatter_(-1, places, True)[:, :tokens]
