"""What the numbers were measured on: card, driver, versions, the code itself."""

from __future__ import annotations

import hashlib
import importlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ASKED = (
    "torch", "transformers", "triton", "numpy", "safetensors", "tokenizers", "huggingface_hub", "pydantic",
    "datasets", "mauve", "rouge_score", "typer", "rich", "psutil", "scipy", "filelock", "jinja2", "peft", "pandas",
)
ROOT = Path(__file__).resolve().parents[2]


def describe(device: Any) -> dict[str, Any]:
    """As plain data; nothing in it identifies a person."""
    import torch

    import kvbench
    from kvbench.store.environment import describe as environment

    found: dict[str, Any] = {
        "kvbench": kvbench.__version__, "code": environment()["code"], "sources": _sources(),
        "python": platform.python_version(), "platform": platform.platform(),
        "packages": {name: _version(name) for name in ASKED}, "device": str(device),
        "threads": torch.get_num_threads(),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found["card"] = {
            "name": card.name, "bytes": card.total_memory, "processors": card.multi_processor_count,
            "capability": f"{card.major}.{card.minor}", "free": torch.cuda.mem_get_info(device)[0],
            "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            **_driver(),
        }
    return found


def _version(name: str) -> str | None:
    """Of a module that is found, in words where it has none; None where it is not there.

    Only one of which no package tells is imported: all of them together take longer than many a cell.
    """
    if find_spec(name) is None:
        return None
    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        pass
    try:
        return str(getattr(importlib.import_module(name), "__version__", "without a version"))
    except Exception:  # there, and broken
        return None


def _sources() -> str:
    """Hash of the code that is run: a copy may have left its history behind."""
    digest = hashlib.sha256()
    for folder in ("kvbench", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> dict[str, str]:
    """Driver and clocks, as far as nvidia-smi tells them."""
    names = "driver_version,clocks.sm,clocks.max.sm,power.limit,temperature.gpu,utilization.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"], capture_output=True, text=True,
            timeout=5, check=True,
        )
        first = done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(names.split(","), (part.strip() for part in first.split(",")), strict=False))
