"""Time and memory on a GPU: requests in pairs with the full cache, prompts, a training step, attention kernels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.cells import Found, NotHereError
from benchmarks.gpu.workshop import Workshop
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS, make_layout
from kvbench.methods.base import Method
from kvbench.methods.layouts.layout import Layout
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.profiling.bandwidth import copy_bandwidth
from kvbench.profiling.bench import Bench
from kvbench.profiling.clock import clock_of
from kvbench.profiling.memory import memory_of
from kvbench.profiling.passes import Timed, measure_memory, time_request
from kvbench.store.records import Cell
from kvbench.training.adapter_training import AdapterPlan, step_sample, text_loss

T = TypeVar("T")
RANK = 64
BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


def bandwidth(shop: Workshop, found: Found, until: float) -> None:
    """How fast the device copies: what writing tokens is bound by."""
    block = 256 << 20 if shop.device.type == "cuda" else 16 << 20
    found.add("copy", copy_bandwidth(shop.device, block) / 1e9, "GB/s")


def load(shop: Workshop, found: Found, until: float) -> None:
    """Make the model that is timed."""
    bench, _ = shop.timed()
    found.add("weights", bench.sizes.weights, "bytes")
    found.add("an entry", bench.sizes.entry, "bytes")
    found.says = ", ".join(bench.notes)


def profile(shop: Workshop, method: str, length: int, batch: int, found: Found, until: float) -> None:
    """A request of a method and one of the full cache in turns; before them one that is weighed, which warms up."""
    bench, cells = shop.timed()
    mine, full = cells[method, length, batch], cells["full", length, batch]
    _check_fits(bench, mine)
    with bench.ready(mine):
        weighed = measure_memory(partial(bench.request, mine, 1), memory_of(bench.device), None)
    found.add("cache", weighed.read[0], "bytes")
    found.add("cache as stored", weighed.read[1], "bytes")
    found.add("peak reading", weighed.prefill_peak, "bytes")
    found.add("peak writing", weighed.decode_peak, "bytes")
    pairs: list[tuple[Timed, Timed]] = []
    for pair in _in_pairs(partial(_timed, bench, mine), partial(_timed, bench, full), shop.scale.pairs, until):
        pairs.append(pair)
        lines = [(a.timeline, b.timeline) for a, b in pairs]
        found.add("held", pairs[-1][0].held, "entries")
        _add(found, "writing", [a.decode_tok_s(batch) for a, _ in lines], "tokens/s")
        _add(found, "writing/full", [b.tpot_s / a.tpot_s for a, b in lines], "x")
        _add(found, "reading", [a.prefill_tok_s(length, batch) for a, _ in lines], "tokens/s")
        _add(found, "compressing", [1e3 * a.compress_s for a, _ in lines], "ms")
        _add(found, "first token", [1e3 * a.ttft_s for a, _ in lines], "ms")
        _add(found, "first token/full", [b.ttft_s / a.ttft_s for a, b in lines], "x")
        found.add("pairs", len(pairs), "")


def prompt(shop: Workshop, method: str, length: int, batch: int, found: Found, until: float) -> None:
    """A prompt read and compressed, up to its first token, against the same that is not compressed."""
    bench, cells = shop.timed()
    mine, full = cells[method, length, batch], cells["full", length, batch]
    _check_fits(bench, mine)
    once = partial(_timed, bench, tokens=1)
    for cell in (mine, full):
        once(cell, 0)
    lines = []
    for a, b in _in_pairs(partial(once, mine), partial(once, full), shop.scale.pairs, until):
        lines.append((a.timeline, b.timeline))
        _add(found, "prompt", [1e3 * a.ttft_s for a, _ in lines], "ms")
        _add(found, "of it compressing", [1e3 * a.compress_s for a, _ in lines], "ms")
        _add(found, "full", [1e3 * b.ttft_s for _, b in lines], "ms")
        _add(found, "prompt/full", [b.ttft_s / a.ttft_s for a, b in lines], "x")
        found.add("pairs", len(lines), "")


def training(shop: Workshop, found: Found, until: float) -> None:
    """A step of a gated Sentinel adapter, against one of a LoRA on the same projections under the full cache."""
    bench, _ = shop.timed()
    rows, length = shop.scale.trained
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(bench.vocabulary, (rows, length), generator=generator).to(bench.device)
    plan = AdapterPlan("sentinel", length=length, batch=rows, rank=RANK)
    plain = make_layout(METHODS["full"](), length, 0, 0)
    mine = _Step(bench, METHODS["sentinel"](), "gated", ids, lambda step: step_sample(plan, step))
    lora = _Step(bench, METHODS["adapted"](), "plain", ids, lambda _: plain)
    for step in (mine, lora, mine):
        step(0)
    peak = _peak(bench.device, partial(mine, 0))
    if peak is not None:
        found.add("peak", peak, "bytes")
    seconds = []
    for pair in _in_pairs(mine, lora, shop.scale.pairs, until):
        seconds.append(pair)
        _add(found, "step", [1e3 * a for a, _ in seconds], "ms")
        _add(found, "text", [ids.numel() / a for a, _ in seconds], "tokens/s")
        _add(found, "step/LoRA", [b / a for a, b in seconds], "x")
        found.add("pairs", len(seconds), "")


class _Step:
    """Training steps with an adapter of their own; called, one is carried out and its seconds are returned."""

    def __init__(
        self, bench: Bench, method: Method, gate: str, ids: Tensor, layout: Callable[[int], Layout]
    ) -> None:
        torch.manual_seed(0)
        card = AdapterCard(method.name, gate, RANK, float(RANK), method.n_rows, "", "")
        self.adapter = Adapter.fresh(card, bench.model).to(bench.device).train()
        self.optimiser = torch.optim.AdamW(self.adapter.parameters(), lr=1e-3)
        self.bench, self.ids, self.layout = bench, ids, layout

    def __call__(self, number: int) -> float:
        device, layout = self.bench.device, self.layout(number)
        start = _now(device)
        reader = Reader(self.bench.model, self.adapter)
        with reader.ready():
            with torch.autocast(device.type, torch.bfloat16):
                loss = text_loss(reader.one_pass(self.ids, layout, slice(0, -1)), self.ids)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.adapter.parameters(), 1.0)
        self.optimiser.step()
        return _now(device) - start


CALLS = (
    "prompt, causal, grouped", "chunk, masked, grouped", "chunk, masked, copied", "token, grouped",
    "token, masked, grouped", "token, masked, copied", "token, masked, group as queries",
)
"""Calls of attention that kvbench makes, or could: with the cache's heads copied for every query head, or not."""


