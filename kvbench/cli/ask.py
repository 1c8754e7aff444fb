"""``kvbench ask``: what compression does to the answers about one context."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvbench.cli import completion, options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kvbench.api.ask import Asked, Chat


def ask(
    context: Annotated[Path, typer.Option(parser=options.path, help="A file of plain text.")],
    question: Annotated[list[str] | None, typer.Option(
        help="A question about the context; repeatable. The context is compressed once, before any is known.",
        show_default=False)] = None,
    chat: Annotated[bool, typer.Option(
        "--chat", help="Go on asking, a line each, until an empty one; shows what both caches hold after every turn.",
    )] = False,
    method: Annotated[str, typer.Option(
        autocompletion=completion.method,
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
    Answers are greedy; below them stand entries, bytes and seconds. With --chat, all that was said so far is compressed
    before every turn.

    Examples:

      kvbench ask --model Qwen/Qwen3-0.6B --ratio 0.8 --context report.txt --question "Who wrote it?" --question "When?"

      kvbench ask --method streaming-llm --context report.txt --chat

    Exit codes: 0 done; 2 the request was wrong.
    """
    from fractions import Fraction

    import torch

    from kvbench.api.ask import Answerer, Chat
    from kvbench.api.ask import ask as asked
    from kvbench.config import load_settings
    from kvbench.errors import UserError
    from kvbench.methods import METHODS, make_method
    from kvbench.models.loading import load_model
    from kvbench.models.references import resolve_model
    from kvbench.planning.adapters import known_adapter
    from kvbench.planning.methods import parse_choice

    settings = load_settings(None).run
    choice = parse_choice(method)
    if ratio is not None and budget_tokens is not None:
        raise UserError("--ratio and --budget-tokens both say how much is kept.", "Leave one of them out.")
    if any(not one.strip() for one in question or ()):
        raise UserError("A question is empty.", "Write it out, or leave it out.")
    if not question and not chat:
        raise UserError("No question is asked.", "Give --question, or --chat to ask line by line.")
    try:
        text = context.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The context {context} cannot be read: {error}.", "Give a file of plain text.") from error
    count = options.checked_threads(threads, settings.threads)
    if count:
        torch.set_num_threads(count)
    reference = resolve_model(model or settings.model, revision)
    kind = METHODS[choice.name]
    folder = adapter
    if folder is None and kind.adapter_kinds:
        folder = str(known_adapter(make_method(choice.name, Fraction(0), dict(choice.given)), reference))
    loaded = load_model(
        reference, options.checked_device(device or settings.device), options.checked_dtype(dtype or settings.dtype)
    )
    answerer = Answerer(
        loaded.model, loaded.tokenizer, choice.name, adapter=folder, budget_tokens=budget_tokens,
        ratio=ratio if ratio or budget_tokens or "ratio" not in kind.budgets else "0.7", new_tokens=new_tokens,
        options=dict(choice.given),
    )
    if chat:
        _chat(Chat(answerer, text), question or [], json_)
        return
    found = asked(answerer, text, question or [])
    if json_:
        _print_json(_content(found))
    else:
        _console().print(_table(method, found))


def _chat(chat: Chat, questions: Sequence[str], as_json: bool) -> None:
    """Ask the given questions, then those that come line by line."""
    turns: list[dict[str, Any]] = []
    console = _console()
    try:
        for question in _asked(questions, console.is_terminal and not as_json):
            if as_json:
                turns.append(_content(chat.say(question)))
                continue
            with console.status("reading"):
                found = chat.say(question)
            console.print(_table(chat.answerer.method, found))
    finally:  # what was said is printed, also where a later turn fails
        if as_json and turns:
            _print_json({"turns": turns})


def _asked(given: Sequence[str], prompts: bool) -> Iterator[str]:
    from kvbench.errors import UserError

    yield from given
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what cannot be read is found line by line
    while sys.stdin is not None:
        try:
            line = (input("> ") if prompts else sys.stdin.readline()).strip()
            line.encode()
        except EOFError:
            return
        except UnicodeError as error:
            raise UserError(f"A question cannot be read: {error}.", "Write it in UTF-8.") from error
        if not line:
            return
        yield line


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(file=console.file, width=140)


def _content(found: Asked) -> dict[str, Any]:
    import dataclasses

    return {**dataclasses.asdict(found), "context_tokens": found.context_tokens, "realised": found.realised}


def _print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"schema": 1, **content}, indent=1, ensure_ascii=False) + "\n")


def _table(method: str, found: Asked) -> Table:
    """Answers side by side, and what they took."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from kvbench.parsing import bytes_of

    table = Table(box=box.SIMPLE_HEAD, show_lines=True, pad_edge=False, expand=True)
    removed = f"{method}, {found.realised:.2f} removed"
    for column in ("question", "full cache", removed):
        table.add_column(column, ratio=1, overflow="fold")
    sides = (found.full, found.compressed)
    for question, *answers in zip(found.questions, *(side.answers for side in sides), strict=True):
        table.add_row(Text(question), *map(Text, answers))
    table.add_row("tokens of context", *(f"{side.context_tokens}" for side in sides))
    table.add_row("entries per layer and head", *(f"{side.entries:g}" for side in sides))
    table.add_row("bytes of the cache", *(bytes_of(side.bytes) for side in sides))
    if len(found.questions) == 1:
        table.add_row("entries after the answer", *(f"{side.held[0]:g}" for side in sides))
    table.add_row("seconds to read the context", *(f"{side.prefill_s:.2f}" for side in sides))
    table.add_row("seconds per answer", *(f"{sum(side.answers_s) / len(side.answers_s):.2f}" for side in sides))
    return table
