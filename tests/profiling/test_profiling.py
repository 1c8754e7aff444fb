"""Profiling: definitions on a fake clock, bytes, random caches, the search for the largest batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvbench.cache.evicting import EvictingCache
from kvbench.errors import UserError
from kvbench.inference.filling import random_entries
from kvbench.inference.layout_session import LayoutSession
from kvbench.inference.memory_session import MemorySession
from kvbench.inference.reader import Reader
from kvbench.methods import METHODS, LayoutMethod, TextStructure, make_layout, make_method
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.random_models import SHAPES, make_shape
from kvbench.parsing import bytes_of, parse_bytes
from kvbench.profiling.bandwidth import copy_bandwidth
from kvbench.profiling.bench import Bench
from kvbench.profiling.clock import Stopwatch, Timeline, clock_of
from kvbench.profiling.largest_batch import COARSE, find_largest_batch
from kvbench.profiling.memory import CpuMemory, Sizes, memory_of, read_bytes, sizes_of, weights_bytes
from kvbench.profiling.passes import measure_memory, time_request
from kvbench.profiling.request import SessionRequest, StockRequest, cache_bytes
from kvbench.profiling.worker import is_out_of_memory
from kvbench.statistics import fitted_slope, repeat_interval
from tests.helpers.models import VOCABULARY, adapter_for, small_config, small_model
from tests.helpers.sessions import layout_method, read_all, session_kind, texts

CPU = torch.device("cpu")


class FakeClock:
    """Moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def mark(self) -> float:
        return self.now

    def seconds(self, marks: list[float]) -> list[float]:
        return [mark - marks[0] for mark in marks]


@dataclass
class FakeRequest:
    """Takes 4 s to read, 1 of it beside the model, and then 0.5, 0.25, 0.25 ... s for each token."""

    clock: FakeClock
    watch: Stopwatch
    tokens: int = 5
    entries: int = 10
    held: int = 9
    peak: int = 11

    def read(self) -> Tensor:
        self.clock.now += 3.0
        with self.watch.overhead():
            self.clock.now += 1.0
        return torch.zeros(1, 3)

    def fill(self, seed: int) -> Tensor:
        return torch.zeros(1, 3)

    def write(self, logits: Tensor) -> Iterator[Tensor]:
        for step in range(self.tokens):
            self.clock.now += 0.25 if step else 0.5
            with self.watch.overhead():
                pass  # what a method does while text is written belongs to the tokens
            yield logits.argmax(-1)

    def tensors(self) -> list[Tensor]:
        return []


def faked(fill: int | None = None) -> tuple[Timeline, FakeClock]:
    clock = FakeClock()
    found = time_request(lambda watch: FakeRequest(clock, watch), clock, CPU, fill)
    assert (found.held, found.entries) == (9, 10)
    return found.timeline, clock


def test_the_definitions_of_time_on_a_fake_clock() -> None:
    line, _ = faked()
    assert line.prefill_s == pytest.approx(3.0)
    assert line.compress_s == pytest.approx(1.0)
    assert line.ttft_s == pytest.approx(4.5)  # prefill, compression, and the first token chosen
    assert line.gaps == pytest.approx([0.25] * 4)  # the first token is in none of them
    assert line.tpot_s == pytest.approx((5.5 - 4.5) / 4)  # (end to end - first token) / (tokens - 1)
    assert line.decode_tok_s(batch=8) == pytest.approx(8 / 0.25)
    assert line.prefill_tok_s(prompt=600, batch=2) == pytest.approx(600 * 2 / 3.0)


def test_a_filled_cache_takes_no_time_to_read() -> None:
    line, _ = faked(fill=1)
    assert line.ttft_s == pytest.approx(0.5)
    assert line.prefill_s == 0


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=50), st.floats(0, 5), st.floats(0, 5))
def test_time_per_token_is_the_mean_gap_and_all_adds_up(gaps: list[float], read: float, aside: float) -> None:
    tokens = tuple(float(t) for t in read + aside + np.cumsum(gaps))
    line = Timeline(0.0, read + aside, tokens, aside)
    assert line.tpot_s == pytest.approx(np.mean(line.gaps))
    assert line.ttft_s + sum(line.gaps) == pytest.approx(tokens[-1])
    assert line.prefill_s + line.compress_s <= line.ttft_s + 1e-9


def test_the_garbage_collector_rests_while_a_request_is_timed() -> None:
    clock, seen = FakeClock(), []

    class Watching(FakeRequest):
        def read(self) -> Tensor:
            seen.append(gc.isenabled())
            return super().read()

    time_request(lambda watch: Watching(clock, watch), clock, CPU, None)
    assert seen == [False]
    assert gc.isenabled()


