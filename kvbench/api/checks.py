"""What can be compressed around ``generate``: requests, models and calls that are refused by a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvbench.api.wording import in_python
from kvbench.errors import UserError, unknown
from kvbench.inference.compressed_cache import BOTH, DECODE, PREFILL
from kvbench.inference.opening import check_method
from kvbench.methods import METHODS, Method, parse_ratio, unknown_method
from kvbench.methods.adapters import load_adapter
from kvbench.models.adapter import Adapter, read_card
from kvbench.models.configuration import context_of, text_config
from kvbench.models.facts import ModelFacts
from kvbench.models.references import resolve_model
from kvbench.planning.methods import ANY_LENGTH
from kvbench.probe.probing import LENGTH, examine

_FACTS: WeakKeyDictionary[nn.Module, ModelFacts] = WeakKeyDictionary()

_MODES = {
    "assistant_model": "assisted decoding", "prompt_lookup_num_tokens": "prompt lookup",
    "assistant_early_exit": "assisted decoding", "cache_implementation": "a cache implementation",
    "custom_generate": "a generation loop of its own", "output_attentions": "attention weights",
    "output_hidden_states": "hidden states", "inputs_embeds": "embeddings instead of ids",
    "guidance_scale": "classifier-free guidance", "penalty_alpha": "contrastive search",
    "compile_config": "compilation", "dola_layers": "DoLa", "position_ids": "positions of its own",
    "use_mtp": "several tokens at a time",
}
"""Settings of ``generate`` under which entries would be restored, read twice, or not be under the method's control."""


_INPUTS = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "return_dict",
    "cache_position",
}
"""What ``generate`` feeds for a text: ids, their padding, and what follows from them."""
USUAL_NEW_TOKENS = 20
"""Tokens that transformers generates where nothing says how many."""


def check_request(model: Any, during: str, seed: int) -> None:
    """Check that a model object can be compressed at all.

    Raises:
        UserError: it cannot; it has not been changed.
    """
    if during not in (PREFILL, DECODE, BOTH):
        raise unknown("value for during", during, (PREFILL, DECODE, BOTH))
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "generate") or not hasattr(model, "config"):
        raise UserError(f"{kind} is no language model of transformers.", "Load one with AutoModelForCausalLM.")
    if type(model).__module__.startswith("peft."):
        raise UserError(f"{kind} wraps another model.", "Compress model.base_model.model, and call the wrapper.")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise UserError(f"seed={seed!r} is no whole number of at least 0.")
    if model._forward_hooks or model._forward_pre_hooks:
        raise UserError("The model has forward hooks, which would run twice.", "Remove them, or hook its parts.")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UserError("The model is compiled.", "Compress the model that was given to torch.compile.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{kind} is an encoder-decoder, whose cross-attention kvbench does not compress.")
    if model.training:
        raise UserError("The model is in training mode.", "Call model.eval() first.")
    if "generate" in vars(model):
        raise UserError("The model's generate is replaced already.", "Leave the block that it is compressed in first.")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise UserError("The model lies on several devices.", "Load it on one: device_map=None, then model.to(device).")
    attention = str(getattr(model.config, "_attn_implementation", "") or "")
    if "flash" in attention or "flex" in attention:
        raise UserError(
            f"The model was loaded with attn_implementation={attention!r}, whose results kvbench has not been checked "
            "against.", "Load it with attn_implementation='sdpa'.",
        )


def checked_method(
    asked: str | Method, ratio: float | str | Fraction | None, budget_tokens: int | None, options: Mapping[str, Any]
) -> Method:
    """The method of a request, by name or as an object, whose options are those that are not given.

    Raises:
        UserError: no such method or option, a value that is not allowed, or no ratio where one is needed.
    """
    if not isinstance(asked, (str, Method)):
        raise UserError(f"method={asked!r} is no method.", "Give a name, such as 'snapkv', or a method object.")
    if isinstance(asked, str) and asked not in METHODS:
        raise unknown_method(asked)
    kind, own = (METHODS[asked], {}) if isinstance(asked, str) else (type(asked), asked.resolved)
    name, known = kind.name, kind.options()
    for key in options:
        if key not in known:
            raise unknown(f"option of {name}", key, known)
    if ratio is not None and budget_tokens is not None:
        raise UserError("ratio and budget_tokens both say how much is kept.", "Leave one of them out.")
    if budget_tokens is not None and type(budget_tokens) is not int:
        raise UserError(f"budget_tokens={budget_tokens!r} is no whole number.", "Give the entries to keep.")
    if budget_tokens is not None and (budget_tokens < 1 or "tokens" not in kind.budgets):
        raise UserError(f"{name} cannot keep budget_tokens={budget_tokens}.", "Give a ratio.")
    given = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in options.items()}
    budget = {} if budget_tokens is None else {"budget_tokens": budget_tokens}
    with in_python():
        if isinstance(ratio, Fraction) and not 0 <= ratio < 1:
            raise UserError(f"ratio={ratio} is outside [0, 1).", "It is the share of entries that is removed.")
        share = ratio if isinstance(ratio, Fraction) else parse_ratio("0" if ratio is None else str(ratio))
        method = kind.from_options(share, {**own, **given}, **budget)
        if not method.uses_ratio(in_chunks=False):
            method = replace(method, ratio=Fraction(0))
        method.check(ANY_LENGTH, in_chunks=False)
    if ratio is None and budget_tokens is None and method.uses_ratio(in_chunks=False):
        raise UserError(f"{name} is asked for without a ratio.", "Give ratio=0.7 to keep 30 % of the entries.")
    if method.depends_on_words:
        raise UserError(f"{name} with these options needs to know where words begin.", "Leave the option out.")
    return method


