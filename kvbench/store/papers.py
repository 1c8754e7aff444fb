"""Publications of methods, tasks and metrics (``papers.toml``), for bibliographies; needs no PyTorch."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

KVBENCH = "kvbench"
"""Key of the entry of kvbench itself, which methods without a paper of their own refer to."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A publication.

    Attributes:
        key: key of the entry, as in ``\\cite{key}``.
        authors: ``Family, Given``, in order; ``others`` last where more are not known.
        arxiv: identifier on arXiv; ``venue``: conference or journal with its year. Either may be missing.
        methods, metrics: names of what comes from it; ``tasks`` likewise, as patterns of file names.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int | None = None
    arxiv: str | None = None
    venue: str | None = None
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()


@cache
def papers() -> tuple[Paper, ...]:
    """All publications, in the order of the file."""
    text = files("kvbench.store").joinpath("papers.toml").read_text(encoding="utf-8")
    return tuple(_paper(key, fields) for key, fields in tomllib.loads(text).items())


def _paper(key: str, fields: dict[str, Any]) -> Paper:
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
    return Paper(key=key, **given)


def papers_of(
    methods: Iterable[str] = (), tasks: Iterable[str] = (), metrics: Iterable[str] = ()
) -> tuple[Paper, ...]:
    """Publications of methods, tasks and metrics, given by name; empty for those of other packages."""
    methods, tasks, metrics = set(methods), set(tasks), set(metrics)
    return tuple(
        paper for paper in papers()
        if methods & set(paper.methods) or metrics & set(paper.metrics)
        or any(fnmatchcase(task, pattern) for task in tasks for pattern in paper.tasks)
    )