@given(st.integers(0, 3000), st.integers(-5, 4000))
def test_the_largest_batch_is_found_to_one_in_sixteen(true: int, guess: int) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= true

    found = find_largest_batch(fits, lambda: guess)
    assert found <= true < found + max(1, found // COARSE) + 1
    assert len(asked) == len(set(asked)) < 30


def test_no_batch_beyond_the_most_is_tried() -> None:
    assert find_largest_batch(lambda batch: batch <= 100, most=64) >= 60
    assert 38 <= find_largest_batch(lambda _: True, most=40) <= 40


@pytest.mark.parametrize(("text", "size"), [
    ("2GiB", 2 << 30), ("800MB", 800_000_000), ("4e9", 4_000_000_000), ("1.5 gib", 3 << 29), ("7", 7),
])
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@given(st.integers(1, 1 << 50))
def test_sizes_are_written_as_they_are_read(size: int) -> None:
    assert parse_bytes(bytes_of(size)) == pytest.approx(size, rel=0.06)


@pytest.mark.parametrize("text", ["", "0", "-1GiB", "two", "3 GiBs", "1..2GB", "."])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="memory-budget"):
        parse_bytes(text)


PUBLISHED = {
    "gpt2": 124_439_808, "opt-125m": 125_239_296, "opt-1.3b": 1_315_758_080, "pythia-160m": 162_322_944,
    "pythia-1.4b": 1_414_647_808, "qwen2.5-0.5b": 494_032_768, "llama-3.2-1b": 1_235_814_400,
    "llama-3.1-8b": 8_030_261_248, "redpajama-3b": 2_775_864_320,
}
"""Parameters of the published models."""


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_parameters_of_the_published_models(name: str) -> None:
    shape = make_shape(f"shape:{name}", 1024)
    assert shape.extended is None
    assert sizes_of(shape.config, torch.bfloat16).weights == 2 * PUBLISHED[name]


def test_learnt_positions_are_extended_and_said_so() -> None:
    shape = make_shape("shape:gpt2", 4224)
    assert (shape.context, shape.extended) == (1024, 4224)
    assert sizes_of(shape.config, torch.float32).weights == 4 * (PUBLISHED["gpt2"] + (4224 - 1024) * 768)
    assert make_shape("shape:pythia-160m", 4224).extended is None


def test_sizes_are_those_of_the_model_that_is_made(family: str, model: nn.Module) -> None:
    sizes = sizes_of(small_config(family), torch.float32)
    assert sizes.weights == sum(p.numel() * 4 for p in model.parameters())
    layout = make_layout(layout_method("full", "0"), 20, 0, 0)
    with torch.inference_mode():
        session, _ = read_all(Reader(model), torch.ones(2, 20, dtype=torch.long), layout, 20)
    assert sizes.entry * 2 == session.cache.entry_bytes()


def test_a_step_reads_the_embeddings_only_where_they_are_the_output_too(family: str, model: nn.Module) -> None:
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight  # type: ignore[operator]
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    head = model.get_output_embeddings().weight.numel()  # type: ignore[operator]
    whole = sum(p.numel() for p in model.parameters())
    assert read_bytes(model) == 4 * (whole - tables + (head if tied else 0))
    assert weights_bytes(model) >= 4 * whole


def test_the_allocations_of_a_cpu_are_seen() -> None:
    memory = CpuMemory()
    with memory.watched():
        held = torch.ones(1 << 20)
        passing = torch.ones(1 << 20) + held
        del passing
        memory.begin_writing()
        more = torch.ones(1 << 19)
    assert held.numel() + more.numel() == (1 << 20) + (1 << 19)
    assert memory.peaks.prefill >= 3 * (4 << 20)
    assert (4 << 20) + (2 << 20) <= memory.peaks.decode < 3 * (4 << 20)


class FakeEvent:
    """An event of a GPU that ends half a second after the one before."""

    count = 0
    waited: list[str] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.count += 1
        self.at = FakeEvent.count
        FakeEvent.waited.append("event")

    def elapsed_time(self, other: FakeEvent) -> float:
        return 500.0 * (other.at - self.at)


