"""Options that several commands share, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str | None, typer.Option(
    help="Hub id or folder of any causal language model. [default: kvbench-tiny, embedded]",
    envvar="KVBENCH_MODEL", show_default=False, rich_help_panel="What to run")]
Revision = Annotated[str | None, typer.Option(
    help="Branch, tag or commit on the hub.", rich_help_panel="What to run")]
Seed = Annotated[int | None, typer.Option(
    help="Seed of the layouts and of the resampling. [default: 0]", show_default=False, min=0,
    rich_help_panel="How to run")]
Device = Annotated[str | None, typer.Option(
    help="auto, cpu, cuda or cuda:N.", envvar="KVBENCH_DEVICE", rich_help_panel="How to run")]
Dtype = Annotated[str | None, typer.Option(
    help="auto (float32 on CPU), float32, bfloat16 or float16.", envvar="KVBENCH_DTYPE",
    rich_help_panel="How to run")]
Threads = Annotated[int | None, typer.Option(
    help="CPU threads. [default: all cores]", show_default=False, min=1, envvar="KVBENCH_THREADS",
    rich_help_panel="How to run")]
Set = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE",
    help="An option of a method or protocol, such as chunk=1 or sampler=published; repeatable.",
    rich_help_panel="How to run")]


def checked_threads(given: int | None, default: int) -> int:
    from kvbench.errors import UserError

    if given is not None and given < 1:
        raise UserError(f"--threads {given} is below 1.", "It is the number of CPU threads.")
    return default if given is None else given


def checked_dtype(name: str) -> str:
    from kvbench.config import DTYPES
    from kvbench.errors import unknown

    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return name
