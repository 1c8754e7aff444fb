"""What a bug report needs to know: the code, the machine, the packages. No name of a person or host is in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, metadata, requires
from pathlib import Path

import psutil

import kvbench
from kvbench.parsing import bytes_of
from kvbench.store.cached import cache_folder
from kvbench.store.environment import describe, versions

_PACKAGES = (
    "torch", "transformers", "tokenizers", "peft", "datasets", "accelerate", "huggingface-hub", "safetensors",
    "pyarrow", "numpy", "scipy", "pandas", "pydantic", "typer", "rich", "matplotlib", "sacrebleu", "rouge-score",
    "sentence-transformers", "mauve-text",
)


def about() -> Iterator[str]:
    """The lines of ``kvbench --version --verbose`` after the first."""
    found = describe()
    code = found["code"]
    memory = psutil.virtual_memory()
    yield f"commit:     {code['commit'] + (', with changes' if code['dirty'] else '') if code else 'not a checkout'}"
    yield f"package:    {_shortened(Path(kvbench.__file__).parent)}"
    yield f"python:     {found['python']}"
    yield f"platform:   {found['platform']}"
    yield f"processor:  {found['processor'] or 'unknown'}, {found['cores']} cores"
    yield f"memory:     {bytes_of(memory.total)}, {bytes_of(memory.available)} of it free"
    yield from _of_torch()
    try:
        yield f"cache:      {_shortened(cache_folder())}"
    except RuntimeError:
        yield "cache:      none, since there is no home directory"
    there, lacking = _extras()
    yield f"extras:     {', '.join(there) or 'none'} (not: {', '.join(lacking) or 'none'})"
    others = sorted(entry.name for entry in entry_points(group="kvbench.methods"))
    yield f"methods of other packages: {', '.join(others) or 'none'}"
    yield "packages:"
    for name, version in versions(_PACKAGES).items():
        yield f"  {name:22} {version or 'not installed'}"


def _of_torch() -> Iterator[str]:
    """Threads and GPUs, which only PyTorch knows; one line if it cannot be imported."""
    set_ = os.environ.get("OMP_NUM_THREADS")
    try:
        import torch

        yield f"threads:    {torch.get_num_threads()}{f', OMP_NUM_THREADS={set_}' if set_ else ''}"
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            yield f"gpu {number}:      {card.name}, {bytes_of(card.total_memory)}, CUDA {torch.version.cuda}"
        if not torch.cuda.device_count():
            yield "gpu:        none that PyTorch can use"
    except Exception as error:  # whatever a broken installation raises is what the report is about
        yield f"torch:      cannot be imported ({_home_shortened(f'{type(error).__name__}: {error}')})"


def _extras() -> tuple[list[str], list[str]]:
    """The extras of the package whose requirements are all installed, and the others."""
    try:
        known, wanted = metadata("kvbench").get_all("Provides-Extra") or [], requires("kvbench") or []
    except PackageNotFoundError:  # run from a folder
        return [], []
    there: list[str] = []
    lacking: list[str] = []
    for extra in known:
        mine = [line for line in wanted if re.search(rf"extra == ['\"]{re.escape(extra)}['\"]", line)]
        names = [found.group() for line in mine if (found := re.match(r"[\w.-]+", line))]
        (there if all(versions(names).values()) else lacking).append(extra)
    return there, lacking


def _shortened(path: Path) -> str:
    return _home_shortened(str(path))


def _home_shortened(text: str) -> str:
    home = os.path.expanduser("~").rstrip("/")
    return text.replace(home, "~") if home else text
