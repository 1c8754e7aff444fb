"""Every layout method with options, and what it holds."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from kvbench.methods import METHODS, LayoutMethod, kept
from tests.helpers.sessions import layout_method

N = 96
STREAM = {"budget": "40", "memory": "4", "compress": "16"}


class Case(NamedTuple):
    """A method with options, and the entries that it holds after N tokens."""

    name: str
    ratio: str
    options: dict[str, str]
    held: int | Callable[[Fraction], int] | None = None

    @property
    def method(self) -> LayoutMethod:
        return layout_method(self.name, self.ratio, **self.options)


def in_chunks(n_comp: int, chunk: int) -> int:
    """n_comp entries per whole chunk; the rest is closed too if that saves entries."""
    rest = N % chunk
    return n_comp * (N // chunk) + min(rest, n_comp)


CASES = [
    Case("full", "0", {}, N), Case("none", "0", {}, N % 32), Case("adapted", "0", {}, N),
    *(
        Case(name, ratio, {}, kept(N, Fraction(ratio)))
        for name in ("window", "local", "scattered", "sentinel", "strided", "beacon", "local-tuned", "scattered-tuned")
        for ratio in ("0.3", "0.7", "0.9")
    ),
    *(
        Case(name, ratio, {}, max(5, kept(N, Fraction(ratio))))
        for name in ("sinks", "sinks-tuned") for ratio in ("0.3", "0.9")
    ),
    *(Case("sentinel", "0.5", {"recent": w}, 48) for w in ("1", "16", "40")),
    Case("sentinel", "0.7", {"predict_from_cr": "true"}, 29), Case("sentinel", "0.7", {"span": "6"}, 29),
    Case("sentinel", "0.7", {"closing": "3"}, 29), Case("sentinel", "0.7", {"sees": "previous", "sinks": "4"}, 29),
    Case("sentinel", "0.5", {"closing": "2", "sees": "summaries", "recent": "16"}, 48),
    Case("sentinel", "0.7", {"closing": "2", "predict_from_cr": "true"}, 29),
    *(
        Case("ccm-concat", ratio, {"n_comp": n}, in_chunks(int(n), chunk))
        for n, ratio, chunk in (("1", "0.9", 10), ("2", "0.8", 10), ("4", "0.5", 8), ("8", "0.5", 16))
    ),
    Case("ccm-concat", "0.8", {"recurrent": "false"}, in_chunks(2, 10)),
    Case("ccm-concat", "0", STREAM, 36),
    *(Case("ccm-merge", "0", {"segment": "20", "n_comp": n}, int(n)) for n in ("1", "2", "4", "8")),
    Case("ccm-merge", "0", {"segment": "16", "merge": "ema"}, 2),
    Case("ccm-merge", "0", {"segment": "16", "merge_at": "unrotated"}, 2),
    Case("ccm-merge", "0", {"segment": "16", "merge": "ema", "merge_at": "unrotated", "recurrent": "false"}, 2),
    Case("ccm-merge", "0", {**STREAM, "memory": "2"}, 34),
    Case("ccm-merge", "0", {**STREAM, "memory": "2", "merge_at": "unrotated"}, 34),
    Case("gist", "0.8", {}, in_chunks(2, 10)), Case("gist", "0", {"mode": "fixed"}, 2),
    Case("meanpool", "0.8", {}, in_chunks(2, 10)), Case("meanpool", "0.8", {"count": "true"}, in_chunks(2, 10)),
    Case("ccm-merge", "0", {"segment": "16", "count": "true"}, 2),
    Case("ccm-merge", "0", {**STREAM, "memory": "2", "merge": "ema", "count": "true"}, 34),
    Case("meanpool", "0.8", {"merge_at": "unrotated", "n_comp": "3"}, in_chunks(3, 15)),
    Case("pic", "0.8", {}, in_chunks(2, 10)), Case("pic", "0.8", {"sees": "memory"}, in_chunks(2, 10)),
    Case("prompt", "0.8", {}, in_chunks(2, 10)), Case("prompt", "0", STREAM, 36),
    Case("prompt", "0.5", {"n_comp": "8", "place": "spread"}, 48),
    Case("prompt", "0.75", {"n_comp": "3", "place": "own"}, in_chunks(3, 12)),
    Case("sinks", "0", STREAM, 36),
    Case("unigist", "0.3", {}, 68), Case("unigist", "0.7", {"window": "8", "sinks": "2"}, 29),
    Case("unigist", "0.9", {"window": "5"}, 10), Case("unigist-tuned", "0.5", {"window": "16"}, 48),
    Case("beacon", "0.6", {"window": "20", "sinks": "3"}, 39),
    Case("beacon", "0.6", {"positions": "absolute", "sinks": "0"}, 39),
    *(Case(name, "0.5", {}, 48) for name in ("icae", "comprexit", "ic-former", "autocompressors")),
    *(Case(name, "0.8", {"n_comp": "4"}, in_chunks(4, 20)) for name in ("icae", "comprexit", "ic-former")),
    Case("icae", "0.75", {"n_comp": "3", "place": "own"}, in_chunks(3, 12)),
    Case("icae", "0.75", {"n_comp": "3", "place": "end", "raw": "true"}, in_chunks(3, 12)),
    Case("ic-former", "0.75", {"n_comp": "3", "layers": "1", "encode": "true"}, in_chunks(3, 12)),
    Case("autocompressors", "0.8", {"n_comp": "4", "place": "own"}, in_chunks(4, 20)),
    *(Case(name, "0", {"segment": "20", "n_comp": "4"}, 4) for name in ("rmt", "gradual-forgetting")),
    Case("rmt", "0", {"segment": "36", "n_comp": "4", "place": "own"}, 4),
    Case("output-memory", "0.7", {}, 29),
    Case("strided", "0.7", {"share": "20", "sinks": "3"}, 29), Case("strided-tuned", "0.5", {"share": "0"}, 48),
]
CASES += [  # methods of other packages
    Case(name, "0.5", {}) for name, kind in METHODS.items()
    if name not in {case.name for case in CASES} and issubclass(kind, LayoutMethod)  # test_policies.py
]


def label(case: Case) -> str:
    return "-".join([case.name, case.ratio, *(f"{k}={v}" for k, v in case.options.items())])
