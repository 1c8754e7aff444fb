"""``make gpu-train``: sentinel, local-tuned and adapted, trained in turns on a GPU as far as the minutes go.

Run: python3 -m benchmarks.gpu.training --device cuda --data books.jsonl.gz --held-out other.jsonl.gz --out reports/gpu

Writes training.json and training.txt, each whole at any moment: held-out curves, tokens per second, the card. The
adapters themselves are not kept. Needs torch and transformers, and the model in kvbench's cache (kvbench fetch).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvbench.training.loop import Measure, Progress
    from kvbench.training.request import AdapterRequest

STARTED = time.monotonic()
METHODS = ("sentinel", "local-tuned", "adapted")
MARGIN = 10.0
"""Seconds that are left for ending."""


def main() -> int:
    """The exit code: 0 if something was trained, 2 if it cannot be tried."""
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu.training", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="training text")
    parser.add_argument("--held-out", type=Path, help="text to measure on")
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"))
    parser.add_argument("--minutes", type=float, default=10.0, help="after which it ends by itself (default: 10)")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--small", action="store_true", help="kvbench-tiny and a few steps, for a CPU")
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from kvbench.errors import UserError

    try:
        return _train(given)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def _train(given: argparse.Namespace) -> int:
    import torch

    from benchmarks.gpu.machine import describe
    from kvbench.models.device import pick_device
    from kvbench.training.adapter_recipe import run_adapter_training
    from kvbench.training.loop import checkpoint_step
    from kvbench.training.materials import Materials

    device = pick_device(given.device)
    until_time = STARTED + 60 * given.minutes - MARGIN
    about: dict[str, Any] = {"machine": describe(device), "small": given.small, "methods": {}}
    with tempfile.TemporaryDirectory() as place:
        requests = {method: _request(given, method, Path(place)) for method in METHODS}
        materials, spent = Materials(), dict.fromkeys(METHODS, 0.0)
        while time.monotonic() < until_time:
            steps = {name: checkpoint_step(request.out) for name, request in requests.items()}
            name = min(steps, key=lambda name: steps[name])
            request = requests[name]
            if steps[name] >= request.steps - 1:  # the last step would write the adapter
                break
            following = _Following(until_time)
            run_adapter_training(request, following, request.every, materials)
            spent[name] += following.seconds
            about["methods"][name] = {
                "steps": following.step, "tokens": following.step * request.batch * request.length,
                "tokens_per_second": round(following.step * request.batch * request.length / spent[name], 1),
                "curve": [point._asdict() for point in _curve(request)],
            }
            _write(given.out, about)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return 0


def _request(given: argparse.Namespace, method: str, place: Path) -> AdapterRequest:
    from kvbench.training.request import AdapterRequest

    data, held_out = given.data, given.held_out
    if given.small:
        data = held_out = place / "text.txt"
        if not data.exists():
            from kvbench.data.documents import embedded_documents

            data.write_text("\n".join(document.text for document in embedded_documents()), encoding="utf-8")
    return AdapterRequest(
        method=method, data=(data,) if data else (), out=place / method,
        model="kvbench-tiny" if given.small else given.model, revision=None, steps=5 if given.small else 4001,
        batch=2, length=32 if given.small else 512, lr=given.lr, rank=4 if given.small else 16, held_out=held_out,
        every=2 if given.small else 100, seed=0, options={}, device=given.device, threads=0,
        ratios=("0.5", "0.9") if given.small else ("0.3", "0.5", "0.7", "0.9"), documents=2 if given.small else 8,
        recall=False,
    )


def _curve(request: AdapterRequest) -> Any:
    from kvbench.training.curve import read_curve

    return read_curve(request.out)


class _Following:
    """Runs a turn to its end, measures there, and counts the seconds of training."""

    def __init__(self, until: float) -> None:
        self.until, self.step, self.seconds = until, 0, 0.0

    def __call__(self, training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
        started, loss = time.perf_counter(), float("nan")
        for progress in training:
            self.step, loss = progress
            if time.monotonic() > self.until:
                break
        self.seconds = time.perf_counter() - started
        measure(self.step, loss)
        print(f"step {self.step}: loss {loss:.4f}", flush=True)


def _write(out: Path, about: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    card = about["machine"].get("card", {}).get("name", about["machine"]["device"])
    lines = [f"Held-out nats per token on {card}{' (small: no number means anything)' if about['small'] else ''}"]
    for name, found in about["methods"].items():
        lines.append(f"\n{name}: {found['tokens']:,} tokens, {found['tokens_per_second']:,.0f} a second")
        for point in found["curve"]:
            scores = "  ".join(f"{ratio}: {score['nll']:.4f}" for ratio, score in point["held_out"].items())
            lines.append(f"  step {point['step']:>5}  loss {point['loss']:.4f}  {scores}")
    for name, text in (("training.json", json.dumps(about, indent=1)), ("training.txt", "\n".join(lines))):
        part = out / (name + ".part")
        part.write_text(text + "\n", encoding="utf-8")
        os.replace(part, out / name)


if __name__ == "__main__":
    sys.exit(main())
