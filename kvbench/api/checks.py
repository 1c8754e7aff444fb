"""What can be compressed around ``generate``: requests, models and calls that are refused by a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kvbench.api.wording import in_python
from kvbench.errors import UserError, unknown
from kvbench.inference.compressed_cache import BOTH, DECODE, PREFILL
from kvbench.inference.opening import check_method
from kvbench.methods import METHODS, Method, make_method, parse_ratio
from kvbench.models.adapter import Adapter, read_card
from kvbench.models.configuration import context_of, text_config
from kvbench.models.facts import ModelFacts
from kvbench.probe.probing import LENGTH, examine

_FACTS: WeakKeyDictionary[nn.Module, ModelFacts] = WeakKeyDictionary()

_MODES = {
    "assistant_model": "assisted decoding", "prompt_lookup_num_tokens": "prompt lookup",
    "assistant_early_exit": "assisted decoding", "cache_implementation": "a cache implementation",
    "custom_generate": "a generation loop of its own", "output_attentions": "attention weights",
    "output_hidden_states": "hidden states", "inputs_embeds": "embeddings instead of ids",
    "guidance_scale": "classifier-free guidance", "penalty_alpha": "contrastive search",
    "compile_config": "compilation", "dola_layers": "DoLa",
}
"""Settings of ``generate`` under which entries would be restored, read twice, or not be under the method's control."""


def check_request(model: Any, during: str) -> None:
    """Check that a model object can be compressed at all.

    Raises:
        UserError: it cannot; it has not been changed.
    """
    if during not in (PREFILL, DECODE, BOTH):
        raise unknown("value for during", during, (PREFILL, DECODE, BOTH))
    kind = type(model).__name__
    if not isinstance(model, nn.Module) or not hasattr(model, "generate") or not hasattr(model, "config"):
        raise UserError(f"{kind} is no language model of transformers.", "Load one with AutoModelForCausalLM.")
    if hasattr(model, "_orig_mod"):
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
    name: str, ratio: float | str | Fraction | None, budget_tokens: int | None, options: Mapping[str, Any]
) -> Method:
    """The method of a request.

    Raises:
        UserError: no such method or option, a value that is not allowed, or no ratio where one is needed.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    kind = METHODS[name]
    known = kind.options()
    for key in options:
        if key not in known:
            raise unknown(f"option of {name}", key, known)
    if ratio is not None and budget_tokens is not None:
        raise UserError("ratio and budget_tokens both say how much is kept.", "Leave one of them out.")
    if budget_tokens is not None and (budget_tokens < 1 or "tokens" not in kind.budgets):
        raise UserError(f"{name} cannot keep budget_tokens={budget_tokens}.", "Give a ratio.")
    given = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in options.items()}
    if budget_tokens is not None:
        given["budget_tokens"] = str(budget_tokens)
    with in_python():
        method = make_method(name, ratio if isinstance(ratio, Fraction) else parse_ratio(str(ratio or 0)), given)
    if ratio is None and budget_tokens is None and method.uses_ratio(in_chunks=False):
        raise UserError(f"{name} is asked for without a ratio.", "Give ratio=0.7 to keep 30 % of the entries.")
    if method.depends_on_words:
        raise UserError(f"{name} with these options needs to know where words begin.", "Leave the option out.")
    return method


def checked_adapter(model: nn.Module, method: Method, folder: str | Path | None) -> Adapter | None:
    """The adapter of a trained method, on the model's device.

    Raises:
        UserError: one is needed, is of no use, or was trained for another method or model.
    """
    if folder is None:
        if method.adapter_kinds:
            raise UserError(f"{method.name} is trained: it needs an adapter.", "Give adapter=FOLDER (kvbench train).")
        return None
    card = read_card(Path(folder))
    if card.method != method.name:
        raise UserError(f"The adapter in {folder} was trained for {card.method!r}.", f"Use method={card.method!r}.")
    for name, wanted in method.trained_options.items():
        trained = card.options.get(name, method.options()[name].default)
        if trained != wanted:
            raise UserError(f"The adapter in {folder} was trained with {name}={trained}.", f"Give {name}={trained}.")
    parameter = next(model.parameters())
    return Adapter.load(Path(folder), model).to(parameter.device, parameter.dtype)


def check_model(model: Any, method: Method) -> None:
    """Check by a probe of some twenty short forward passes, once per model, that the method can be used on it.

    Raises:
        UserError: it cannot.
    """
    if model not in _FACTS:
        length = min(LENGTH, context_of(model.config))
        vocabulary = int(text_config(model.config).vocab_size)
        ids = torch.randint(1, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
        _FACTS[model] = examine(model, ids.to(next(model.parameters()).device))
    facts, name = _FACTS[model], type(model).__name__
    facts.check(name)
    with in_python():
        check_method(method, model, name, facts)


def check_call(model: Any, config: Any, settings: Mapping[str, Any]) -> None:
    """Check that one call of ``generate`` is one that a compressed cache can follow.

    Args:
        config: the generation config of the call.
        settings: the other arguments.

    Raises:
        UserError: it is not.
    """
    def setting(name: str) -> Any:
        return settings[name] if name in settings else getattr(config, name, None)

    for name, what in _MODES.items():
        value = setting(name)
        if value and not (name == "guidance_scale" and value == 1):
            raise UserError(f"generate is asked for {what} ({name}), which cannot be compressed.", "Leave it out.")
    if (setting("num_beams") or 1) > 1:
        raise UserError("generate is asked for beams, which a compressed cache does not follow.", "Use num_beams=1.")
    if setting("use_cache") is False:
        raise UserError("generate is asked not to use a cache.", "Leave use_cache out.")
    longest = _FACTS[model].window if model in _FACTS else None
    ids = settings.get("input_ids")
    if longest is not None and ids is not None and ids.shape[1] > longest:
        _FACTS[model].check_length(type(model).__name__, ids.shape[1], "Give it a shorter prompt.")
