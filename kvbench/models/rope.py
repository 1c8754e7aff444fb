"""Rotary position embeddings: what each layer turns, and turning entries of the cache again.

Layers are asked, not configurations: a token that is read alone at a few places gives the same hidden states wherever
it stands, so that what differs between its keys is the rotation of that layer, or none.
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
from kvbench.models.attention_hooks import LISTENER, Attended, unwatched
from kvbench.models.configuration import context_of
from kvbench.models.lora import swapped

FAR = 1 << 20
"""A place beyond every length at which a rotation could change."""
_NEAR_BY = (11, 1009)
"""Where a token is read again, to see what its place changes; and at the end of the model's context, since scales and
slow rotations change little before."""
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.01}
"""How far pairs of coordinates may lie from where they are taken to be turned to, as a share of their length; 0.06
for other precisions."""

_PRISTINE: WeakKeyDictionary[nn.Module, dict[str, nn.Module]] = WeakKeyDictionary()
_FOUND: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], Turned]] = WeakKeyDictionary()


class Turned(NamedTuple):
    """What places do to a model's queries and keys.

    Attributes:
        layers: the buffer with the rotation's frequencies, by layer; "" where nothing is turned, None where queries
            or keys are changed in a way that is not known.
        learned: places are part of what is read (a table of positions), and not only of queries and keys.
    """

    layers: tuple[str | None, ...]
    learned: bool


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


def frequencies(model: nn.Module) -> tuple[Tensor | None, ...] | None:
    """Angle per position of each pair of coordinates ``[d / 2]``, by layer; None for layers that turn nothing.

    None for models whose positions are learnt.

    Raises:
        UserError: layers that turn queries or keys in another way.
    """
    found = turned(model)
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


def turned(model: nn.Module) -> Turned:
    """What places do to the queries and keys of every layer: one forward pass of one token, at a few places.

    The model is to be asked as it is, before an adapter is put into it. Rotations that depend on the length of the
    text are fixed meanwhile, since a token far away would change them.
    """
    if any("forward" not in vars(model.get_submodule(path)) for path in by_length(model)):
        with fixed_rotations(model, context_of(model.config)):
            return _found(model)
    return _found(model)


def _found(model: nn.Module) -> Turned:
    state = tuple(tensor.data_ptr() for name, tensor in model.named_buffers() if _is_speed(name, tensor))
    if model not in _FOUND or _FOUND[model][0] != state:  # asked again once rotations are fixed for another text
        _FOUND[model] = state, _asked(model)
    return _FOUND[model][1]


@torch.no_grad()
def _asked(model: nn.Module) -> Turned:
    read = {place: found for place in (0, *_places(model)) if (found := _read_at(model, place)) is not None}
    if _NEAR_BY[0] not in read:  # a table of positions that ends before
        return Turned((), True)
    (calls, alone), others = read.pop(0), read
    logits = others[_NEAR_BY[0]][1]
    near = 0.05 if next(model.parameters()).dtype != torch.float32 else 1e-4
    learned = not torch.allclose(alone, logits, rtol=near, atol=near * float(alone.abs().max()))
    if learned or [call.layer for call in calls] != list(range(len(calls))):
        return Turned((None,) * max(1, len(calls)), learned)
    buffers = {name: tensor for name, tensor in model.named_buffers() if _is_speed(name, tensor)}
    return Turned(tuple(
        _rotation_of(calls[number], {place: found[0][number] for place, found in others.items()}, buffers)
        for number in range(len(calls))
    ), False)


def _places(model: nn.Module) -> list[int]:
    """Where a token is read again: near by, and as far as the model's context goes."""
    last = min(context_of(model.config), FAR) - 1
    return sorted({*(place for place in _NEAR_BY if place <= max(last, _NEAR_BY[0])), last})


def _read_at(model: nn.Module, place: int) -> tuple[list[Attended], Tensor] | None:
    """What every layer attends of a token that is read alone at a place, and its logits; None beyond a table."""
    calls: list[Attended] = []
    device = next(model.parameters()).device
    token = LISTENER.set(calls.append)
    try:
        with unwatched():
            logits = model(
                input_ids=torch.ones(1, 1, dtype=torch.long, device=device), use_cache=False,
                position_ids=torch.arange(place, place + 1, device=device)[None],
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            ).logits
    except IndexError:
        return None
    finally:
        LISTENER.reset(token)
    return calls, logits.float().cpu()


def _is_speed(name: str, tensor: Tensor) -> bool:
    return name.endswith("inv_freq") and "original" not in name and tensor.dim() == 1


def _rotation_of(first: Attended, others: dict[int, Attended], buffers: dict[str, Tensor]) -> str | None:
    """The frequencies that best turn a token's query and key from place 0 to all others; "" if nothing does.

    None if none does, at some place.
    """
    def worst(speeds: Tensor | None) -> float:
        return max(
            apart_in_pairs(_moved(here.float().cpu(), place, speeds), there.float().cpu(), speeds)
            for place, call in others.items() for here, there in ((first.query, call.query), (first.key, call.key))
        )

    found = {name: worst(buffers.get(name)) for name in ("", *buffers)}
    best = min(found, key=lambda name: found[name])
    return best if found[best] <= _TOLERANCES.get(first.key.dtype, 0.06) else None


def _moved(x: Tensor, place: int, speeds: Tensor | None) -> Tensor:
    if speeds is None or 2 * len(speeds) > x.shape[-1]:
        return x
    angle = place * speeds.float().cpu()[None]
    return rotated(x, angle.cos(), angle.sin())


