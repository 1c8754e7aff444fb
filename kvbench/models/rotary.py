"""Rotary position embeddings, as far as entries of the cache have to be turned again."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from kvbench.errors import UserError


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """``x`` ``[..., entries, width]`` turned by angles ``[entries, d / 2]``; what is beyond d stays.

    The halves of the first d numbers are the two coordinates, as in Llama, Qwen and GPT-NeoX. A
    turn back is the same with the sine negated.
    """
    half = cosine.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    turned = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)


def has_rotary(model: nn.Module) -> bool:
    """Whether positions are rotations, which go on beyond the model's context."""
    return any(name.endswith("inv_freq") for name, _ in model.named_buffers())


def frequencies(model: nn.Module) -> Tensor | None:
    """Angle per position of each pair of coordinates ``[d / 2]``; None without rotary embeddings.

    Raises:
        UserError: rotations that depend on the length of the text or on the layer, or another order
            of coordinates.
    """
    found = [m for m in model.modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
    if not found and not has_rotary(model):
        return None
    kind = getattr(found[0], "rope_type", "default") if found else "several kinds of"
    half_turn = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    probe = torch.tensor([1.0, 2.0, 3.0, 4.0])
    fixed = bool(found) and kind not in ("dynamic", "longrope")
    if not fixed or half_turn is None or half_turn(probe).tolist() != [-3.0, -4.0, 1.0, 2.0]:
        raise UserError(
            f"{type(model).__name__} turns its keys in a way that cannot be undone here ({kind} rotary embedding).",
            "Use --set merge_at=rotated or positions=absolute, or a method that does not count positions anew.",
        )
    speeds = found[0].inv_freq
    assert isinstance(speeds, Tensor)
    return speeds.float()
