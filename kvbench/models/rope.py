"""Rotary position embeddings: which rotation each layer applies, and rotating cached keys again.

Rotations are measured, not read from the configuration: unless positions are learned, a token that is read alone has
the same hidden states at every position, so that its keys differ by the rotation of their layer only.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvbench.errors import UserError
from kvbench.models.attention_hooks import LISTENER, AttentionCall, without_observer
from kvbench.models.configuration import context_of
from kvbench.models.lora import swapped

FAR = 1 << 20
"""A position beyond every text length at which a rotary embedding could change its frequencies."""
_NEAR_POSITIONS = (11, 1009)
"""Positions at which a token is read, besides 0 and the end of the context, where slow rotations and scaling show."""
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01}
"""Accepted error of a predicted rotation, relative to the length of each pair of coordinates; 0.06 for other dtypes."""

_INITIAL: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()
_PROBES: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Rotations]] = WeakKeyDictionary()


class Rotations(NamedTuple):
    """How positions change a model's queries and keys.

    Attributes:
        layers: name of the buffer that holds ``inv_freq``, by layer; "" if the layer does not rotate, None if it
            changes queries or keys in an unknown way.
        learned: positions change the hidden states (a table of embeddings), and not only queries and keys.
    """

    layers: tuple[str | None, ...]
    learned: bool


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``x`` ``[..., entries, width]`` by angles ``[entries, d / 2]``; coordinates beyond d stay the same.

    Coordinates i and i + d / 2 form a pair, as in Llama, Qwen and GPT-NeoX. A negated sine rotates back.
    """
    half = cosine.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    pairs = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)
    return torch.cat([pairs.to(x.dtype), rest], dim=-1)


def has_rotary(model: nn.Module) -> bool:
    """Whether positions are rotary, and therefore defined beyond the model's context."""
    return any(name.endswith("inv_freq") for name, _ in model.named_buffers())


def inv_freq_by_layer(model: nn.Module) -> tuple[Tensor | None, ...] | None:
    """The ``inv_freq`` ``[d / 2]`` (angle per position) of each layer; None for layers that do not rotate.

    Returns None for models with learned positions.

    Raises:
        UserError: a layer changes queries or keys in another way.
    """
    found = find_rotations(model)
    if found.learned:
        return None
    if None in found.layers:
        raise UserError(
            f"{type(model).__name__} turns its keys in a way that cannot be undone here "
            f"(layer {found.layers.index(None)}).",
            "Use --set merge_at=rotated or positions=absolute, or a method that does not count positions anew.",
        )
    buffers = dict(model.named_buffers())
    return tuple(buffers[name].float() if name else None for name in found.layers)


def find_rotations(model: nn.Module) -> Rotations:
    """Find out how positions change queries and keys, by forward passes of one token at a few positions.

    The model must not have an adapter applied. Rotations that depend on the length of the text are fixed meanwhile,
    since a high position would change them.
    """
    if any("forward" not in vars(model.get_submodule(path)) for path in dynamic_rotary(model)):
        with fixed_rotations(model, context_of(model.config)):
            return _cached_probe(model)
    return _cached_probe(model)


def _cached_probe(model: nn.Module) -> Rotations:
    state = tuple(tensor.data_ptr() for name, tensor in model.named_buffers() if _is_inv_freq(name, tensor))
    if model not in _PROBES or _PROBES[model][0] != state:  # probe again if rotations were fixed for another length
        _PROBES[model] = state, _probe(model)
    return _PROBES[model][1]


@torch.no_grad()
def _probe(model: nn.Module) -> Rotations:
    read = {
        position: found for position in (0, *_probe_positions(model))
        if (found := read_token_at(model, position)) is not None
    }
    if _NEAR_POSITIONS[0] not in read:  # a table of positions that ends before this one
        return Rotations((), True)
    (calls, alone), others = read.pop(0), read
    logits = others[_NEAR_POSITIONS[0]][1]
    near = 0.05 if next(model.parameters()).dtype != torch.float32 else 1e-4
    learned = not torch.allclose(alone, logits, rtol=near, atol=near * float(alone.abs().max()))
    if learned or [call.layer for call in calls] != list(range(len(calls))):
        return Rotations((None,) * max(1, len(calls)), learned)
    buffers = {name: tensor for name, tensor in model.named_buffers() if _is_inv_freq(name, tensor)}
    return Rotations(tuple(
        _matching_buffer(calls[number], {position: found[0][number] for position, found in others.items()}, buffers)
        for number in range(len(calls))
    ), False)


