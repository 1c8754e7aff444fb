"""Sessions opened by hand: with a layout of one's own, in chunks of any size."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from kvbench.inference.generation import generate, read_prompt
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.memory_session import MemorySession
from kvbench.inference.reader import Reader
from kvbench.inference.sampling import Sampling
from kvbench.inference.session import Scored, Session
from kvbench.methods import Layout, LayoutMethod, make_method


class Read(NamedTuple):
    """A session that has read a text, and the logits on the way."""

    session: LayoutSession
    parts: list[Scored]

    @property
    def logits(self) -> Tensor:
        return torch.cat([part.logits for part in self.parts], 1)


def layout_method(name: str, ratio: str, **options: str) -> LayoutMethod:
    """A method that is known to have a layout."""
    method = make_method(name, Fraction(ratio), options)
    assert isinstance(method, LayoutMethod)
    return method


def session_kind(layout: Layout) -> type[LayoutSession]:
    """The session that reads a layout with entries removed."""
    return MemorySession if layout.written else LayoutSession


def read_all(reader: Reader, ids: Tensor, layout: Layout, chunk: int) -> Read:
    """Read a whole layout with entries really removed."""
    session = session_kind(layout)(reader, layout, layout.n_raw, chunk)
    return Read(session, list(session.prefill(ids)))


def texts(
    session: Session, prefix: Tensor, uniforms: Tensor, ends: tuple[int, ...] = (), sampling: Sampling | None = None
) -> Tensor:
    """int64 ``[rows, tokens]`` written after a prefix, -1 after the end."""
    logits = read_prompt(session, prefix)
    return torch.stack(list(generate(session, logits, uniforms, sampling or Sampling(), ends)), 1)