def test_a_gpu_is_not_waited_for_while_its_tokens_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake GPU: events are recorded step by step, and read after the last."""
    FakeEvent.count, FakeEvent.waited = 0, []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: FakeEvent.waited.append("wait"))
    clock = clock_of(torch.device("cuda"))
    found = time_request(
        lambda watch: FakeRequest(FakeClock(), watch), clock, torch.device("cuda"), None  # type: ignore[arg-type]
    )
    assert FakeEvent.waited[0] == "wait"  # before the start
    first, last = FakeEvent.waited.index("event"), len(FakeEvent.waited) - 1 - FakeEvent.waited[::-1].index("event")
    assert "wait" not in FakeEvent.waited[first:last]
    assert found.timeline.gaps == pytest.approx([0.5] * 4)
    assert found.timeline.compress_s == pytest.approx(0.5)


def test_the_peaks_of_a_gpu_are_those_above_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([1000 + 70, 1000 + 30])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: next(peaks))
    memory = memory_of(torch.device("cuda"))
    with memory.watched():
        memory.begin_writing()
    assert (memory.peaks.prefill, memory.peaks.decode) == (70, 30)


def test_running_out_of_memory_is_known_in_all_its_words() -> None:
    for error in (
        MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_bandwidth_is_a_speed_that_a_machine_has() -> None:
    assert 1e8 < copy_bandwidth(CPU, 8 << 20) < 1e13


P, G = 96, 24


def bench_of(model: nn.Module) -> Bench:
    return Bench(CPU, torch.float32, model, Sizes(0, 1, 1, 1, 4), VOCABULARY)


def session_of(request: SessionRequest) -> LayoutSession:
    assert isinstance(request.session, LayoutSession)
    return request.session


def evicting(model: nn.Module, name: str, ratio: str, chunk: int = 16) -> SessionRequest:
    method = layout_method(name, ratio)
    layout = make_layout(method, P + G, 0, 3, TextStructure(prefix=P))
    prompt = torch.randint(1, VOCABULARY, (2, P), generator=torch.Generator().manual_seed(5))
    watch = Stopwatch(FakeClock())
    reader = Reader(model, adapter_for(model, method), watch.overhead)
    return SessionRequest(session_kind(layout)(reader, layout, P, chunk), model, prompt, G)


def written(request: SessionRequest | StockRequest, seed: int | None = None) -> Tensor:
    with torch.inference_mode():
        if isinstance(request, StockRequest):
            return torch.stack(list(request.write(request.read())), 1)
        with session_of(request).reader.ready():
            logits = request.read() if seed is None else request.fill(seed)
            return torch.stack(list(request.write(logits)), 1)


def test_the_stock_cache_and_ours_write_the_same(model: nn.Module) -> None:
    ours = evicting(model, "full", "0", chunk=P)
    stock = StockRequest(model, ours.prompt, G)
    assert torch.equal(written(ours), written(stock))
    assert (ours.entries, stock.entries) == (P + G - 1, P + G - 1)


TIMED = [
    (name, "0.6") for name, kind in METHODS.items()
    if name not in ("ccm-merge", "pic", "gist", "meanpool", "prompt", "ccm-concat") and issubclass(kind, LayoutMethod)
]
TIMED += [(name, "0.8") for name in ("pic", "gist", "meanpool", "prompt", "ccm-concat", "ccm-merge")]


@pytest.mark.parametrize(("name", "ratio"), TIMED)
def test_a_random_cache_stands_for_one_that_was_read(llama: nn.Module, name: str, ratio: str) -> None:
    """As many entries, the same positions and masks: filled with what reading left, it writes the same."""
    read, filled = evicting(llama, name, ratio), evicting(llama, name, ratio)
    with torch.inference_mode(), session_of(read).reader.ready():
        logits = read.read()
        twin = EvictingCache()
        for place, layer in enumerate(session_of(read).cache.layers):
            twin.update(layer.keys.clone(), layer.values.clone(), place)
        known = {name: getattr(session_of(read), name, None) for name in ("state", "pending")}
        texts = torch.stack(list(read.write(logits)), 1)
    with torch.inference_mode(), session_of(filled).reader.ready():
        filled.fill(7)
        assert filled.entries == twin.entries()
        session_of(filled).cache = twin
        if isinstance(session_of(filled), MemorySession):  # what it has read is written later
            for what, value in known.items():
                setattr(session_of(filled), what, value)
        assert torch.equal(torch.stack(list(filled.write(logits)), 1), texts)
    assert filled.entries == read.entries


def test_a_filled_cache_has_the_size_of_one_that_was_read(llama: nn.Module) -> None:
    for name in ("full", "sinks", "sentinel"):
        request = evicting(llama, name, "0.6")
        with torch.inference_mode(), session_of(request).reader.ready():
            request.fill(7)
            logical, physical = cache_bytes(request)
        again = evicting(llama, name, "0.6")
        with torch.inference_mode(), session_of(again).reader.ready():
            again.read()
            assert cache_bytes(again) == (logical, physical)
        assert torch.equal(written(request, seed=7), written(evicting(llama, name, "0.6"), seed=7))


def test_random_entries_are_seeded(llama: nn.Module) -> None:
    def first(seed: int) -> Tensor:
        return next(iter(random_entries(llama, 2, 5, seed)))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
    assert first(1).shape == (2, 2, 5, 16)


@pytest.mark.parametrize(("name", "ratio"), TIMED)
def test_memory_holds_little_more_than_what_is_alive(llama: nn.Module, name: str, ratio: str) -> None:
    """At every step of writing: at most one entry in 32 above what is held, or one."""
    request = evicting(llama, name, ratio)
    with torch.inference_mode(), session_of(request).reader.ready():
        logits = request.read()
        logical, physical = cache_bytes(request)
        assert physical == logical
        per_entry = session_of(request).cache.entry_bytes()
        for _ in request.write(logits):
            logical, physical = cache_bytes(request)
            assert physical <= logical + per_entry * max(1, request.held // 32)


def test_peaks_fall_with_what_is_removed(llama: nn.Module) -> None:
    def weighed(name: str, ratio: str, chunk: int) -> tuple[int, int]:
        with torch.inference_mode():
            found = measure_memory(lambda: evicting(llama, name, ratio, chunk), CpuMemory(), None)
        return found.prefill_peak, found.decode_peak

    full, sinks = weighed("full", "0", P), weighed("sinks", "0.8", 16)
    assert sinks[0] < full[0]
    assert sinks[1] < full[1]


def test_compaction_moves_only_the_last_entries(llama: nn.Module) -> None:
    """In place: the storage stays, and what remains is what was alive, wherever it lies."""
    cache = EvictingCache()
    keys = torch.arange(130.0).view(1, 1, 130, 1)
    cache.holes = torch.empty(0, dtype=torch.long)
    cache.update(keys, keys, 0)
    storage = cache.layers[0].keys.data_ptr()
    cache.compact(torch.tensor([129]), torch.tensor([3]), 128)
    assert cache.layers[0].keys.data_ptr() == storage
    assert sorted(cache.layers[0].keys.flatten().tolist()) == [float(i) for i in (*range(3), *range(4, 128), 129)]


def test_a_random_adapter_fits_every_trained_method(llama: nn.Module) -> None:
    for name, kind in METHODS.items():
        if kind.adapter_kinds:
            method = make_method(name, Fraction("0.8"))
            card = AdapterCard(name, kind.adapter_kinds[0], 8, 8.0, method.n_rows, "random", "")
            assert Adapter.fresh(card, llama).rows.shape[0] == method.n_rows


@pytest.mark.parametrize("n", [9, 12, 15, 40])
def test_the_median_of_another_run_lies_in_the_interval(n: int) -> None:
    rng = np.random.default_rng(n)
    inside = 0
    for _ in range(1000):
        low, high = repeat_interval(rng.exponential(size=n))
        inside += low <= np.median(rng.exponential(size=n)) <= high
    assert 0.935 <= inside / 1000 < 1


def test_few_values_lie_all_in_the_interval() -> None:
    assert repeat_interval(np.array([3.0, 1.0, 2.0])) == (1.0, 3.0)
    assert repeat_interval(np.arange(8.0)) == (0.0, 7.0)
    assert np.isnan(repeat_interval(np.array([1.0]))[0])


def test_the_slope_of_a_line_is_found_with_its_interval() -> None:
    rng = np.random.default_rng(1)
    x = np.linspace(0, 10, 40)
    slope, low, high = fitted_slope(x, 3 + 2 * x + rng.normal(scale=0.1, size=40))
    assert low < 2 < high
    assert slope == pytest.approx(2, abs=0.05)
    assert high - low < 0.05


def test_the_full_cache_is_read_at_once_without_a_mask(llama: nn.Module) -> None:
    """The kernel's own causal rule does it: the logits are those of the model called by itself."""
    request = evicting(llama, "full", "0", chunk=P)
    with torch.inference_mode():
        expected = llama(input_ids=request.prompt, logits_to_keep=1).logits[:, -1]
        assert (request.read() - expected).abs().max() < 1e-6


def test_continuations_draw_as_before_where_some_rows_are_greedy(llama: nn.Module) -> None:
    layout = make_layout(layout_method("full", "0"), P + G, 0, 0, TextStructure(prefix=P))
    uniforms = torch.rand(2, 2, G, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    uniforms[:, 1] = torch.nan
    prompt = torch.randint(1, VOCABULARY, (2, P), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        together, greedy = (
            texts(LayoutSession(Reader(llama), layout, P), prompt, numbers).view(2, -1, G)
            for numbers in (uniforms, uniforms[:, 1:])
        )
    assert torch.equal(together[:, 1:], greedy)


def test_small_models_of_all_families_can_be_timed(family: str) -> None:
    request = evicting(small_model(family), "sinks", "0.6")
    with torch.inference_mode(), session_of(request).reader.ready():
        request.fill(0)
        assert len(list(request.write(torch.zeros(2, VOCABULARY)))) == G
