"""Options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvbench.cli import completion


def text(given: str) -> str:
    """Refuse an empty string, which as a path would be the current folder."""
    if not given:
        raise typer.BadParameter("it is empty; for the current folder, give a dot.")
    return given


def shared(model: str, share: str | None) -> str:
    """The name of a model whose layers share entries as asked.

    Raises:
        UserError: it is a shape, or its name says otherwise.
    """
    from kvbench.errors import UserError
    from kvbench.models.sharing import MARK

    if share and model.startswith("shape:"):
        raise UserError(f"--share is for models with weights, and {model} has none.", "Leave --share out.")
    if not share or model.endswith(f"{MARK}{share}"):
        return model
    if MARK in model:
        raise UserError(f"--model {model} and --share {share} differ.", "Leave one of them out.")
    return f"{model}{MARK}{share}"


def path(given: str) -> Path:
    return Path(text(given))


Model = Annotated[str | None, typer.Option(
    parser=text, autocompletion=completion.model,
    help="Hub id, folder or .gguf file of any causal language model. \\[default: kvbench-tiny, embedded]",
    envvar="KVBENCH_MODEL", show_default=False, rich_help_panel="What to run")]
Share = Annotated[str | None, typer.Option(
    parser=text, metavar="PATTERN",
    help="Layers that read the entries of another layer: pairs, yoco, the source of each as in 0_0_2_2, or a folder "
         "that was trained so. \\[default: none]", show_default=False, rich_help_panel="What to run")]
Method = Annotated[list[str] | None, typer.Option(
    autocompletion=completion.method,
    help="Compression method; repeatable, with options of its own as in snapkv:window=16,pool=mean (kvbench list "
         "snapkv shows them). \\[default: sentinel]", rich_help_panel="What to run", show_default=False)]
Ratio = Annotated[list[str] | None, typer.Option(
    help="Share of cache entries to remove, in [0, 1): 0.7 keeps 30 %; repeatable. \\[default: 0.7]",
    rich_help_panel="What to run", show_default=False)]
BudgetTokens = Annotated[int | None, typer.Option(
    help="Entries to keep per layer and head, whatever the length of the text, instead of a ratio.",
    rich_help_panel="What to run")]
BudgetBytes = Annotated[str | None, typer.Option(
    help="Bytes of a text's cache to keep instead of a ratio, such as 64KiB; scales and windows count.",
    rich_help_panel="What to run")]
EqualBytes = Annotated[bool, typer.Option(
    "--equal-bytes", help="Ratios are of bytes: kivi takes the bits that meet them, scales and windows counted.",
    rich_help_panel="What to run")]
Task = Annotated[list[str] | None, typer.Option(
    autocompletion=completion.task,
    help="Task, a group of tasks such as ruler, or a task file of your own; repeatable. \\[default: minidocs, recall "
    "and minidocs-gen]",
    rich_help_panel="What to run", show_default=False)]
Data = Annotated[Path | None, typer.Option(
    parser=path,
    help="Your own corpus for the task: rows of .jsonl, .json, .csv, .tsv or .parquet, a .txt, each also packed "
    "(.gz, .bz2, .xz, .zst), or a folder of .txt.", rich_help_panel="What to run")]
Column = Annotated[str, typer.Option(
    help="What the text is called in --data, or in a data set on the hub; plain text has no columns.",
    rich_help_panel="What to run")]
Adapter = Annotated[list[str] | None, typer.Option(
    parser=text, help="Adapter folder of a trained method; repeatable. \\[default: those shipped for kvbench-tiny]",
    show_default=False, rich_help_panel="What to run")]
Protocol = Annotated[str | None, typer.Option(
    autocompletion=completion.protocol,
    help="block, stream, prefix, online, generate, decode or answer. \\[default: the task's own]",
    rich_help_panel="How to run")]
Execution = Annotated[str, typer.Option(
    help="streamed (entries really removed) or onepass (masked, nothing freed).", rich_help_panel="How to run")]
Limit = Annotated[int | None, typer.Option(
    help="Documents per task. \\[default: all]", show_default=False, rich_help_panel="How to run")]
TimeLimit = Annotated[str | None, typer.Option(
    metavar="DURATION",
    help="Measure as many documents per task as fit, such as 30m or 2h; the same command again adds more. "
    "\\[default: none]", show_default=False, rich_help_panel="How to run")]
Baselines = Annotated[bool, typer.Option(
    "--baselines/--no-baselines", help="Add none, local, scattered and sinks beside full.",
    rich_help_panel="How to run")]
Scorer = Annotated[str | None, typer.Option(
    parser=text,
    help="Language model that gen_ppl is measured with: hub id or folder. \\[default: the uncompressed model]",
    show_default=False, rich_help_panel="Judging written text")]
MauveFeatures = Annotated[str | None, typer.Option(
    parser=text, help="What MAUVE compares: last states of this causal language model, such as gpt2-large. "
    "\\[default: sentence embeddings]", show_default=False, rich_help_panel="Judging written text")]
Metric = Annotated[list[str] | None, typer.Option(
    autocompletion=completion.metric_of_text,
    help="Metric of written text to measure, such as chrf; repeatable. \\[default: all; mauve from 200 documents "
    "on]", show_default=False, rich_help_panel="Judging written text")]
Fresh = Annotated[bool, typer.Option(
    "--fresh", help="Measure again what is already there.", rich_help_panel="Output")]
Json = Annotated[bool, typer.Option(
    "--json", help="Print one JSON document on stdout instead of tables.", rich_help_panel="Output")]
Wide = Annotated[bool, typer.Option(
    "--wide", help="Print all columns: intervals, realised ratios, peaks, bins, and what was measured how.",
    rich_help_panel="Output")]
DryRun = Annotated[bool, typer.Option(
    "--dry-run", help="Print the cells, what they cost, and the folder; measure nothing.", rich_help_panel="Output")]
Config = Annotated[Path | None, typer.Option(
    parser=path, help="Settings file. \\[default: ./kvbench.toml if there is one]", show_default=False,
    rich_help_panel="Output")]
Revision = Annotated[str | None, typer.Option(
    help="Branch, tag or commit on the hub.", rich_help_panel="What to run")]
Seed = Annotated[int | None, typer.Option(
    help="Seed of the layouts and of the resampling. \\[default: 0]", show_default=False, min=0,
    rich_help_panel="How to run")]
Device = Annotated[str | None, typer.Option(
    help="auto, cpu, cuda or cuda:N.", envvar="KVBENCH_DEVICE", rich_help_panel="How to run")]
Dtype = Annotated[str | None, typer.Option(
    help="auto (float32 on CPU), float32, bfloat16 or float16.", envvar="KVBENCH_DTYPE",
    rich_help_panel="How to run")]
Threads = Annotated[int | None, typer.Option(
    help="CPU threads. \\[default: all cores]", show_default=False, min=1, envvar="KVBENCH_THREADS",
    rich_help_panel="How to run")]
Set = Annotated[list[str] | None, typer.Option(
    "--set", metavar="KEY=VALUE",
    help="An option of every method and protocol that has it, such as chunk=1 or step=8; repeatable.",
    rich_help_panel="How to run")]


def checked_limit(given: int | None, default: int) -> int:
    from kvbench.errors import UserError

    if given is not None and given < 1:
        raise UserError(f"--limit {given} is below 1.", "It is the number of documents per task.")
    return default if given is None else given


def checked_time_limit(given: str | None) -> float | None:
    from kvbench.parsing import parse_duration

    return None if given is None else parse_duration(given, "--time-limit")


def checked_seed(given: int | None, default: int) -> int:
    from kvbench.errors import UserError

    if given is not None and given < 0:
        raise UserError(f"--seed {given} is negative.", "Give a whole number of at least 0.")
    return default if given is None else given


def checked_device(name: str) -> str:
    from kvbench.models.device import pick_device

    pick_device(name)
    return name


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
