"""Probing a model once: what was found is kept by its fingerprint, and by the versions that it was found with."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from kvbench import __version__
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded
from kvbench.probe.asking import LENGTH, apart, examine
from kvbench.store.cached import read_cache, write_cache

FILE = "probes.json"
PROBE = 4
"""Raised whenever the probe asks something else."""

MOST = 4096
"""Tokens of the longest text at which both ways of reading are compared."""

_TEXT = (
    "The harbour lay quiet in the morning, and three boats had already gone out before the bell rang. Nobody on the "
    "quay spoke of the 4821 crates that were to come, or of what they would hold when they came. "
)


def probed(loaded: Loaded, fingerprint: str) -> ModelFacts:
    """What a short probe of the model shows.

    Args:
        fingerprint: of its files; empty to ask anew.
    """
    key = _key(loaded, fingerprint)
    kept = read_cache(FILE).get(key) if key else None
    if isinstance(kept, dict):
        try:
            return ModelFacts.load(kept)
        except TypeError:  # of another probe
            pass
    facts = examine(loaded.model, sample(loaded, min(LENGTH, loaded.context)))
    _keep(key, facts.as_dict())
    return facts


def apart_at(loaded: Loaded, fingerprint: str, longest: int) -> tuple[int, float]:
    """How far the two ways of reading lie apart in a text as long as the longest that will be read.

    Returns:
        Its tokens, at most 4096, and nats per token.
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
    """Ids ``[1, length]`` of some text, repeated as often as it takes."""
    device = next(loaded.model.parameters()).device
    length = max(2, length)
    ids = [i for i in loaded.tokenizer(_TEXT, add_special_tokens=False).input_ids if i < loaded.vocabulary]
    if len(set(ids)) < 8:  # a tokenizer that does not know the language
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