def kernel(shop: Workshop, name: str, found: Found, until: float) -> None:
    """Which kernels of PyTorch take a call, and how long each needs."""
    device, call = shop.device, _call(shop, name)
    found.add("as chosen", 1e3 * _median_seconds(call, device), "ms")
    refused = []
    for backend in BACKENDS:
        kind = backend.name.partition("_")[0].lower()
        try:
            with sdpa_kernel([backend]):
                found.add(kind, 1e3 * _median_seconds(call, device), "ms")
        except RuntimeError:
            refused.append(kind)
    found.says = f"not taken by {', '.join(refused)}" if refused else ""


def _call(shop: Workshop, name: str) -> Callable[[], Tensor]:
    device, dtype = shop.device, getattr(torch, shop.scale.dtype)
    n, heads, shared, width = shop.scale.lengths[0], 32, 8, 64

    def some(count: int, of: int) -> Tensor:
        return torch.randn(1, of, count, width, device=device, dtype=dtype)

    keys, few, one = some(n, shared), some(min(256, n // 2), heads), some(1, heads)
    wide = keys.repeat_interleave(heads // shared, 1)
    mask = torch.ones(few.shape[2], n, dtype=torch.bool, device=device).tril(n - few.shape[2])
    attend = functional.scaled_dot_product_attention
    together = one.view(1, shared, heads // shared, width)
    calls: tuple[Callable[[], Tensor], ...] = (
        partial(attend, some(n, heads), keys, keys, is_causal=True, enable_gqa=True),
        partial(attend, few, keys, keys, attn_mask=mask, enable_gqa=True),
        partial(attend, few, wide, wide, attn_mask=mask), partial(attend, one, keys, keys, enable_gqa=True),
        partial(attend, one, keys, keys, attn_mask=mask[-1:], enable_gqa=True),
        partial(attend, one, wide, wide, attn_mask=mask[-1:]),
        partial(attend, together, keys, keys, attn_mask=mask[-1:]),
    )
    return dict(zip(CALLS, calls, strict=True))[name]


def _timed(bench: Bench, cell: Cell, seed: int, tokens: int | None = None) -> Timed:
    with bench.ready(cell):
        return time_request(
            lambda watch: bench.request(cell, seed, watch.overhead), clock_of(bench.device), bench.device, None,
            tokens,
        )


def _check_fits(bench: Bench, cell: Cell) -> None:
    """On a GPU; a CPU's memory is not asked for, which would take psutil."""
    why = bench.refusal(cell) if bench.device.type == "cuda" else None
    if why is not None:
        raise NotHereError(f"It {why}.")


def _in_pairs(
    mine: Callable[[int], T], rival: Callable[[int], T], most: int, until: float
) -> Iterator[tuple[T, T]]:
    """Both with the same seed, in an order that is reversed each time; at least once, then as time goes."""
    took = 0.0
    for number in range(most):
        start = time.monotonic()
        if number and start + took > until:
            return
        if number % 2:
            b, a = rival(number + 1), mine(number + 1)
        else:
            a, b = mine(number + 1), rival(number + 1)
        took = time.monotonic() - start
        yield a, b


def _add(found: Found, name: str, values: list[float], unit: str) -> None:
    """The median, with the range of several."""
    found.add(name, statistics.median(values), unit, values if len(values) > 1 else None)


def _peak(device: torch.device, work: Callable[[], object]) -> int | None:
    """The most bytes there were on a GPU while the work was done; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = _now(device)
        work()
        seconds.append(_now(device) - start)
    return statistics.median(seconds)
