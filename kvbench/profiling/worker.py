"""The profiling child: times cells in turn, or weighs one, and reports events to its parent."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvbench.errors import UserError
from kvbench.execution.channel import CONTAINED, At, Channel, End, Failed, Ready, Records, failure_of, serving
from kvbench.profiling.bandwidth import copy_bandwidth
from kvbench.profiling.bench import Bench, make_bench
from kvbench.profiling.clock import clock_of
from kvbench.profiling.job import MEMORY, PROBE, ROUNDS, TIME, ProfileJob
from kvbench.profiling.memory import free_bytes, memory_of, read_bytes, rss_peak, weights_bytes
from kvbench.profiling.passes import measure_memory, time_request
from kvbench.store.manifest import Machine
from kvbench.store.profile_records import FULL, STOCK, MemoryRecord, ProbeRecord, ProfileRecord, TimingRecord
from kvbench.store.records import Cell
from kvbench.units import bytes_of

STABLE = 0.05
"""Warming up ends when two requests in a row differ by less."""

WARM_TOKENS, SLOW_TOKENS = 16, 32
"""Tokens written to warm up, and by a cache of transformers that is not near ours."""
SLOW = 1.5
"""Times the seconds per token of ours from which that cache is timed once per process."""

SMALLER = "Use a smaller --batch-size or --seq-len, or --dtype bfloat16."
"""What to do where memory is short."""

LEAST_ROUNDS, SECONDS = 2, 60.0
"""Fewer rounds are run if they would take longer, but not fewer than the least."""


class CellFailedError(Exception):
    """A cell could not be run; the parent has been told, and goes on in a new process."""


class Worker:
    """Runs one job. Nothing is run before the parent says so."""

    def __init__(self, job: ProfileJob, channel: Channel) -> None:
        self.job, self.say = job, channel.say

    def prepare(self) -> Bench:
        """Load the model, and tell the parent what it is.

        Raises:
            UserError: the request cannot be carried out on this model or machine.
        """
        job, first = self.job, self.job.cells[0]
        if job.threads:
            torch.set_num_threads(job.threads)
        bench = make_bench(job.location, first, job.positions)
        if job.budget and bench.sizes.weights >= job.budget:
            raise UserError(
                f"--memory-budget {bytes_of(job.budget)} is less than the weights of {first.model} take "
                f"({bytes_of(bench.sizes.weights)}).", "Give a larger budget, or choose a smaller model.",
            )
        if job.kind == TIME and job.budget > bench.sizes.weights + free_bytes(bench.device):
            raise UserError(
                f"--memory-budget {bytes_of(job.budget)} is more than there is: "
                f"{bytes_of(bench.sizes.weights + free_bytes(bench.device))} with the weights.",
                "Give a smaller budget.",
            )
        is_gpu = bench.device.type == "cuda"
        self.say(Ready(machine=Machine(
            notes=tuple(bench.notes), mark=bench.facts.mark, probe=bench.facts.as_dict(), weights=bench.sizes.weights,
            entry=bench.sizes.entry, threads=torch.get_num_threads(), device=str(bench.device),
            dtype=str(bench.dtype).removeprefix("torch."),
            device_name=torch.cuda.get_device_name(bench.device) if is_gpu else None,
            device_bytes=torch.cuda.mem_get_info(bench.device)[1] if is_gpu else None,
        )))
        return bench

    def run(self, bench: Bench) -> None:
        """Carry out the job."""
        try:
            {TIME: self._time, MEMORY: self._memory, PROBE: self._probe}[self.job.kind](bench)
        except CellFailedError:
            return
        self.say(End())

    def _time(self, bench: Bench) -> None:
        """Every cell in turn, forwards and backwards, after each has been warmed up."""
        cells, job = list(self.job.cells), self.job
        warm = {}
        for cell in cells:
            with self.guarded(cell, bench):
                warm[cell.name] = self._warm(bench, cell)
        is_slow = STOCK in warm and FULL in warm and warm[STOCK] > SLOW * warm[FULL]
        bandwidth: float | None = copy_bandwidth(bench.device)
        started, number, rounds = time.perf_counter(), 0, job.rounds or ROUNDS
        while number < rounds:
            for cell in cells if (number + job.repeat) % 2 == 0 else reversed(cells):
                tokens = SLOW_TOKENS if is_slow and cell.name == STOCK else None
                if number and tokens:
                    continue
                with self.guarded(cell, bench):
                    self._tell(cell, self._timed(bench, cell, number, tokens, bandwidth))
                bandwidth = None
            number += 1
            if not job.rounds and number * SECONDS < rounds * (time.perf_counter() - started):
                rounds = min(rounds, max(LEAST_ROUNDS, int(number * SECONDS / (time.perf_counter() - started))))

    def _warm(self, bench: Bench, cell: Cell) -> float:
        """Seconds per token of the last request that warmed the cell up; 0 if there was none."""
        last = record = None
        for number in range(self.job.warmups):
            record = self._timed(bench, cell, number, WARM_TOKENS, None, warmup=True)
            self._tell(cell, record)
            if last is not None and abs(record.wall_s / last - 1) < STABLE:
                break
            last = record.wall_s
        return record.tpot_s if record else 0.0

    def _timed(
        self, bench: Bench, cell: Cell, number: int, tokens: int | None, bandwidth: float | None, warmup: bool = False
    ) -> TimingRecord:
        seed = prompt_seed(cell.seed, self.job.repeat, number, warmup)
        fill = seed if cell.options["fill"] == "synthetic" else None
        with bench.ready(cell):
            found = time_request(
                lambda watch: bench.request(cell, seed, watch.overhead), clock_of(bench.device), bench.device, fill,
                tokens,
            )
        line, is_read = found.timeline, fill is None
        return TimingRecord(
            self.job.repeat, number, warmup, line.prefill_s if is_read else None,
            line.compress_s if is_read else None, line.ttft_s if is_read else None,
            line.gaps, found.wall_s, int(cell.options["seq_len"]), found.held, found.entries,
            read_bytes(bench.model), bench.sizes.entry * int(cell.options["batch_size"]), bandwidth,
        )

    def _memory(self, bench: Bench) -> None:
        cell = self.job.cells[0]
        with self.guarded(cell, bench):
            self._tell(cell, self._memory_record(bench, cell))

    def _memory_record(self, bench: Bench, cell: Cell) -> MemoryRecord:
        seed = prompt_seed(cell.seed, 0, 0, False)
        fill = seed if cell.options["fill"] == "synthetic" else None
        adapter = bench.adapter_of(cell)
        weights = weights_bytes(bench.model, adapter)
        memory = memory_of(bench.device)
        with bench.ready(cell):
            found = measure_memory(lambda: bench.request(cell, seed), memory, fill)
        prompt = int(cell.options["seq_len"])
        return MemoryRecord(
            weights, found.prefill_peak if fill is None else None, found.decode_peak, *found.read,
            prompt * bench.sizes.entry * int(cell.options["batch_size"]), *found.written, found.held, prompt,
            found.entries_peak, rss_peak(), "cuda allocator" if bench.device.type == "cuda" else "profiler",
        )

    def _probe(self, bench: Bench) -> None:
        """Whether the cell, at its batch, stays within the budget; running out of memory is an answer."""
        cell, budget = self.job.cells[0], self.job.budget or bench.sizes.weights + free_bytes(bench.device)
        batch = int(cell.options["batch_size"])
        with self.guarded(cell, None):
            needed = bench.needed(cell)
            why = f"needs at least {bytes_of(needed)}" if needed > budget else bench.refusal(cell)
            if why is None:
                try:
                    memory = self._memory_record(bench, cell)
                    needed = memory.weights + max(memory.prefill_peak or 0, memory.decode_peak)
                    why = "" if needed <= budget else f"took {bytes_of(needed)}"
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    why = "out of memory"
            self._tell(cell, ProbeRecord(batch, not why, why, needed))

    def _tell(self, cell: Cell, record: ProfileRecord) -> None:
        self.say(Records(cell.key, (dataclasses.asdict(record),)))

    @contextmanager
    def guarded(self, cell: Cell, bench: Bench | None) -> Iterator[None]:
        """A fault inside stays in the cell: it is reported, and this process ends.

        A shape that does not fit in free memory is refused before anything is allocated (if there is a ``bench``
        to ask).

        Raises:
            CellFailedError: there was a fault.
        """
        self.say(At(cell.key))
        try:
            refusal = bench.refusal(cell) if bench else None
            if refusal is not None:
                raise UserError(refusal, SMALLER)
            yield
        except CONTAINED as error:
            hint = SMALLER if is_out_of_memory(error) else None
            self.say(Failed(failure_of(cell.key, cell.label, error, hint)))
            raise CellFailedError from error


def prompt_seed(seed: int, repeat: int, number: int, warmup: bool) -> int:
    """Prompts are fresh for every request, and the same for all cells of a round."""
    return ((seed * 1000 + repeat) * 1000 + number) * 2 + warmup


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, in one of the ways that PyTorch has for it."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in words)


def main() -> None:
    """Entry of the child."""
    with serving() as (job, channel):
        worker = Worker(ProfileJob.from_json(job), channel)
        bench = worker.prepare()
        if sys.stdin.readline():
            worker.run(bench)


if __name__ == "__main__":
    main()
