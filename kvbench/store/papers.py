"""Publications of methods, tasks and metrics (``papers.toml``), for bibliographies; needs no PyTorch."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from kvbench.store.faults import loaded_elsewhere

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
        bibtex: the entry as a method of another package gives it; empty for ours, which are made of the fields.
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
    bibtex: str = ""


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
    """Publications of methods, tasks and metrics, given by name; those that methods of other packages give last."""
    methods, tasks, metrics = list(dict.fromkeys(methods)), set(tasks), set(metrics)
    found = {
        paper.key: paper for paper in papers()
        if set(methods) & set(paper.methods) or metrics & set(paper.metrics)
        or any(fnmatchcase(task, pattern) for task in tasks for pattern in paper.tasks)
    }
    ours = {method for paper in found.values() for method in paper.methods}
    given = [paper for method in methods if method not in ours and (paper := _paper_elsewhere(method)) is not None]
    known = {paper.key: paper for paper in papers()}
    return tuple((found | {paper.key: known.get(paper.key, paper) for paper in given}).values())


def _paper_elsewhere(method: str) -> Paper | None:
    """The publication that a method of another package gives as ``bibtex``; None if there is none, or no such entry."""
    entry = str(getattr(loaded_elsewhere(method), "bibtex", "")).strip()
    key = re.match(r"@\w+\s*\{\s*([^\s,{}]+)\s*,", entry)
    return None if key is None else Paper(key=key[1], title="", authors=(), methods=(method,), bibtex=entry)
