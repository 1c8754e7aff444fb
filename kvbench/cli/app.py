"""The ``kvbench`` command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvbench import __version__
from kvbench.cli import ask, compare, doctor, fetch, import_, lm_eval, profile, report, run, show, sweep, train
from kvbench.cli import list as list_command
from kvbench.cli.streams import outlets

app = typer.Typer(
    name="kvbench", no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False,
    help="Measure what compressing the KV cache of a language model costs and gains.\n\n"
    "Start with [bold]kvbench run --method sentinel --ratio 0.7[/].",
)
app.command("run")(run.run)
app.command("sweep")(sweep.sweep)
app.command("profile")(profile.profile)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("doctor")(doctor.doctor)
app.command("list")(list_command.list_)
app.command("show")(show.show)
app.command("ask")(ask.ask)
app.command("fetch")(fetch.fetch)
app.command("lm-eval", context_settings=lm_eval.PASS_ON)(lm_eval.lm_eval)
app.add_typer(import_.app, name="import")
app.add_typer(train.app, name="train")


def _version(context: typer.Context, asked: bool) -> None:
    if not asked:
        return
    typer.echo(f"kvbench {__version__}")
    if context.params["verbose"]:
        from kvbench.cli.about import about

        for line in about():
            typer.echo(line)
    raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option(  # eager: known when --version prints, whichever comes first
        "--verbose", is_eager=True, help="With --version: commit, machine and packages too, for an issue.",
    )] = False,
) -> None:
    from kvbench.errors import UserError

    if verbose:
        raise UserError("--verbose goes with --version.", "Write kvbench --version --verbose.")


def main() -> None:
    """Run the command line and exit with its code; a ``UserError`` is printed as one sentence.

    The program that reads the output, such as ``head``, may close it early, which is not an error. If it cannot be
    written for another reason (``out.lost``), that is reported, with exit code 1.
    """
    with outlets() as out:
        code = _run_app()
        sys.stdout.flush()
        if out.lost:
            print(f"kvbench: standard output cannot be written: {out.lost}.", file=sys.stderr)
        sys.exit(code or int(bool(out.lost)))


def _run_app() -> int:
    """Run the command and return its exit code; an ``OSError`` about a path is printed like a ``UserError``."""
    from kvbench.errors import UserError

    try:
        app()
    except UserError as error:
        print(f"kvbench: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.filename is None:  # not about a path that the user gave
            raise
        print(f"kvbench: {error.filename} cannot be used: {error.strerror}.", file=sys.stderr)
        return UserError.exit_code
    except SystemExit as end:
        return int(end.code or 0)
    return 0
