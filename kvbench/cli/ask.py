"""``kvbench ask``: what compression does to the answers about one context."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvbench.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from kvbench.api.ask import Asked


def ask(
    question: Annotated[list[str], typer.Option(
        help="A question about the context; repeatable. The context is compressed once, before any is known.")],
    context: Annotated[Path, typer.Option(parser=options.path, help="A file of plain text.")],
    method: Annotated[str, typer.Option(
        help="Compression method, with options of its own as in snapkv:window=16.")] = "snapkv",
    ratio: Annotated[str | None, typer.Option(
        help="Share of cache entries to remove, in [0, 1). \\[default: 0.7]", show_default=False)] = None,
    budget_tokens: options.BudgetTokens = None,
    model: options.Model = None,
    revision: options.Revision = None,
    adapter: Annotated[str | None, typer.Option(
        parser=options.text, help="Adapter folder of a trained method. \\[default: that shipped for kvbench-tiny]",
        show_default=False)] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.", min=1)] = 64,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    json_: options.Json = False,
) -> None:
    """Ask questions about a text, with the full cache and with a compressed one, side by side.

    The text is read once on each side, and compressed before any question is known; entries are really removed.
    Answers are greedy; below them stand entries, bytes and seconds.

    Examples:

      kvbench ask --model Qwen/Qwen3-0.6B --ratio 0.8 --context report.txt --question "Who wrote it?" --question "When?"

      kvbench ask --method streaming-llm --context report.txt --question "Who wrote it?"

    Exit codes: 0 done; 2 the request was wrong.
    """
    import dataclasses

    import torch

    from kvbench.api.ask import ask as asked
    from kvbench.config import load_settings
    from kvbench.errors import UserError
    from kvbench.methods import METHODS
    from kvbench.models.loading import load_model
    from kvbench.models.references import find_adapter, resolve_model
    from kvbench.planning.methods import parse_choice

    settings = load_settings(None).run
    choice = parse_choice(method)
    if ratio is not None and budget_tokens is not None:
        raise UserError("--ratio and --budget-tokens both say how much is kept.", "Leave one of them out.")
    try:
        text = context.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The context {context} cannot be read: {error}.", "Give a file of plain text.") from error
    count = options.checked_threads(threads, settings.threads)
    if count:
        torch.set_num_threads(count)
    reference = resolve_model(model or settings.model, revision)
    kind = METHODS[choice.name]
    folder = adapter or (str(find_adapter(choice.name, reference, {})) if kind.adapter_kinds else None)
    loaded = load_model(
        reference, options.checked_device(device or settings.device), options.checked_dtype(dtype or settings.dtype)
    )
    found = asked(
        loaded.model, loaded.tokenizer, choice.name, text, question, adapter=folder, budget_tokens=budget_tokens,
        ratio=ratio if ratio or budget_tokens or "ratio" not in kind.budgets else "0.7", new_tokens=new_tokens,
        options=choice.options,
    )
    if json_:
        content = {"schema": 1, **dataclasses.asdict(found), "realised": found.realised}
        sys.stdout.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=140)
    console.print(_table(method, found))


def _table(method: str, found: Asked) -> Table:
    """Answers side by side, and what they took."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvbench.parsing import bytes_of

    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, expand=True)
    removed = f"{method}, {found.realised:.2f} removed"
    for column in (f"{found.context_tokens} tokens of context", "full cache", removed):
        table.add_column(column, ratio=1, overflow="fold")
    sides = (found.full, found.compressed)
    for question, *answers in zip(found.questions, *(side.answers for side in sides), strict=True):
        table.add_row(Text(question), *map(Text, answers))
    table.add_row("entries per layer and head", *(f"{side.entries:g}" for side in sides))
    table.add_row("bytes of the cache", *(bytes_of(side.bytes) for side in sides))
    table.add_row("seconds to read the context", *(f"{side.prefill_s:.2f}" for side in sides))
    table.add_row("seconds per answer", *(f"{sum(side.answers_s) / len(side.answers_s):.2f}" for side in sides))
    return table
