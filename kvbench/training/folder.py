"""The folder that a training writes: refused if it holds something else, and continued if it holds a checkpoint."""

from __future__ import annotations

from pathlib import Path

from kvbench.errors import UserError
from kvbench.training.curve import LOG
from kvbench.training.loop import CHECKPOINT

BEST = "best.safetensors"
OWN = (CHECKPOINT, LOG, BEST)
"""Files of an unfinished training; while one is written, its name ends in ``.part``."""


def check_out(out: Path, marker: str) -> None:
    """Check that the output folder is missing, empty, or holds an unfinished training.

    Args:
        marker: a file that only a finished training has.

    Raises:
        UserError: it is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file.", "Give a folder.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if (out / marker).exists():
        raise UserError(f"--out {out} already holds a finished training.", "Choose another folder.")
    foreign = sorted({path.name.removesuffix(".part") for path in out.iterdir()} - set(OWN))
    if foreign:
        raise UserError(f"--out {out} holds something else: {foreign[0]}.", "Choose an empty or a new folder.")


def make_folder(out: Path, fresh: bool) -> None:
    """Make the output folder; ``fresh`` deletes what an unfinished training left in it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in OWN if fresh else ():
            (out / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}.", "Choose another folder.") from error
