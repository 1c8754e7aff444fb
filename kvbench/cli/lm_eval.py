"""``kvbench lm-eval``: the tasks of lm-evaluation-harness on a compressed model."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from kvbench.cli import completion, options

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""What is not ours is an argument of lm-evaluation-harness."""


def lm_eval(
    context: typer.Context,
    model: options.Model = None,
    method: Annotated[str, typer.Option(
        autocompletion=completion.method,
        help="Compression method, with options of its own as in snapkv:window=16.")] = "snapkv",
    ratio: Annotated[str | None, typer.Option(
        help="Share of cache entries to remove, in [0, 1). \\[default: 0.7]", show_default=False)] = None,
    budget_tokens: options.BudgetTokens = None,
    adapter: Annotated[str | None, typer.Option(
        parser=options.text, help="Adapter folder of a trained method. \\[default: that shipped for kvbench-tiny]",
        show_default=False)] = None,
    split: Annotated[str, typer.Option(
        help="What of a prompt is read after the compression: none (its last token only: methods see the question), "
             "last:N tokens, or regex:PATTERN (from its last match on).")] = "none",
    min_context: Annotated[int, typer.Option(help="Leave prompts with fewer tokens than this whole.", min=1)] = 64,
    revision: options.Revision = None,
    device: options.Device = None,
    dtype: Annotated[str | None, typer.Option(
        help="float32, bfloat16 or float16. \\[default: as the weights are stored]", show_default=False)] = None,
    threads: options.Threads = None,
) -> None:
    """Run tasks of lm-evaluation-harness on a compressed model.

    The context of every request is read and compressed first; continuations are scored, and answers are written, from
    what is left. All other arguments are those of 'lm-eval run', such as --tasks, --limit, --num_fewshot, --batch_size,
    --output_path and --include_path; see 'lm-eval run --help'. Needs: pip install 'kvbench\\[lm-eval]'.

    Examples:

      kvbench lm-eval --model Qwen/Qwen3-0.6B --method snapkv --ratio 0.7 --tasks lambada_openai --limit 100

      kvbench lm-eval --method streaming-llm --split last:32 --tasks squad_completion --output_path results

    Exit codes: 0 done; 2 the request was wrong.
    """
    import torch

    import kvbench.integrations.lm_eval  # noqa: F401 - says so at once where lm-evaluation-harness is not installed
    from kvbench.config import load_settings
    from kvbench.errors import UserError, unknown
    from kvbench.methods import METHODS
    from kvbench.models.device import pick_device
    from kvbench.planning.methods import parse_choice

    settings = load_settings(None).run
    choice = parse_choice(method)
    if ratio is not None and budget_tokens is not None:
        raise UserError("--ratio and --budget-tokens both say how much is kept.", "Leave one of them out.")
    if ratio is None and budget_tokens is None and "ratio" in METHODS[choice.name].budgets:
        ratio = "0.7"
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise unknown("dtype", str(dtype), ("float32", "bfloat16", "float16"))
    count = options.checked_threads(threads, settings.threads)
    if count:
        torch.set_num_threads(count)
    given = {
        "pretrained": model or settings.model, "method": method, "ratio": ratio, "budget_tokens": budget_tokens,
        "adapter": adapter, "split": split, "min_context": min_context, "revision": revision, "dtype": dtype,
    }
    arguments = [
        "run", "--model", "kvbench", "--device", str(pick_device(device or settings.device)), "--model_args",
        json.dumps({name: value for name, value in given.items() if value is not None}), *context.args,
    ]
    _check(arguments)
    _evaluate(arguments)


def _check(arguments: Sequence[str]) -> None:
    """Check the request as far as lm-evaluation-harness can before it has read its tasks.

    Raises:
        UserError: it is wrong, or asks for the request cache.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    from kvbench.errors import UserError
    from kvbench.integrations.lm_eval import NO_CACHE
    from kvbench.store.folder import check_writable

    try:
        with _as_command(arguments) as parser:
            config = EvaluatorConfig.from_cli(parser.parse_args())
    except (OSError, TypeError, ValueError) as error:
        raise UserError(f"lm-evaluation-harness: {error}") from error
    if config.use_cache:
        raise UserError("The request cache of lm-evaluation-harness does not know the method.", NO_CACHE)
    if config.output_path:
        out = Path(config.output_path)
        check_writable(out.parent if out.suffix == ".json" else out, "Choose another --output_path.")
    if not config.tasks:
        raise UserError("No task is named.", "Give --tasks, such as --tasks lambada_openai; 'lm-eval ls tasks'.")


def _evaluate(arguments: Sequence[str]) -> None:
    """Run lm-evaluation-harness.

    Raises:
        UserError: it does not know a task, or cannot read or write a file.
    """
    from lm_eval.__main__ import cli_evaluate

    from kvbench.errors import UserError

    try:
        with _as_command(arguments):
            cli_evaluate()
    except (OSError, ValueError) as error:
        if _is_ours(error):
            raise
        raise UserError(f"lm-evaluation-harness: {error}") from error


def _is_ours(error: BaseException) -> bool:
    """Whether an error comes from below the model class: it is not about the request then."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    here = str(Path(__file__).parents[1] / "integrations")
    return any(name.startswith(here) for name in frames)


@contextmanager
def _as_command(arguments: Sequence[str]) -> Iterator[Any]:
    """Let lm-evaluation-harness, which reads ``sys.argv``, see these arguments within the block."""
    from lm_eval._cli import HarnessCLI

    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        yield HarnessCLI()
    finally:
        sys.argv = before
