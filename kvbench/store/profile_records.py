"""What profiling records: one timed request, one memory pass, one probe of a batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

FULL, AGAIN, STOCK = "full", "full-again", "full-dynamic"
"""The baseline, its twin that shows the noise, and the same in the cache of transformers."""


class Spans(Protocol):
    """The spans of one request."""

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between one new token and the next; the first token is in none of them."""

    @property
    def prefill_s(self) -> float | None:
        """Seconds from the prompt on the device to the logits of its last token; None where none was read."""

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""


class Rates:
    """What follows from the spans of one request: the one definition, on the clock and in reports."""

    @property
    def tpot_s(self: Spans) -> float:
        """Seconds per token after the first: (end to end - first token) / (tokens - 1)."""
        return sum(self.gaps) / len(self.gaps)

    def decode_tok_s(self: Spans, batch: int) -> float:
        """Tokens written per second of decoding, in the whole batch; the first of each is not counted."""
        return batch / self.tpot_s

    def prefill_tok_s(self: Spans, prompt: int, batch: int) -> float | None:
        """Prompt tokens read per second, in the whole batch; None where none was read."""
        return prompt * batch / self.prefill_s if self.prefill_s else None


@dataclass(frozen=True)
class TimingRecord(Rates):
    """One request that was timed.

    Attributes:
        repeat: number of the process; ``round`` the place within it. Records of different cells with
            equal repeat and round were taken in turn and are compared in pairs.
        warmup: taken to warm up, and in no statistic.
        prefill_s, compress_s, ttft_s: seconds (see :class:`kvbench.profiling.clock.Timeline`); None where
            the cache was filled instead of read.
        gaps: seconds between one new token and the next.
        wall_s: seconds by the clock on the wall, the device waited for.
        raw: tokens of the prompt; ``held`` the entries when it had been read.
        entries: mean over the steps of the entries in the cache, dead ones that wait for reuse included.
        read_bytes: bytes of weights that a step reads; ``entry_bytes`` of one entry, all layers and rows.
        bandwidth: bytes per second that this machine copies, read and written counted; None but in the
            first record of a process.
    """

    repeat: int
    round: int
    warmup: bool
    prefill_s: float | None
    compress_s: float | None
    ttft_s: float | None
    gaps: tuple[float, ...]
    wall_s: float
    raw: int
    held: int
    entries: float
    read_bytes: int
    entry_bytes: int
    bandwidth: float | None = None
    kind: str = "time"

    @property
    def key(self) -> str:
        return f"time/{self.repeat}/{'warm' if self.warmup else 'round'}/{self.round}"

    @property
    def pair(self) -> tuple[int, int]:
        return self.repeat, self.round


@dataclass(frozen=True)
class MemoryRecord:
    """The bytes that one request took, measured in a pass and a process of their own.

    Attributes:
        weights: of model and adapter.
        prefill_peak, decode_peak: the most allocated beyond the weights while the prompt was read and while
            text was written; the first is None where the cache was filled instead.
        kv_logical, kv_physical, kv_full: entries held x bytes per entry, distinct storages alive, and what
            all tokens of the prompt would take: when the prompt had been read.
        kv_logical_end, kv_physical_end: the same when the last token had been written.
        held, raw, entries_peak: entries then, tokens of the prompt, the most entries ever held.
        rss_peak: the most of the process that was ever in main memory.
        allocator: what reported the peaks.
    """

    weights: int
    prefill_peak: int | None
    decode_peak: int
    kv_logical: int
    kv_physical: int
    kv_full: int
    kv_logical_end: int
    kv_physical_end: int
    held: int
    raw: int
    entries_peak: int
    rss_peak: int
    allocator: str
    kind: str = "memory"
    key: str = "memory"


@dataclass(frozen=True)
class ProbeRecord:
    """Whether one request of a batch size fits in the memory budget."""

    batch: int
    fits: bool
    why: str
    needed: int
    kind: str = "probe"

    @property
    def key(self) -> str:
        return f"probe/{self.batch}"


@dataclass(frozen=True)
class SearchRecord:
    """The end of a search: the largest batch that fits, 0 if not even one row does."""

    batch: int
    kind: str = "search"
    key: str = "search"


ProfileRecord = TimingRecord | MemoryRecord | ProbeRecord | SearchRecord


def load_profile_record(raw: dict[str, Any]) -> ProfileRecord:
    """From what ``dataclasses.asdict`` made of it.

    Raises:
        TypeError, KeyError: something is missing, or too much.
    """
    if raw["kind"] == "time":
        return TimingRecord(**{**raw, "gaps": tuple(raw["gaps"])})
    kinds: dict[str, type[MemoryRecord | ProbeRecord | SearchRecord]] = {
        "memory": MemoryRecord, "probe": ProbeRecord, "search": SearchRecord,
    }
    return kinds[raw["kind"]](**raw)
