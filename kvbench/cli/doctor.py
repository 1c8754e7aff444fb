"""``kvbench doctor``: do the guarantees hold on this model and machine?"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from kvbench.cli import options


def doctor(
    model: options.Model = None,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    published: Annotated[bool, typer.Option(
        "--published", help="Also measure GPT-2 large on WikiText-2 and compare it with the published 19.44: needs "
        "the hub, and half an hour on a CPU.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Check on your own model and machine what kvbench relies on, a line each.

    That nothing removed is the full cache, that every target is scored once, that batches and the
    order of documents change nothing, that masked is removed and what is removed is freed, that
    intervals are right, MAUVE finds people's texts like people's texts, and timings repeat. About a
    minute for the embedded model.

    Examples:

      kvbench doctor

      kvbench doctor --model Qwen/Qwen3-0.6B --dtype bfloat16

    Exit codes: 0 all hold; 1 one does not; 2 the model cannot be loaded.
    """
    import dataclasses

    import torch
    from rich.console import Console

    from kvbench.config import load_settings
    from kvbench.doctor import CHECKS, make_subject, run_check

    settings = load_settings(None).run
    count = options.checked_threads(threads, settings.threads)
    if count:
        torch.set_num_threads(count)
    name = model or settings.model
    console = Console(stderr=json_)
    subject = make_subject(
        name, revision, device or settings.device, options.checked_dtype(dtype or settings.dtype)
    )
    console.print(
        f"{name}: {len(subject.pieces)} blocks of {subject.block} tokens on {subject.device}", highlight=False
    )
    found = []
    wanted = list(CHECKS)
    if published:
        from kvbench.doctor.published import published_is_met

        wanted.insert(0, published_is_met)
    for run in wanted:
        check = run_check(run, subject)
        found.append(check)
        mark = "[green]ok[/]    " if check.ok else "[red]FAILED[/]"
        console.print(f"{mark}  {check.name}: {check.found}", highlight=False, soft_wrap=True)
        if not check.ok:
            console.print(f"        {check.advice}", highlight=False, soft_wrap=True)
    ok = all(check.ok for check in found)
    if json_:
        checks = [dataclasses.asdict(check) for check in found]
        sys.stdout.write(json.dumps({"schema": 1, "model": name, "ok": ok, "checks": checks}, indent=1) + "\n")
    raise typer.Exit(0 if ok else 1)