def _probe_positions(model: nn.Module) -> list[int]:
    """Positions at which a token is read, besides 0: near ones, and the last of the model's context."""
    last = min(context_of(model.config), FAR) - 1
    return sorted({*(position for position in _NEAR_POSITIONS if position <= max(last, _NEAR_POSITIONS[0])), last})


def read_token_at(model: nn.Module, position: int) -> tuple[list[AttentionCall], Tensor] | None:
    """Attention calls and logits of a token read alone at a position; None beyond the table of positions."""
    calls: list[AttentionCall] = []
    device = next(model.parameters()).device
    token = LISTENER.set(calls.append)
    try:
        with without_observer():
            logits = model(
                input_ids=torch.ones(1, 1, dtype=torch.long, device=device), use_cache=False,
                position_ids=torch.arange(position, position + 1, device=device)[None],
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            ).logits
    except IndexError:
        return None
    finally:
        LISTENER.reset(token)
    return calls, logits.float().cpu()


def _is_inv_freq(name: str, tensor: Tensor) -> bool:
    return name.endswith("inv_freq") and "original" not in name and tensor.dim() == 1


def _matching_buffer(first: AttentionCall, others: dict[int, AttentionCall], buffers: dict[str, Tensor]) -> str | None:
    """Name of the ``inv_freq`` buffer that best maps queries and keys at position 0 to those at the others.

    "" if they do not change; None if no buffer fits.
    """
    def worst(inv_freq: Tensor | None) -> float:
        return max(
            pairwise_distance(_rotated_to(here.float().cpu(), position, inv_freq), there.float().cpu(), inv_freq)
            for position, call in others.items() for here, there in ((first.query, call.query), (first.key, call.key))
        )

    found = {name: worst(buffers.get(name)) for name in ("", *buffers)}
    best = min(found, key=lambda name: found[name])
    return best if found[best] <= _TOLERANCES.get(first.key.dtype, 0.06) else None


def _rotated_to(x: Tensor, position: int, inv_freq: Tensor | None) -> Tensor:
    if inv_freq is None or 2 * len(inv_freq) > x.shape[-1]:
        return x
    angle = position * inv_freq.float().cpu()[None]
    return rotated(x, angle.cos(), angle.sin())


def pairwise_distance(one: Tensor, other: Tensor, inv_freq: Tensor | None) -> float:
    """Mean distance of the coordinate pairs of two tensors ``[..., width]``, relative to the length of each pair.

    Distances are taken by pair, since one large coordinate would hide changes of the others, and averaged, since
    small pairs of deep layers are not reproducible in half precision.

    Args:
        inv_freq: ``[d / 2]``: the first d coordinates form pairs; None to compare every coordinate alone.
    """
    half = 0 if inv_freq is None or 2 * len(inv_freq) > one.shape[-1] else len(inv_freq)

    def lengths(x: Tensor) -> Tensor:
        return torch.cat([torch.hypot(x[..., :half], x[..., half : 2 * half]), x[..., 2 * half :].abs()], -1)

    size = lengths(other)
    shares = lengths(one - other) / size.clamp(min=1e-4 * float(size.max()) + 1e-12)
    return float(shares.clamp(max=1).mean())


def dynamic_rotary(model: nn.Module) -> dict[str, nn.Module]:
    """Copies of the rotary embeddings that depend on the length of the text, by path, made at the first call.

    They are found by calling each with the same positions in a short and in a long text. Some keep state between
    calls, so that copies are called and returned; the first call must precede the model's first forward pass.
    """
    if model not in _INITIAL:
        found = {
            path: module for path, module in model.named_modules()
            if any(_is_inv_freq(name, tensor) for name, tensor in module.named_buffers(recurse=False))
        }
        with torch.inference_mode(False):  # tensors made in inference mode cannot be written to outside
            _INITIAL[model] = {path: copy.deepcopy(module) for path, module in found.items() if _is_dynamic(module)}
    return _INITIAL[model]