def checked_adapter(model: nn.Module, method: Method, folder: str | Path | None) -> Adapter | None:
    """The adapter of a trained method, on the model's device.

    A model that was loaded from a folder is compared with the one that the adapter was trained on; others by the shapes
    of their weights only.

    Raises:
        UserError: one is needed, is of no use, or was trained for another method or model.
    """
    if folder is None:
        if method.adapter_kinds:
            raise UserError(f"{method.name} is trained: it needs an adapter.", "Give adapter=FOLDER (kvbench train).")
        return None
    if not isinstance(folder, (str, Path)):
        raise UserError(f"adapter={folder!r} is no folder.", "Give the folder of an adapter.")
    card = read_card(Path(folder))
    if card.method != method.name:
        raise UserError(f"The adapter in {folder} was trained for {card.method!r}.", f"Use method={card.method!r}.")
    for name, wanted in method.trained_options.items():
        trained = card.options.get(name, method.options()[name].default)
        if trained != wanted:
            raise UserError(f"The adapter in {folder} was trained with {name}={trained}.", f"Give {name}={trained}.")
    config: Any = model.config
    place = getattr(config, "_name_or_path", "")
    is_known = bool(card.base_hash and place) and Path(place).is_dir()
    if is_known and not resolve_model(str(place)).has_fingerprint(card.base_hash):
        raise UserError(
            f"The adapter in {folder} was trained on another base model ({card.base_model}, {card.base_hash}).",
            "Load that model, or train an adapter for this one.",
        )
    parameter = next(model.parameters())
    return load_adapter(Path(folder), model).to(parameter.device, parameter.dtype)


def check_model(model: Any, method: Method) -> None:
    """Check by a probe of some twenty short forward passes, once per model, that the method can be used on it.

    Raises:
        UserError: it cannot.
    """
    name, facts = type(model).__name__, _FACTS.get(model)
    if facts is None:
        length = min(LENGTH, context_of(model.config))
        vocabulary = int(text_config(model.config).vocab_size)
        ids = torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        facts = examine(model, ids.to(next(model.parameters()).device))
        facts.check(name)  # a refusal is not kept: it may be due to autocast, or to hooks
        _FACTS[model] = facts
    with in_python():
        check_method(method, model, name, facts)


def check_length(model: nn.Module, tokens: int) -> None:
    """Check that every layer attends a text of so many tokens in full.

    Raises:
        UserError: some attend less of it.
    """
    if model in _FACTS:
        places = context_of(model.config)
        if _FACTS[model].learned and tokens > places:
            raise UserError(
                f"{type(model).__name__} has positions for {places} tokens, and prompt and new tokens are {tokens}.",
                "Give a shorter prompt, or fewer new tokens.",
            )
        _FACTS[model].check_length(type(model).__name__, tokens, "Give a shorter prompt, or fewer new tokens.")


def check_ids(model: Any, ids: Any, mask: Tensor | None = None, is_padded: bool = False) -> int:
    """Check ids and their mask, and return the number of columns.

    Args:
        is_padded: where there is no mask, padding is recognised later.

    Raises:
        UserError: they are not int ``[batch, n]`` and a mask of the same shape, or padding without a mask.
    """
    is_right = isinstance(ids, Tensor) and ids.dim() == 2 and ids.numel() and ids.dtype in (torch.int64, torch.int32)
    if not is_right:
        raise UserError("input_ids are no tensor of whole numbers [batch, n], n at least 1.", "Give the prompt's ids.")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise UserError("attention_mask is not of the shape of input_ids.", "Give a mask [batch, n], or none.")
    padding = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    if mask is None and not is_padded and padding is not None and bool((ids[:, 0] == padding).any()):
        raise UserError("input_ids begin with padding, and there is no attention_mask.", "Give the tokenizer's mask.")
    return int(ids.shape[1])


def check_settings(model: Any, given: Any, settings: Mapping[str, Any]) -> Any:
    """Check that one call of ``generate`` is one that a compressed cache can follow.

    Args:
        given: the generation config of the call, or None.
        settings: its other arguments.

    Returns:
        The generation config with all settings, as transformers merges them.

    Raises:
        UserError: it is not.
    """
    config, _ = model._prepare_generation_config(given, **settings)

    def setting(name: str) -> Any:
        return settings[name] if name in settings else getattr(config, name, None)

    for name, what in _MODES.items():
        value = setting(name)
        is_off = value is None or value is False or (name == "guidance_scale" and value == 1)
        if not is_off:
            raise UserError(f"generate is asked for {what} ({name}), which cannot be compressed.", "Leave it out.")
    if (setting("num_beams") or 1) > 1:
        raise UserError("generate is asked for beams, which a compressed cache does not follow.", "Use num_beams=1.")
    if setting("use_cache") is False:
        raise UserError("generate is asked not to use a cache.", "Leave use_cache out.")
    return config


def check_inputs(given: Mapping[str, Any]) -> None:
    """Check that the model is fed ids and a mask of padding only.

    Raises:
        UserError: it is fed more, such as images.
    """
    more = [name for name, value in given.items() if name not in _INPUTS and value is not None and value is not False]
    if more:
        raise UserError(f"generate feeds {', '.join(more)}, which a compressed cache does not read.", "Leave it out.")
    mask = given.get("attention_mask")
    if given.get("input_ids") is None or (mask is not None and mask.dim() != 2):
        raise UserError("generate feeds embeddings or a mask of its own.", "Give it input_ids and a 2-D mask.")


def new_tokens(config: Any, columns: int) -> int:
    """Number of tokens that a call generates at most."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    left = (config.max_length or 0) - columns
    return left if left > 0 else USUAL_NEW_TOKENS
