"""Probing a model once: results are cached by the model's fingerprint and the versions of the software."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvbench import __version__
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded
from kvbench.probe.probing import LENGTH, apart, examine
from kvbench.store.cached import read_cache, write_cache

FILE = "probes.json"
PROBE = 4
"""Version of the probe; to be raised whenever its tests change."""

MOST = 4096
"""Length in tokens of the longest text on which ways of reading are compared."""

_TEXT = (
    "The harbour lay quiet in the morning, and three boats had already gone out before the bell rang. Nobody on the "
    "quay spoke of the 4821 crates that were to come, or of what they would hold when they came. "
)


def probed(loaded: Loaded, fingerprint: str) -> ModelFacts:
    """Facts about the model, from the cache or from a new probe.

    Args:
        fingerprint: of the model's files; empty to probe without the cache.
    """
    key = _key(loaded, fingerprint)
    kept = read_cache(FILE).get(key) if key else None
    if isinstance(kept, dict):
        try:
            return ModelFacts.load(kept)
        except TypeError:  # written by another version of the probe
            pass
    facts = examine(loaded.model, sample(loaded, min(LENGTH, loaded.context)))
    _keep(key, facts.as_dict())
    return facts


def apart_at(loaded: Loaded, fingerprint: str, longest: int) -> tuple[int, float]:
    """Compare ways of reading a text (see ``apart``) on one as long as the longest that will be read.

    Returns:
        Length of the text, at most 4096 tokens, and the difference in nats per token.
    """
    length = min(longest, MOST)
    key = f"{_key(loaded, fingerprint)}-{length}" if fingerprint else ""
    kept = read_cache(FILE).get(key) if key else None
    if isinstance(kept, float):
        return length, kept
    found = apart(loaded.model, sample(loaded, length))
    _keep(key, found)
    return length, found


def sample(loaded: Loaded, length: int) -> torch.Tensor:
    """Ids ``[1, length]`` of a sample text, repeated as needed; shuffled if longer than ``LENGTH``."""
    device = next(loaded.model.parameters()).device
    length = max(2, length)
    ids = [i for i in loaded.tokenizer(_TEXT, add_special_tokens=False).input_ids if i < loaded.vocabulary]
    if len(set(ids)) < 8:  # the tokenizer does not cover English
        ids = list(range(min(8, loaded.vocabulary // 2), min(loaded.vocabulary, 90)))
    generator = torch.Generator().manual_seed(length)
    many = torch.tensor(ids).repeat(-(-length // len(ids)))[:length]
    order = torch.randperm(length, generator=generator) if length > LENGTH else torch.arange(length)
    return many[order][None].to(device)


def _key(loaded: Loaded, fingerprint: str) -> str:
    if not fingerprint:
        return ""
    import transformers

    like: Any = next(loaded.model.parameters())
    versions = (PROBE, __version__, torch.__version__, transformers.__version__)
    said = (*versions, fingerprint, str(like.dtype), like.device.type)
    return hashlib.sha256(repr(said).encode()).hexdigest()[:24]


def _keep(key: str, found: Any) -> None:
    if key:
        write_cache(FILE, {**read_cache(FILE), key: found})
