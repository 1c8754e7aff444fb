"""What kvpress keeps of random keys, values and queries: run in an environment of its own.

    python -m venv /tmp/kvpress && /tmp/kvpress/bin/pip install kvpress==0.5.5
    /tmp/kvpress/bin/python tests/parity/make_fixtures.py

kvpress (Apache-2.0) cannot be installed beside kvbench: it needs an older transformers. Its scores are called as they
are, on tensors that are made here; nothing of its code is in this repository.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import kvpress
import numpy as np
import torch

BATCH, HEADS, GROUP, LENGTH, WIDTH = 2, 2, 2, 200, 16
WINDOW, KERNEL, CHUNK, LAG, SINKS, FUTURE = 20, 5, 10, 32, 4, 64
RATIO = 0.5


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(BATCH, HEADS, LENGTH, WIDTH, generator=generator) for _ in range(2))
    keys *= torch.rand(BATCH, HEADS, LENGTH, 1, generator=generator) + 0.5
    queries = torch.randn(BATCH, HEADS * GROUP, LENGTH, WIDTH, generator=generator)
    logits = queries @ keys.repeat_interleave(GROUP, 1).transpose(-1, -2) / WIDTH**0.5
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    attention = logits.masked_fill(~causal, float("-inf")).softmax(-1)
    config = SimpleNamespace(num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS)
    speeds = 10000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH)

    def rotary_emb(_: object, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = (places[..., None] * speeds).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    module = SimpleNamespace(config=config, head_dim=WIDTH, rotary_emb=rotary_emb, q_proj=torch.nn.Identity())
    hidden = queries.transpose(1, 2).reshape(BATCH, LENGTH, -1)  # whose projection is the queries, before rotation
    presses = {
        "knorm": kvpress.KnormPress(RATIO), "keydiff": kvpress.KeyDiffPress(RATIO),
        "lagkv": kvpress.LagKVPress(RATIO, n_sink=SINKS, lag_size=LAG),
        "snapkv": kvpress.SnapKVPress(RATIO, window_size=WINDOW, kernel_size=KERNEL),
        "expected-attention": kvpress.ExpectedAttentionPress(RATIO, n_sink=SINKS, n_future_positions=FUTURE),
        "tova": kvpress.TOVAPress(RATIO), "streaming-llm": kvpress.StreamingLLMPress(RATIO, n_sink=SINKS),
    }
    found = {
        "keys": keys, "values": values, "queries": queries[:, :, -WINDOW:], "all_queries": queries, "speeds": speeds,
    }
    for name, press in presses.items():
        scores = press.score(module, hidden, keys, values, attention, {})
        found[f"kept:{name}"] = scores.topk(int(LENGTH * (1 - RATIO)), dim=-1).indices.sort(-1).values
    chunk = kvpress.ChunkKVPress(presses["snapkv"], chunk_length=CHUNK)
    snap = presses["snapkv"].score(module, hidden, keys, values, attention, {})
    presses["snapkv"].score = lambda *_: snap  # it asks without attention, and queries would come from hidden states
    for row in range(BATCH):  # it takes the first row's chunks for all rows
        presses["snapkv"].score = lambda *_, row=row: snap[row : row + 1]
        numbered = torch.arange(LENGTH).view(1, 1, -1, 1).expand(1, HEADS, -1, WIDTH).float()
        chosen, _ = chunk.compress(module, hidden, numbered, numbered, None, {})
        found[f"kept:chunkkv:{row}"] = chosen[..., 0].long()
    path = Path(__file__).with_name("kvpress.npz")
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in found.items()})
    print(path, {name: tuple(tensor.shape) for name, tensor in found.items()}, getattr(kvpress, "__version__", ""))


if __name__ == "__main__":
    main()
