"""Record types of profiling: one timed request, one memory pass, one probe of a batch size, the end of a search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

FULL, AGAIN, STOCK = "full", "full-again", "full-dynamic"
"""The full cache; the same measured again, which shows the noise; and the full cache of transformers."""


class Spans(Protocol):
    """The time spans of one request."""

    @property
    def gaps(self) -> tuple[float, ...]:
        """Seconds between consecutive tokens; the time to the first token is not among them."""

    @property
    def prefill_s(self) -> float | None:
        """Seconds from the prompt on the device to the logits of its last token; None if no prompt was read."""

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first."""


class Rates:
    """Rates of one request, computed from its time spans; used by clocks and by reports."""

    @property
    def tpot_s(self: Spans) -> float:
        """Seconds per token after the first: (end to end - first token) / (tokens - 1)."""
        return sum(self.gaps) / len(self.gaps)

    def decode_tok_s(self: Spans, batch: int) -> float:
        """Tokens generated per second of decoding, in the whole batch; the first of each row is not counted."""
        return batch / self.tpot_s

    def prefill_tok_s(self: Spans, prompt: int, batch: int) -> float | None:
        """Prompt tokens read per second, in the whole batch; None if no prompt was read."""
        return prompt * batch / self.prefill_s if self.prefill_s else None


@dataclass(frozen=True)
class TimingRecord(Rates):
    """One request that was timed.

    Attributes:
        repeat: index of the process; ``round``: index of the request within it. Records of different cells with
            equal repeat and round were timed in turn and are compared in pairs.
        warmup: whether it is a warm-up request, which no statistic includes.
        prefill_s, compress_s, ttft_s: seconds (see :class:`kvbench.profiling.clock.Timeline`); None if
            the cache was filled instead of read.
        gaps: seconds between consecutive tokens.
        wall_s: wall-clock seconds, synchronised with the device.
        raw: tokens of the prompt; ``held``: entries held after prefill.
        entries: mean over decoding steps of the entries in the cache, including dead ones not overwritten yet.
        read_bytes: bytes of weights that a step reads; ``entry_bytes``: bytes of one entry, over all layers and rows.
        bandwidth: bytes per second that this machine copies, read and written both counted; None except in
            the first timed record of a process.
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
    """The bytes that one request used, measured in a pass and a process of their own.

    Attributes:
        weights: bytes of model and adapter.
        prefill_peak, decode_peak: peak bytes allocated beyond the weights during prefill and during decoding;
            the first is None if the cache was filled instead of read.
        kv_logical, kv_physical, kv_full: bytes of the cache after prefill: entries held x bytes per entry,
            distinct storages alive, and what all tokens of the prompt would take.
        kv_logical_end, kv_physical_end: the same after the last token was generated.
        held, raw, entries_peak: entries held after prefill, tokens of the prompt, the most entries ever held.
        rss_peak: peak resident memory of the process, in bytes.
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
    """Whether one request of a batch size fits in the memory budget; ``needed``: bytes that it takes."""

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
    """The result of a search: the largest batch that fits, 0 if not even one row does."""

    batch: int
    kind: str = "search"
    key: str = "search"


ProfileRecord = TimingRecord | MemoryRecord | ProbeRecord | SearchRecord


def load_profile_record(raw: dict[str, Any]) -> ProfileRecord:
    """Create a record from the output of ``dataclasses.asdict``.

    Raises:
        TypeError, KeyError: a field is missing or unknown.
    """
    if raw["kind"] == "time":
        return TimingRecord(**{**raw, "gaps": tuple(raw["gaps"])})
    kinds: dict[str, type[MemoryRecord | ProbeRecord | SearchRecord]] = {
        "memory": MemoryRecord, "probe": ProbeRecord, "search": SearchRecord,
    }
    return kinds[raw["kind"]](**raw)
