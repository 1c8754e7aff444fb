"""BibTeX of what a run measured: its methods, tasks, metrics, and kvbench itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kvbench.reporting.tables.latex import accented
from kvbench.store.papers import KVBENCH, Paper, papers, papers_of


def bibliography(
    methods: Iterable[str], tasks: Iterable[str], metrics: Iterable[str], versions: Sequence[str] = ()
) -> str:
    """Entries of everything that is named, and of kvbench; methods without one are named in a comment.

    Args:
        versions: of the kvbench that measured.
    """
    methods = list(dict.fromkeys(methods))
    wanted = papers_of(methods, tasks, metrics)
    own = [paper for paper in papers() if paper.key == KVBENCH and paper not in wanted]
    unknown = [method for method in methods if not papers_of([method])]
    lines = [f"% No reference is known here for the method {accented(method)}." for method in unknown]
    return "\n\n".join([*lines, *(_entry(paper, versions) for paper in (*own, *wanted))]) + "\n"


def _entry(paper: Paper, versions: Sequence[str]) -> str:
    if paper.bibtex:
        return accented(paper.bibtex)
    fields = {"title": f"{{{paper.title}}}", "author": " and ".join(paper.authors)}
    kind = "misc"
    if paper.venue:
        kind, fields["booktitle"] = "inproceedings", paper.venue
    elif paper.arxiv:
        kind, fields["journal"] = "article", f"arXiv preprint arXiv:{paper.arxiv}"
    if paper.year:
        fields["year"] = str(paper.year)
    if paper.arxiv:
        fields |= {"eprint": paper.arxiv, "archiveprefix": "arXiv"}
    if paper.key == KVBENCH and versions:
        fields["note"] = f"Version {', '.join(versions)}"
    width = max(map(len, fields))
    body = ",\n".join(f"  {name:{width}} = {{{accented(value)}}}" for name, value in fields.items())
    return f"@{kind}{{{paper.key},\n{body}\n}}"
