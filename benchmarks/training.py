"""A Sentinel training step against a LoRA language-model step of PEFT with the same trainable set.

Run: python -m benchmarks.training
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.pairs import compare
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.gated import attention_linears
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.runtime import Reader
from kvbench.training.adapter_training import AdapterPlan, step_layout, step_loss

SHAPES = ((8, 256), (4, 512))
"""Rows x text tokens; 256 is the block length of the paper's code."""
RANK = 64


def main() -> None:
    """Print text tokens per second of ours over the rival's, for both gates and both objectives."""
    from peft import LoraConfig, get_peft_model

    reference = resolve_model("kvbench-tiny")
    base = load_model(reference, "cpu", "float32").model
    stock = AutoModelForCausalLM.from_pretrained(reference.location, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=list(attention_linears(base)),
        trainable_token_indices=[4094, 4095],
    )
    lora = get_peft_model(stock, config)
    lora.train()
    lora_optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
    for rows, length in SHAPES:
        print(f"training step, {rows} x {length} text tokens, ratio drawn anew; rival: PEFT LoRA, same text")
        ids = torch.randint(0, 4000, (rows, length), generator=torch.Generator().manual_seed(0))

        def rival(ids=ids) -> None:  # type: ignore[no-untyped-def]
            with torch.autocast("cpu", torch.bfloat16):
                loss = lora(input_ids=ids, labels=ids).loss
            update(loss, lora_optimiser)

        for gate, objective, target in (("gated", "text", 0.75), ("plain", "text", 0.75), ("gated", "distil", 0.0)):
            plan = AdapterPlan("sentinel", adapter=gate, objective=objective, length=length, batch=rows, rank=RANK)
            adapter = Adapter.fresh(AdapterCard("sentinel", gate, RANK, float(RANK), 2, "", ""), base).train()
            optimiser = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
            reader, steps = Reader(base, adapter), itertools.count()

            def ours(plan=plan, ids=ids, optimiser=optimiser, reader=reader, steps=steps) -> None:  # type: ignore[no-untyped-def]
                with torch.autocast("cpu", torch.bfloat16):
                    loss = step_loss(plan, base, reader, ids, step_layout(plan, next(steps)))
                update(loss, optimiser)

            with reader.ready():
                note = " (with the teacher's pass; no target)" if objective == "distil" else ""
                compare(f"sentinel, {gate}, objective {objective}{note}", ours, rival, target)


def update(loss: torch.Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()


if __name__ == "__main__":
    main()