def apart_in_pairs(one: Tensor, other: Tensor, speeds: Tensor | None) -> float:
    """How far two tensors ``[..., width]`` lie apart: the mean over pairs of coordinates, as a share of their length.

    By pairs, since one large coordinate would hide what happens to all others; the mean, since in half precision
    small pairs of deep layers are not twice the same.

    Args:
        speeds: ``[d / 2]``, whose pairs the first d numbers are; None if all stand alone.
    """
    half = 0 if speeds is None or 2 * len(speeds) > one.shape[-1] else len(speeds)

    def lengths(x: Tensor) -> Tensor:
        return torch.cat([torch.hypot(x[..., :half], x[..., half : 2 * half]), x[..., 2 * half :].abs()], -1)

    size = lengths(other)
    shares = lengths(one - other) / size.clamp(min=1e-4 * float(size.max()) + 1e-12)
    return float(shares.clamp(max=1).mean())


def by_length(model: nn.Module) -> dict[str, nn.Module]:
    """The rotary embeddings that depend on how long the text is, by path, as they were when first looked at.

    They are asked: what they give for the same places, in a short text and in one that goes on for long. Some keep a
    state between calls, so that a copy is what is asked and returned; models are to be looked at when they are new.
    """
    if model not in _PRISTINE:
        found = {
            path: module for path, module in model.named_modules()
            if any(_is_speed(name, tensor) for name, tensor in module.named_buffers(recurse=False))
        }
        with torch.inference_mode(False):  # tensors that are made in it cannot be written to outside
            _PRISTINE[model] = {path: copy.deepcopy(module) for path, module in found.items() if _depends(module)}
    return _PRISTINE[model]


def _depends(module: nn.Module) -> bool:
    """Whether what it gives for some places depends on what comes behind them."""
    for layer_type in _layer_types(module):
        short, long = ([0, 1, 2], [0, 1, 2, FAR])
        try:
            one, other = (_table(copy.deepcopy(module), places, layer_type) for places in (short, long))
        except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
            return False  # called in another way: what it does at length is seen where texts are compared
        if any(not torch.equal(a[:, :3], b[:, :3]) for a, b in zip(one, other, strict=True)):
            return True
    return False


def _layer_types(module: nn.Module) -> tuple[str | None, ...]:
    """The kinds of layers that a rotary embedding serves by name; None where it serves all alike."""
    kind: Any = getattr(module, "rope_type", None)
    return tuple(kind) if isinstance(kind, dict) else (None,)


def _table(module: nn.Module, places: list[int], layer_type: str | None) -> tuple[Tensor, ...]:
    """Cosine and sine ``[1, places, d]`` at some places of a text, or both as complex numbers."""
    device = next(module.buffers()).device
    more = {} if layer_type is None else {"layer_type": layer_type}
    ids = torch.tensor([places], device=device)
    found = module(torch.zeros(1, 1, 1, device=device), ids, **more)
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)


@contextmanager
def fixed_rotations(model: nn.Module, length: int) -> Iterator[None]:
    """The model as it reads a text of ``length`` tokens in one pass, for the length of the block.

    Where rotations depend on the length of the text (LongRoPE, dynamic NTK), entries that were stored early would
    otherwise not be what one pass over the whole text computes.

    Raises:
        UserError: rotations that depend on the length and cannot be fixed.
    """
    pristine = by_length(model)
    if not pristine:
        yield
        return
    with swapped(model, {path: _fixed(module, length, model) for path, module in pristine.items()}):
        yield


@contextmanager
def fresh_rotations(model: nn.Module) -> Iterator[None]:
    """The model as if it had read nothing yet, for the length of the block: some rotations remember long texts."""
    with torch.inference_mode(False):
        copies = {path: copy.deepcopy(module) for path, module in by_length(model).items()}
    device = next(model.parameters()).device
    with swapped(model, {path: module.to(device) for path, module in copies.items()}):
        yield


def _fixed(pristine: nn.Module, length: int, model: nn.Module) -> nn.Module:
    with torch.inference_mode(False):
        module: Any = copy.deepcopy(pristine).to(next(model.parameters()).device)
    plain = inspect.unwrap(type(module).forward)  # without transformers' decorator, which updates and then calls it
    if plain is type(module).forward:
        raise UserError(
            f"The rotations of {type(model).__name__} depend on the length of the text, and cannot be fixed.",
            "Choose another model.",
        )
    with torch.inference_mode(False), torch.no_grad():
        for layer_type in _layer_types(module):
            _table(module, [0, length - 1], layer_type)
    module.forward = partial(torch.no_grad()(plain), module)
    with torch.inference_mode(False), torch.no_grad():
        if _depends(module):
            raise UserError(
                f"{type(module).__name__} of {type(model).__name__} goes by the length of what is read even where "
                "its frequencies are fixed.", "Choose another model.",
            )
    return module  # type: ignore[no-any-return]


def rotation_mark(model: nn.Module) -> str:
    """How rotations enter the signature of a number; empty where all layers turn alike, at any length."""
    kinds = {
        kind for module in by_length(model).values()
        for kind in _kinds_of(module)
    }
    if kinds:
        return f"|rope:{'+'.join(sorted(kinds))} by length of the text"
    found = turned(model)
    return "|rope:by layer" if not found.learned and len(set(found.layers)) > 1 else ""


def _kinds_of(module: nn.Module) -> set[str]:
    kind: Any = getattr(module, "rope_type", "unknown")
    return {str(name) for name in (kind.values() if isinstance(kind, dict) else (kind,))}
