"""Training steps against a LoRA language-model step of PEFT with the same trainable set, and CCM in
one pass against the recurrence that it stands for.

Run: python -m benchmarks.training
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks.pairs import compare
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS, make_layout, make_method
from kvbench.methods.base import Method
from kvbench.methods.layouts.layout import TextStructure
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.loading import load_model
from kvbench.models.lora import attention_linears
from kvbench.models.references import resolve_model
from kvbench.training.adapter_training import AdapterPlan, step_loss, step_sample, text_loss

SHAPES = ((8, 256), (4, 512))
"""Rows x text tokens; 256 is the block length of the paper's code."""
RANK = 64
STEPS = (
    ("sentinel", "gated", "text", 0.75), ("sentinel", "plain", "text", 0.75), ("ccm-concat", "gated", "text", 0.75),
    ("ccm-merge", "gated", "text", 0.75), ("sentinel", "gated", "distil", 0.0),
)
RECURRENCE = ((1, 64, 1.2), (1, 16, 2.5), (4, 64, 0.0), (4, 16, 0.0))
"""Rows, tokens of a chunk, target."""


def main() -> None:
    """Print text tokens per second of ours over the rival's."""
    reference = resolve_model("kvbench-tiny")
    base = load_model(reference, "cpu", "float32").model
    against_lora(base, reference.location)
    against_recurrence(base)


def against_lora(base: nn.Module, location: str) -> None:
    from peft import LoraConfig, get_peft_model

    stock = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules=list(attention_linears(base)),
        trainable_token_indices=[4094, 4095],
    )
    lora = get_peft_model(stock, config)
    lora.train()
    lora_optimiser = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)
    for rows, length in SHAPES:
        print(f"training step, {rows} x {length} text tokens, layout drawn anew; rival: PEFT LoRA, same text")
        ids = torch.randint(0, 4000, (rows, length), generator=torch.Generator().manual_seed(0))

        def rival(ids: Tensor = ids) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = lora(input_ids=ids, labels=ids).loss
            update(loss, lora_optimiser)

        for method, gate, objective, target in STEPS:
            plan = AdapterPlan(method, adapter=gate, objective=objective, length=length, batch=rows, rank=RANK)
            adapter, optimiser = fresh(METHODS[method](), gate, base)
            reader, steps = Reader(base, adapter), itertools.count()

            def ours(
                plan: AdapterPlan = plan, ids: Tensor = ids, optimiser: Any = optimiser, reader: Reader = reader,
                steps: Any = steps,
            ) -> None:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = step_loss(plan, base, reader, ids, step_sample(plan, next(steps)))
                update(loss, optimiser)

            with reader.ready():
                note = " (with the teacher's pass; no target)" if objective == "distil" else ""
                compare(f"{method}, {gate}, objective {objective}{note}", ours, rival, target)


def against_recurrence(base: nn.Module) -> None:
    """The same chunks, tokens and loss, read one after another with the memory as the only past."""
    length, n_comp = 512, 2
    for rows, chunk, target in RECURRENCE:
        ids = torch.randint(0, 4000, (rows, length), generator=torch.Generator().manual_seed(0))
        method = make_method("ccm-concat", METHODS["ccm-concat"]().ratio, {"n_comp": str(n_comp)})
        layout = make_layout(method, length, 0, 0, TextStructure((chunk,) * (length // chunk)))
        adapter, optimiser = fresh(method, "gated", base)
        reader = Reader(base, adapter)

        def ours(
            ids: Tensor = ids, optimiser: Any = optimiser, reader: Reader = reader, layout: Any = layout
        ) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = text_loss(reader.one_pass(ids, layout, slice(0, -1)), ids)
            update(loss, optimiser)

        def rival(
            ids: Tensor = ids, optimiser: Any = optimiser, adapter: Adapter = adapter, chunk: int = chunk
        ) -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss = recurrence(base, adapter, ids, chunk, n_comp)
            update(loss, optimiser)

        with reader.ready(), torch.no_grad():
            exact = float(text_loss(reader.one_pass(ids, layout, slice(0, -1)), ids))
            assert abs(exact - float(recurrence(base, adapter, ids, chunk, n_comp))) < 1e-4
        with reader.ready():
            note = "" if target else " (no target)"
            compare(f"CCM in one pass, {rows} x {length}, chunks of {chunk}{note}", ours, rival, target)


def recurrence(base: nn.Module, adapter: Adapter, ids: Tensor, chunk: int, n_comp: int) -> Tensor:
    """The loss of CCM-concat segment by segment: each sees the memory of those before it."""
    text = base.get_input_embeddings()(ids)  # type: ignore[operator]
    comp = adapter.rows.expand(len(ids), -1, -1)
    memory: list[tuple[Tensor, Tensor]] = []
    losses = []
    for start in range(0, ids.shape[1], chunk):
        stop = min(start + chunk, ids.shape[1])
        fed = torch.cat([text[:, start:stop], comp], 1)
        cache = DynamicCache()
        for i, (keys, values) in enumerate(memory):
            cache.update(keys, values, i)
        held = memory[0][0].shape[2] if memory else 0
        size = fed.shape[1]
        mask = torch.ones(size, held + size, dtype=torch.bool).tril(held)[None, None]
        place = torch.cat([torch.arange(start, stop), torch.arange(stop, stop + n_comp)])
        adapter.open_gate(torch.arange(size - n_comp, size))
        out = base(
            inputs_embeds=fed, attention_mask=mask, position_ids=place[None], past_key_values=cache, use_cache=True
        )
        memory = [
            (
                torch.cat([layer.keys[:, :, :held], layer.keys[:, :, -n_comp:]], 2),
                torch.cat([layer.values[:, :, :held], layer.values[:, :, -n_comp:]], 2),
            )
            for layer in cache.layers
        ]
        wanted = ids[:, start + 1 : stop + 1]
        logits = out.logits[:, : wanted.shape[1]]
        losses.append(functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="sum"))
    return torch.stack(losses).sum() / (ids.numel() - len(ids))


def fresh(method: Method, gate: str, base: nn.Module) -> tuple[Adapter, Any]:
    card = AdapterCard(method.name, gate, RANK, float(RANK), method.n_rows, "", "")
    adapter = Adapter.fresh(card, base).train()
    return adapter, torch.optim.AdamW(adapter.parameters(), lr=1e-3)


def update(loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()


if __name__ == "__main__":
    main()
