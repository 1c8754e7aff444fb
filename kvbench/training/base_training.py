"""Training a small base model from scratch: the recipe of ``kvbench-tiny``.

A Llama of 5.5 M parameters over a byte-level BPE, trained on running text, copies and recall
sequences (see :mod:`kvbench.training.mixture`). Hidden matrices are trained with Muon at
AdamW's update size, everything else with AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from kvbench.training.loop import (
    Progress,
    Running,
    Stateful,
    rate_factor,
    restore_checkpoint,
    save_checkpoint,
)
from kvbench.training.mixture import Mixture

END, UNUSED = "</s>", "<unused>"


@dataclass(frozen=True)
class BasePlan:
    """All settings that determine the trained weights.

    Attributes:
        steps: optimiser steps.
        batch: sequences per step.
        length: tokens per sequence, and the model's context.
        lr: peak learning rate of both optimisers.
        hidden, layers, heads, kv_heads, feed_forward: the Llama's shape (heads of 64).
        vocabulary: entries of the tokenizer.
        tokenizer, data: fingerprints of the tokenizer's folder (``trained`` if it is trained on the data) and of the
            data files.
    """

    steps: int = 5256
    batch: int = 4
    length: int = 1024
    lr: float = 3e-3
    warmup: int = 100
    decay_from: float = 0.7
    seed: int = 0
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 704
    vocabulary: int = 4096
    autocast: str = "bfloat16"
    tokenizer: str = ""
    data: str = ""


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> Any:
    """Train a byte-level BPE with an end-of-text token and no BOS, as a Hugging Face tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[UNUSED, END], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def new_model(plan: BasePlan, vocabulary: int, eos: int | None) -> nn.Module:
    """The untrained Llama of the plan."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(plan.seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=plan.hidden, intermediate_size=plan.feed_forward,
        num_hidden_layers=plan.layers, num_attention_heads=plan.heads, head_dim=64,
        num_key_value_heads=plan.kv_heads, max_position_embeddings=plan.length,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=eos, rms_norm_eps=1e-6,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model


def train_base(
    plan: BasePlan, model: nn.Module, data: Mixture, out: Path, checkpoint_every: int
) -> Iterator[Progress]:
    """Train ``model`` in place; yields after every step; resumes a checkpoint in ``out``.

    Raises:
        UserError: ``out`` holds the checkpoint of another plan.
    """
    device = next(model.parameters()).device
    model.train()
    hidden = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "head" not in name
    ]
    others = [p for p in model.parameters() if not any(p is h for h in hidden)]
    muon = torch.optim.Muon(
        hidden, lr=plan.lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.0)
    running = Running()
    parts: dict[str, Stateful] = {"model": model, "muon": muon, "adamw": adamw, "running": running}
    for step in range(restore_checkpoint(out, plan, parts), plan.steps):
        started = time.perf_counter()
        factor = rate_factor(step, plan.steps, plan.warmup, plan.decay_from)
        for optimiser in (muon, adamw):
            optimiser.zero_grad(set_to_none=True)
            for group in optimiser.param_groups:
                group["lr"] = plan.lr * factor
        ids = torch.from_numpy(data.batch(step, plan.batch)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.autocast != "none"):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()  # type: ignore[no-untyped-call]
        adamw.step()
        running.add(float(loss.detach()), time.perf_counter() - started)
        if (step + 1) % checkpoint_every == 0:
            save_checkpoint(out, plan, step + 1, parts)
        yield Progress(step + 1, running.loss)
    model.eval()
