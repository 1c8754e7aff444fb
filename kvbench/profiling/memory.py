"""Memory: bytes of weights, of prefill and of decoding, and free bytes.

On a GPU, PyTorch's allocator reports the peaks. On a CPU, they are summed up from every allocation that
PyTorch's profiler reports. Both slow down the work, so memory is measured in a pass of its own.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvbench.cache.evicting import storage_bytes
from kvbench.cache.shape import cache_shape
from kvbench.models.configuration import text_config

_WRITES = "kvbench: writing begins"
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUP = (
    ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
"""Files with the memory limit and the memory use of a container (cgroup version 2 and 1)."""


@dataclass
class Peaks:
    """Peak bytes allocated beyond what was allocated at the start, by phase."""

    prefill: int = 0
    decode: int = 0


class CpuMemory:
    """Peaks on a CPU, from the allocations that PyTorch's profiler records."""

    def __init__(self) -> None:
        self.peaks = Peaks()

    @contextmanager
    def watched(self) -> Iterator[None]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            yield
        events = sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        alive, place = 0, "prefill"
        for event in events:
            if event.name() == _WRITES:
                place, self.peaks.decode = "decode", alive
            elif event.name() == "[memory]":
                alive += event.nbytes()
                setattr(self.peaks, place, max(getattr(self.peaks, place), alive))

    def begin_writing(self) -> None:
        with torch.profiler.record_function(_WRITES):
            pass


class CudaMemory:
    """Peaks on a GPU, from PyTorch's CUDA allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.peaks = device, Peaks()

    @contextmanager
    def watched(self) -> Iterator[None]:
        self._base = self._reset()
        yield
        self.peaks.decode = self._peak()

    def begin_writing(self) -> None:
        self.peaks.prefill = self._peak()
        self._reset()

    def _reset(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return int(torch.cuda.memory_allocated(self.device))

    def _peak(self) -> int:
        torch.cuda.synchronize(self.device)
        return int(torch.cuda.max_memory_allocated(self.device)) - self._base


def memory_of(device: torch.device) -> CpuMemory | CudaMemory:
    return CudaMemory(device) if device.type == "cuda" else CpuMemory()


def rss_peak() -> int:
    """Peak resident memory of this process, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device: of the machine, or of the container if that is less."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    import psutil  # imported late: not needed on a GPU

    free = int(psutil.virtual_memory().available)
    for most, used in _CGROUP:
        try:
            limit = (_CGROUPS / most).read_text(encoding="ascii").strip()
            taken = int((_CGROUPS / used).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if limit.isdecimal():
            free = min(free, max(0, int(limit) - taken + _reclaimable((_CGROUPS / used).with_name("memory.stat"))))
    return free


def _reclaimable(path: Path) -> int:
    """Bytes of a container's page cache, which the system frees when memory is needed."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = [line.split() for line in lines if line.startswith(("inactive_file ", "total_inactive_file "))]
    return max((int(value) for _, value in found), default=0)


def weights_bytes(*modules: nn.Module | None) -> int:
    """Bytes of all parameters and buffers; shared storages count once."""
    return storage_bytes([t for m in modules if m is not None for t in (*m.parameters(), *m.buffers())])


def read_bytes(model: nn.Module) -> int:
    """Bytes of the weights that generating a token reads: all but embedding tables, of which only rows are read.

    An embedding table counts if it is also the output layer. Of a mixture of experts, all experts are counted.
    """
    output: Any = model.get_output_embeddings()  # type: ignore[operator]
    head = None if output is None else output.weight
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.weight is not head]
    skipped = {table.data_ptr() for table in tables}
    return storage_bytes([p for p in model.parameters() if p.data_ptr() not in skipped])


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that determine its memory, known before it is created.

    Attributes:
        weights: bytes of its weights.
        entry: bytes of one cache entry of one row, over all layers.
        wide: numbers per token at the widest point of a layer.
        vocabulary: numbers per row of logits.
        number: bytes per number.
    """

    weights: int
    entry: int
    wide: int
    vocabulary: int
    number: int

    def needed(self, batch: int, entries: int, fed: int) -> int:
        """Approximate lower bound in bytes for ``entries`` held and ``fed`` tokens per forward pass, with weights."""
        activations = fed * self.wide + self.vocabulary
        return self.weights + batch * (entries * self.entry + activations * self.number)


def sizes_of(config: Any, dtype: torch.dtype) -> Sizes:
    """Sizes of a causal language model from its configuration; nothing is allocated."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    number = torch.empty(0, dtype=dtype).element_size()
    tensors = {id(p): p.numel() for p in model.parameters()}
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    entry = config.num_hidden_layers * 2 * shared * width * number
    return Sizes(sum(tensors.values()) * number, entry, _wide(config), int(config.vocab_size), number)


def sizes_of_model(model: nn.Module, vocabulary: int) -> Sizes:
    """Sizes of a loaded model, from its weights and from what it caches."""
    number = next(model.parameters()).element_size()
    return Sizes(weights_bytes(model), cache_shape(model).entry_bytes, _wide(model.config), vocabulary, number)


def _wide(config: Any) -> int:
    config = text_config(config)
    named = [getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")]
    inner = max([size for size in named if isinstance(size, int)] or [4 * config.hidden_size])
    return int(2 * config.hidden_size + inner)
