"""Questions about one context under many policies and ratios; rival: the full cache, once for each policy.

``python -m benchmarks.sharing [MODEL] [CONTEXTS]``: what a sweep of 8 policies and 4 ratios costs beyond what every
policy would cost if it read each context by itself and answered once.
"""

from __future__ import annotations

import sys
from fractions import Fraction

import torch

from benchmarks.pairs import seconds
from kvbench.execution.answering import answer_group
from kvbench.execution.contexts import Contexts
from kvbench.execution.worker import PreparedCell
from kvbench.execution.writing import Ends
from kvbench.methods import make_method
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import resolve_model
from kvbench.protocols.answer import AnswerProtocol
from kvbench.protocols.pieces import Asked, Cut, Piece
from kvbench.store.records import Cell

POLICIES = ("snapkv", "tova", "h2o", "expected-attention", "chunkkv", "knorm", "keydiff", "streaming-llm")
RATIOS = ("0.3", "0.5", "0.7", "0.9")
CONTEXT, QUESTION, ANSWER = 2048, 30, 20
TARGET = 1.3
"""Most full-cache passes for each policy."""


def cell(name: str, ratio: str) -> PreparedCell:
    """A cell that is measured on nothing but this."""
    made = Cell(
        model="", revision=None, model_hash="", dtype="", device="cpu", task="", task_version=1, data_hash="",
        protocol="answer", execution="streamed", seed=0, method=name, ratio_asked=ratio, role="method", options={},
        adapter=None, adapter_hash=None,
    )
    return PreparedCell(made, make_method(name, Fraction(ratio), {}), None)


def asked(loaded: Loaded, number: int) -> Cut:
    """A random context with a question about it."""
    ids = torch.randint(5, loaded.vocabulary, (CONTEXT + QUESTION,), generator=torch.Generator().manual_seed(number))
    question = Asked(("nothing",), "contains_any", ANSWER, None, CONTEXT)
    return Cut((Piece(str(number), tuple(ids.tolist()), CONTEXT, CONTEXT + QUESTION, 0, 0, asked=question),), 0)


def main() -> None:
    name, contexts, *_ = [*sys.argv[1:], *("kvbench-tiny", "20")[len(sys.argv) - 1 :]]
    loaded = load_model(resolve_model(name), "cpu", "float32")
    protocol = AnswerProtocol(64, "auto", "", False, CONTEXT + QUESTION + ANSWER, False, "end", "apart")
    ends = Ends(loaded, with_line=False)
    ends.ends = set()  # every answer has all its tokens
    full, policies = [cell("full", "0")], [cell(policy, ratio) for policy in POLICIES for ratio in RATIOS]
    times = {"full": 0.0, "policies": 0.0}
    for number in range(-1, int(contexts)):  # the first one warms up
        for what, cells in (("full", full), ("policies", policies)):
            reading = Contexts(loaded.model, protocol, "", asked(loaded, number + 1), cells)

            def answer(reading: Contexts = reading) -> None:
                for group in reading.groups():
                    answer_group(reading, group, ends)

            took = seconds(answer)
            times[what] += took if number >= 0 else 0.0
    ratio = times["policies"] / (len(POLICIES) * times["full"])
    print(
        f"{name}: {len(POLICIES)} policies x {len(RATIOS)} ratios on {contexts} contexts of {CONTEXT}: "
        f"{times['policies']:.1f} s, the full cache {times['full']:.1f} s\n"
        f"time / (full cache x {len(POLICIES)}) {ratio:.2f}, target at most {TARGET:g}: "
        f"{'ok' if ratio <= TARGET else 'MISSED'}"
    )


if __name__ == "__main__":
    main()
