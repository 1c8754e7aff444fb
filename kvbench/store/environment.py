"""The environment of a run: package versions, hardware, and the revision of the code."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from kvbench import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "datasets",
             "sacrebleu", "rouge-score", "sentence-transformers", "mauve-text")


def describe() -> dict[str, Any]:
    """Describe the environment as plain data, without anything that identifies a person."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {"kvbench": __version__, **versions(_PACKAGES)},
        "code": _revision(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package, without importing it; None if it is not installed."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _revision() -> dict[str, Any] | None:
    """Git commit that kvbench runs from, and whether there are uncommitted changes; None outside a git checkout."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()
