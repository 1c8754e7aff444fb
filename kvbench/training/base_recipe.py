"""Training a base model from files to a folder: check, train, and write model, tokenizer and card."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import kvbench
from kvbench.data.files import KNOWN
from kvbench.data.rows import TEXT, read_rows
from kvbench.errors import UserError
from kvbench.models.device import pick_device
from kvbench.models.fingerprint import fingerprint
from kvbench.training.base_training import BasePlan, new_model, train_base, train_tokenizer
from kvbench.training.data import encode_in_context, load_stream
from kvbench.training.folder import check_out, make_folder
from kvbench.training.loop import CHECKPOINT, Follow
from kvbench.training.mixture import Mixture
from kvbench.training.team import processes


def run_base_training(
    plan: BasePlan, data: tuple[Path, ...], out: Path, tokenizer_folder: Path | None, device: str,
    threads: int, every: int, follow: Follow, fresh: bool = False, column: str = TEXT,
) -> Path:
    """Train and write a base model with its tokenizer.

    Raises:
        UserError: the request cannot be carried out.
    """
    from transformers import AutoTokenizer

    check_out(out, "config.json")
    if processes() > 1:
        raise UserError("kvbench train base runs in one process.", "Start it without accelerate launch.")
    if threads:
        torch.set_num_threads(threads)
    where = pick_device(device)
    if not data:
        raise UserError("Training needs text.", f"Give --data FILE: {KNOWN}.")
    if tokenizer_folder is not None:
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(tokenizer_folder))
        except (OSError, ValueError) as error:
            raise UserError(f"There is no tokenizer in {tokenizer_folder}: {error}.") from error
    else:
        texts = (row["text"] for row in read_rows(data[0], column))
        tokenizer = train_tokenizer(_at_most(texts, 25_000_000), plan.vocabulary, plan.length)
    stream = load_stream(data, tokenizer, 2 * plan.length, column)
    known = fingerprint(tokenizer_folder) if tokenizer_folder is not None else "trained"
    plan = replace(plan, tokenizer=known, data=stream.hash)
    model = new_model(plan, len(tokenizer), tokenizer.eos_token_id).to(where)
    mixture = Mixture(stream.ids, lambda text: encode_in_context(tokenizer, text), plan.length, plan.seed)
    make_folder(out, fresh)
    follow(train_base(plan, model, mixture, out, every), plan.steps, lambda step, loss: None, every)
    model.to(torch.bfloat16).save_pretrained(out)  # type: ignore[operator]
    tokenizer.save_pretrained(out)
    card = {**dataclasses.asdict(plan), "data": list(stream.sources), "kvbench": kvbench.__version__}
    (out / "training.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (out / CHECKPOINT).unlink(missing_ok=True)
    return out


def _at_most(texts: Iterator[str], characters: int) -> Iterator[str]:
    count = 0
    for text in texts:
        if count >= characters:
            return
        count += len(text)
        yield text
