"""A published number, measured again: GPT-2 large on WikiText-2, in disjoint windows of 1024 tokens.

https://huggingface.co/docs/transformers/perplexity gives 19.44 for this way of cutting (the texts of all rows joined by
an empty line, the first token of each window not scored).
"""

from __future__ import annotations

import math

from kvbench.data.rows import hub_rows
from kvbench.data.tasks import load_task
from kvbench.doctor.checks import Check
from kvbench.doctor.examined import Subject
from kvbench.methods import make_method, parse_ratio
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import resolve_model
from kvbench.protocols.pieces import Piece
from kvbench.protocols.scoring import score_pieces

MODEL, PUBLISHED, WITHIN = "openai-community/gpt2-large", 19.44, 0.05
WINDOW = 1024


def published_is_met(subject: Subject) -> Check:
    """The perplexity equals the published one. Needs the hub, or its cache, and half an hour on a CPU.

    Raises:
        UserError: the model or the texts cannot be loaded.
    """
    spec = load_task("wikitext2").corpus
    rows = hub_rows(spec)
    loaded = load_model(resolve_model(MODEL), str(subject.device), "float32")
    found = windowed_perplexity(loaded, "\n\n".join(row["text"] for row in rows), WINDOW)
    return Check(
        "a published number is met", abs(found - PUBLISHED) <= WITHIN,
        f"GPT-2 large on WikiText-2: {found:.2f} (published {PUBLISHED}, within {WITHIN})",
        "The tokenizer, the texts or the kernel differ from those of the published number: look at the versions.",
    )


def windowed_perplexity(loaded: Loaded, text: str, window: int) -> float:
    """Perplexity of a text in disjoint windows under the full cache; the first token of each is not scored."""
    ids = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
    nll, count = 0.0, 0
    for start in range(0, len(ids) - 1, window):
        part = tuple(ids[start : start + window])
        if len(part) < 2:
            continue
        piece = Piece("text", part, len(part), 1, 0, 0)
        score, _ = score_pieces(loaded.model, make_method("full", parse_ratio("0")), [piece], chunk=window)
        nll += float(score.nll.sum())
        count += score.nll.numel()
    return math.exp(nll / count)
