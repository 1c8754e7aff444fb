"""transformers' ``generate`` inside ``kvbench.compress``; rival: the same call without it."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.pairs import compare
from kvbench import compress
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model

PROMPT, NEW = 4096, 64
SETTINGS: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 1 << 30, "pad_token_id": 0}


def main() -> None:
    loaded = load_model(resolve_model("kvbench-tiny"), "cpu", "float32")
    model: Any = loaded.model
    for batch in (1, 4):
        ids = torch.randint(5, loaded.vocabulary, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)

        def stock(ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> Any:
            return model.generate(ids, attention_mask=mask, **SETTINGS)

        print(f"generate, {NEW} tokens after {PROMPT}, batch {batch}; rival: without compress")
        for method, ratio, target in (("full", None, 1.0), ("snapkv", 0.7, 0.0), ("sinks", 0.7, 0.0)):
            def ours(method: str = method, ratio: float | None = ratio) -> Any:
                with compress(model, method, ratio):
                    return stock()

            note = "" if target else " (no target)"
            compare(f"{method}{note}", ours, stock, target, repeats=15)


if __name__ == "__main__":
    main()