def _is_dynamic(module: nn.Module) -> bool:
    """Whether its output for some positions depends on later positions of the text."""
    for layer_type in _layer_types(module):
        short, long = ([0, 1, 2], [0, 1, 2, FAR])
        try:
            one, other = (_cos_sin(copy.deepcopy(module), positions, layer_type) for positions in (short, long))
        except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
            return False  # another signature: the probe compares long texts (``probe/kept.py``)
        if any(not torch.equal(a[:, :3], b[:, :3]) for a, b in zip(one, other, strict=True)):
            return True
    return False


def _layer_types(module: nn.Module) -> tuple[str | None, ...]:
    """The layer types that a rotary embedding distinguishes; (None,) if it treats all layers alike."""
    kind: Any = getattr(module, "rope_type", None)
    return tuple(kind) if isinstance(kind, dict) else (None,)


def _cos_sin(module: nn.Module, positions: list[int], layer_type: str | None) -> tuple[Tensor, ...]:
    """Cosine and sine ``[1, positions, d]`` at some positions of a text, or both as one complex tensor."""
    device = next(module.buffers()).device
    more = {} if layer_type is None else {"layer_type": layer_type}
    ids = torch.tensor([positions], device=device)
    found = module(torch.zeros(1, 1, 1, device=device), ids, **more)
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


@contextmanager
def fixed_rotations(model: nn.Module, length: int) -> Iterator[None]:
    """Fix rotations to those of one pass over ``length`` tokens, for the length of the block.

    Where rotations depend on the length of the text (LongRoPE, dynamic NTK), entries stored early would otherwise
    differ from those of one pass over the whole text.

    Raises:
        UserError: rotations depend on the length and cannot be fixed.
    """
    initial = dynamic_rotary(model)
    if not initial:
        yield
        return
    with swapped(model, {path: _fixed_copy(module, length, model) for path, module in initial.items()}):
        yield


@contextmanager
def fresh_rotations(model: nn.Module) -> Iterator[None]:
    """Reset rotations to their initial state, for the length of the block: some keep state of earlier, longer texts."""
    with torch.inference_mode(False):
        copies = {path: copy.deepcopy(module) for path, module in dynamic_rotary(model).items()}
    device = next(model.parameters()).device
    with swapped(model, {path: module.to(device) for path, module in copies.items()}):
        yield


def _fixed_copy(initial: nn.Module, length: int, model: nn.Module) -> nn.Module:
    with torch.inference_mode(False):
        module: Any = copy.deepcopy(initial).to(next(model.parameters()).device)
    plain = inspect.unwrap(type(module).forward)  # without ``dynamic_rope_update``, which would update inv_freq
    if plain is type(module).forward:
        raise UserError(
            f"The rotations of {type(model).__name__} depend on the length of the text, and cannot be fixed.",
            "Choose another model.",
        )
    with torch.inference_mode(False), torch.no_grad():
        for layer_type in _layer_types(module):
            _cos_sin(module, [0, length - 1], layer_type)
    module.forward = partial(torch.no_grad()(plain), module)
    with torch.inference_mode(False), torch.no_grad():
        if _is_dynamic(module):
            raise UserError(
                f"{type(module).__name__} of {type(model).__name__} goes by the length of what is read even where "
                "its frequencies are fixed.", "Choose another model.",
            )
    return module  # type: ignore[no-any-return]


def rotation_mark(model: nn.Module) -> str:
    """What rotations add to the signature of a result; empty if all layers rotate alike at every length."""
    kinds = {
        kind for module in dynamic_rotary(model).values()
        for kind in _rope_types(module)
    }
    if kinds:
        return f"|rope:{'+'.join(sorted(kinds))} by length of the text"
    found = find_rotations(model)
    return "|rope:by layer" if not found.learned and len(set(found.layers)) > 1 else ""


def _rope_types(module: nn.Module) -> set[str]:
    kind: Any = getattr(module, "rope_type", "unknown")
    return {str(name) for name in (kind.values() if isinstance(kind, dict) else (kind,))}
