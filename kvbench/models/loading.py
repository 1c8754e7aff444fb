"""Loading a causal language model and its tokenizer; incomplete or unsupported models are refused."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn

from kvbench.errors import UserError
from kvbench.models.adapter import Adapter
from kvbench.models.attention import register
from kvbench.models.configuration import context_of, text_config
from kvbench.models.device import pick_device
from kvbench.models.references import ModelReference, expand_home
from kvbench.models.rope import dynamic_rotary
from kvbench.models.sharing import Sharing, share_layers


class Loaded(NamedTuple):
    """A model in evaluation mode with frozen weights, its tokenizer, context length and vocabulary size."""

    model: nn.Module
    tokenizer: Any
    context: int
    vocabulary: int


def load_model(reference: ModelReference, device: str, dtype: str) -> Loaded:
    """Load weights (safetensors, or ``weights_only`` otherwise; never remote code) and tokenizer.

    The attention is always that of :mod:`kvbench.models.attention`, since eager attention silently
    adds boolean masks to the logits.

    Raises:
        UserError: the model is missing, unreachable, damaged, incomplete, or of a kind whose cache
            kvbench cannot manage.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    where = pick_device(device)
    weights: Any = getattr(torch, dtype) if dtype != "auto" else (
        torch.float32 if where.type == "cpu" else "auto"
    )
    common: dict[str, Any] = {"revision": reference.revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(reference.location, **common)
        _check_kind(reference, config)
        _check_attention(AutoModelForCausalLM, config)
        tokenizer = AutoTokenizer.from_pretrained(reference.location, **common)
        model, info = AutoModelForCausalLM.from_pretrained(
            reference.location, config=config, dtype=weights, attn_implementation=register(),
            output_loading_info=True, **common,
        )
    except UserError:
        raise
    except Exception as error:  # the hub, the parser and the weights each have their own errors
        raise _load_error(reference, error) from error
    missing = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"The weights of {reference.name} are incomplete: {missing[0]} "
            f"({len(missing)} in all) would be random.",
            "Download or copy the model again.",
        )
    _check_tokenizer(reference, model, tokenizer)
    model.eval().requires_grad_(False).to(where)
    if reference.share:
        _share(reference, model)
    dynamic_rotary(model)  # examine stateful rotary embeddings before the first forward pass
    return Loaded(model, tokenizer, context_of(config), int(text_config(config).vocab_size))


def _share(reference: ModelReference, model: nn.Module) -> None:
    """Make layers share entries, under weights that were trained so if a folder is named.

    Raises:
        UserError: the model cannot, or the folder holds no whole weights of it.
    """
    layers = int(text_config(model.config).num_hidden_layers)
    share_layers(model, Sharing.parse(reference.pattern, layers), reference.name)
    if reference.pattern == reference.share:
        return
    adapter = Adapter.load(expand_home(reference.share), model)
    if adapter.card.gate != "full":
        raise UserError(
            f"{reference.share} holds no whole weights (adapter={adapter.card.gate}).",
            f"Give it as --adapter beside --share {reference.pattern}, or train with --set adapter=full.",
        )
    with torch.no_grad():
        for name, weight in adapter.whole.items():
            model.get_parameter(name).copy_(weight)


def end_tokens(loaded: Loaded) -> tuple[int, ...]:
    """Ids of the tokens that end a text: the model's own, or the tokenizer's if the model names none.

    Nothing else of a checkpoint's generation config is used: it would silently set temperatures and
    penalties.
    """
    model: Any = loaded.model
    configs = (model.config, getattr(model, "generation_config", None))
    named = [getattr(config, "eos_token_id", None) for config in configs]
    named = [ids for ids in named if ids is not None] or [loaded.tokenizer.eos_token_id]
    found = [i for ids in named if ids is not None for i in (ids if isinstance(ids, (list, tuple)) else [ids])]
    return tuple(dict.fromkeys(int(i) for i in found))


def _check_kind(reference: ModelReference, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False) or not any(
        hasattr(text_config(config), name) for name in ("num_attention_heads", "n_head")
    ):
        raise UserError(
            f"{reference.name} ({config.model_type}) is not a decoder-only transformer with a KV cache.",
            "Choose a causal language model such as Llama, Qwen, GPT-NeoX, OPT or GPT-2.",
        )


def _check_attention(auto: Any, config: Any) -> None:
    """Check that the model calls attention through transformers' interface, so that ours can replace it."""
    kind = auto._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, (tuple, list)) else kind
    if kind is not None and not getattr(kind, "_supports_attention_backend", False):
        kinds = sorted({str(name) for name in getattr(text_config(config), "layer_types", None) or ()})
        named = ", ".join([config.model_type, *kinds])
        raise UserError(
            f"{kind.__name__} computes its attention in a way of its own ({named}): it cannot be given a mask or an "
            "evicting cache.",
            "Choose a decoder-only transformer such as Llama, Qwen, GPT-NeoX, OPT or GPT-2.",
        )


def _check_tokenizer(reference: ModelReference, model: nn.Module, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    token, last = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if last >= rows:
        raise UserError(
            f"The tokenizer of {reference.name} knows ids up to {last} ({token!r}), and the model's embedding has "
            f"{rows} rows.",
            "Give the folder of a model with the tokenizer that it was trained with.",
        )


def _load_error(reference: ModelReference, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "Unrecognized configuration class" in reason or "does not recognize this architecture" in reason:
        import transformers

        kind = re.search(r"class '[\w.]*\.(\w+)'|type `([^`]+)`", reason)
        named = next((name for name in kind.groups() if name), "of this kind") if kind else "of this kind"
        return UserError(
            f"transformers {transformers.__version__} has no causal language model for {reference.name} ({named}).",
            "Choose a causal language model, or install a version of transformers that knows this one.",
        )
    if reference.is_folder:
        is_damage = isinstance(error, (OSError, SafetensorError, UnicodeError, json.JSONDecodeError, EOFError))
        return UserError(
            f"The model in {reference.location} cannot be loaded: {reason}",
            "Its files may be damaged or incomplete; copy or download them again." if is_damage else
            "Its configuration asks for something that cannot be had here.",
        )
    return UserError(
        f"The model {reference.name!r} is not a local folder and cannot be had from the Hugging "
        f"Face hub ({type(error).__name__}: {reason})",
        "Check the id and the network, or give the path of a local copy.",
    )
