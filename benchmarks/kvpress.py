"""Reading a prompt and compressing it, and ``generate`` around it, against kvpress in an environment of its own.

    python -m venv /tmp/kvpress && /tmp/kvpress/bin/pip install torch==2.13.0 kvpress==0.5.5
    python -m benchmarks.kvpress /tmp/kvpress/bin/python

Both have the same weights, prompt lengths, kernel (SDPA) and threads, and take turns in one run: while one works, the
other waits for its standard input.
"""

from __future__ import annotations

import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from itertools import count

import torch

from benchmarks.pairs import compare_times
from kvbench import compress
from kvbench.inference.opening import Text, open_session
from kvbench.methods import Method, make_method
from kvbench.models.loading import load_model
from kvbench.models.references import resolve_model
from kvbench.profiling.clock import WallClock
from kvbench.profiling.passes import time_request
from kvbench.profiling.request import SessionRequest

RATIO, NEW, GENERATED = "0.7", 2, 64
PAUSE = 0.3
"""Seconds before each turn, in which the threads of the other process stop waiting actively."""
THEIRS = """
import sys, time
import torch
from transformers import AutoModelForCausalLM, DynamicCache
import kvpress
presses = {"snapkv": kvpress.SnapKVPress(float(sys.argv[2]), window_size=32, kernel_size=5),
           "knorm": kvpress.KnormPress(float(sys.argv[2]))}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="sdpa", dtype=torch.float32).eval()
torch.set_num_threads(int(sys.argv[3]))
print("ready", flush=True)
for line in sys.stdin:
    name, length, seed, new = line.split()
    ids = torch.randint(4096, (1, int(length)), generator=torch.Generator().manual_seed(int(seed)))
    cache = DynamicCache()
    with torch.inference_mode():
        started = time.perf_counter()
        with presses[name](model):
            if new == "0":
                model(ids, past_key_values=cache, logits_to_keep=1)
            else:
                model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=int(new),
                               do_sample=False, eos_token_id=1 << 30, pad_token_id=0)
        seconds = time.perf_counter() - started
    print(seconds, cache.layers[0].keys.shape[2] - max(0, int(new) - 1), flush=True)
"""


class Rival:
    """The process of the other environment."""

    def __init__(self, python: str, folder: str) -> None:
        command = [python, "-c", THEIRS, folder, RATIO, str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._line()

    def _line(self) -> list[str]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().split()
        if not line:
            raise SystemExit("kvpress ended; its message is above")
        return line

    def read(self, name: str, length: int, seed: int, new: int = 0) -> tuple[float, int]:
        """Seconds, and entries that are left of the prompt; ``new`` tokens are generated."""
        assert self.process.stdin is not None
        time.sleep(PAUSE)
        self.process.stdin.write(f"{name} {length} {seed} {new}\n")
        self.process.stdin.flush()
        seconds, entries = self._line()
        return float(seconds), int(entries)


def read(model: torch.nn.Module, policy: Method, length: int, seed: int) -> tuple[float, int]:
    """Our seconds, and entries that are left."""
    ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(seed))
    time.sleep(PAUSE)
    found = time_request(
        lambda _: SessionRequest(
            open_session(model, policy, Text(length, length + NEW, (0,)), at_once=True), model, ids, NEW,
        ), WallClock(), torch.device("cpu"), None,
    )
    return found.timeline.prefilled - found.timeline.started, found.held


def write(model: torch.nn.Module, name: str, length: int, seed: int) -> tuple[float, int]:
    """The same for ``generate`` inside ``compress``."""
    ids = torch.randint(4096, (1, length), generator=torch.Generator().manual_seed(seed))
    time.sleep(PAUSE)
    with compress(model, name, RATIO) as run:
        started = time.perf_counter()
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=GENERATED, do_sample=False, eos_token_id=1 << 30,
            pad_token_id=0,
        )
        seconds = time.perf_counter() - started
    return seconds, round(run.report.entries) - GENERATED + 1


def main() -> None:
    """Print a line per method and length: their time over ours, medians of paired ratios."""
    reference = resolve_model("kvbench-tiny")
    model = load_model(reference, "cpu", "float32").model
    rival = Rival(sys.argv[1], reference.location)
    print(f"reading a prompt and compressing it at {RATIO}, rival: kvpress 0.5.5 in an environment of its own")
    compare_generate(model, rival)
    for name in ("snapkv", "knorm"):
        policy = make_method(name, Fraction(RATIO))
        for length in (1024, 4096):
            ours = partial(read, model, policy, length)
            if abs(ours(0)[1] - rival.read(name, length, 0)[1]) > 1:
                raise SystemExit(f"{name} leaves another number of entries there: it is not the same work")
            mine, theirs = count(1), count(1)
            compare_times(
                f"{name}, {length} tokens", lambda ours=ours, seeds=mine: ours(next(seeds))[0],  # type: ignore[misc]
                lambda name=name, length=length, seeds=theirs: (  # type: ignore[misc]
                    rival.read(name, length, next(seeds))[0]
                ), 1.0, repeats=25,
            )


def compare_generate(model: torch.nn.Module, rival: Rival) -> None:
    for length in (1024, 4096):
        ours = partial(write, model, "snapkv", length)
        if abs(ours(0)[1] - rival.read("snapkv", length, 0, GENERATED)[1]) > 1:
            raise SystemExit("snapkv leaves another number of entries there: it is not the same work")
        mine, theirs = count(1), count(1)
        compare_times(
            f"snapkv, generate: {length} tokens read and {GENERATED} written",
            lambda ours=ours, seeds=mine: ours(next(seeds))[0],  # type: ignore[misc]
            lambda length=length, seeds=theirs: (  # type: ignore[misc]
                rival.read("snapkv", length, next(seeds), GENERATED)[0]
            ), 1.0, repeats=15,
        )


if __name__ == "__main__":
    main()
