"""A model of lm-evaluation-harness whose cache is compressed.

The model of lm-evaluation-harness itself reads context and continuation in one pass without a cache, so that
compression inside it would change nothing. Here the context is read and compressed first; continuations are scored, and
text is generated, from what is left.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvbench import __version__
from kvbench.api.checks import check_request, checked_method
from kvbench.api.compress import compress
from kvbench.api.compressed_model import CompressedModel
from kvbench.api.scores import NO_TARGET
from kvbench.errors import MissingPackageError, UserError
from kvbench.integrations.request_log import RequestLog
from kvbench.integrations.split import SplitRule
from kvbench.methods import METHODS
from kvbench.models.device import pick_device
from kvbench.models.references import resolve_model
from kvbench.models.rope import dynamic_rotary
from kvbench.planning.adapters import known_adapter
from kvbench.planning.methods import parse_choice

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from tqdm import tqdm
except ImportError as error:
    raise MissingPackageError(
        f"lm-evaluation-harness is not installed ({error}).", "Install it: pip install 'kvbench[lm-eval]'."
    ) from error

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Context and continuation as strings (None for a window of a longer text), and the ids of both."""
Answer = tuple[float, bool]
"""Log-likelihood of a continuation, and whether greedy decoding would write it."""
MIN_CONTEXT = 64
"""Contexts below this number of tokens are left whole."""

_log = logging.getLogger("lm_eval.kvbench")


@register_model("kvbench")
class KVBenchLM(HFLM):  # type: ignore[misc]
    """A causal language model under a compression method, for ``lm_eval.simple_evaluate``.

    Log-likelihoods: the prompt up to the question is read and compressed; each continuation is scored from a copy of
    what is left, behind the question. Requests with the same prompt share its compression. Generation: likewise.
    Rolling log-likelihoods: each window is read and compressed at the same time, as in the protocol ``block``.

    Args:
        pretrained: a hub id, a folder, ``kvbench-tiny``, or a model object; HFLM's other arguments may follow.
        method: such as ``snapkv``, or with options ``snapkv:window=16``; ``full`` if nothing is said.
        ratio: share of entries to remove; or ``budget_tokens``, the entries to keep per layer and head.
        adapter: folder of the adapter of a trained method; those shipped for kvbench-tiny are found.
        split: what of a prompt is read after the compression: ``none``, its last token only, so that methods see the
            question; ``last:N`` tokens; ``regex:PATTERN``, from its last match on.
        min_context: texts that would be compressed are left whole if they have fewer tokens than this.
        seed: of random layouts and draws.
        options: of the method.

    Raises:
        UserError: the request cannot be carried out on this model.
    """

    def __init__(
        self, pretrained: Any, *, method: str | None = None, ratio: float | str | Fraction | None = None,
        budget_tokens: int | None = None, adapter: str | Path | None = None, split: str = "none",
        min_context: int = MIN_CONTEXT, seed: int = 0, options: Mapping[str, Any] | None = None, **others: Any,
    ) -> None:
        if method is None and (ratio is not None or budget_tokens is not None):
            raise UserError("A ratio or a budget is given without a method.", "Give method=, such as method='snapkv'.")
        choice = parse_choice("full" if method is None else str(method))
        given = {**dict(choice.given), **(options or {})}
        self.method = checked_method(choice.name, ratio, budget_tokens, given)
        self.split, self.min_context = SplitRule.parse(str(split)), min_context
        if type(min_context) is not int or min_context < 1:
            raise UserError(f"min_context={min_context!r} is no whole number of at least 1.")
        _check_arguments(others)
        if isinstance(pretrained, str):
            revision = others.get("revision")
            reference = resolve_model(pretrained, None if revision == "main" else revision)
            pretrained = reference.location
            others.setdefault("device", str(pick_device("auto")))
            if adapter is None and METHODS[choice.name].adapter_kinds:
                adapter = known_adapter(self.method, reference)
        try:
            super().__init__(pretrained, **others)
        except (OSError, TypeError, ValueError) as error:
            name = pretrained if isinstance(pretrained, str) else type(pretrained).__name__
            raise UserError(f"lm-evaluation-harness cannot load the model {name}: {error}.") from error
        if self.world_size > 1:
            raise UserError("lm-evaluation-harness runs in several processes.", "Run it in one.")
        self.asked: dict[str, Any] = {
            "method": choice.name, "ratio": ratio, "budget_tokens": budget_tokens, "adapter": adapter, "seed": seed,
            **given,
        }
        self.requests, self.prompts = RequestLog(), list[str]()
        check_request(self.model, "prefill", seed)
        with self._compressed():
            _log.info(
                "Prompts of at least %s tokens are compressed by %s; split rule: %s.", min_context,
                method or "full", split,
            )  # said once it is known that the model can be compressed

    def _compressed(self) -> AbstractContextManager[CompressedModel]:
        """Compress the model within the block."""
        return compress(self.model, **self.asked)

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refuse the request cache, which would give the answers of one method to another.

        Raises:
            UserError: there is one.
        """
        if getattr(cache_hook, "dbdict", None) is not None:
            raise UserError("The request cache of lm-evaluation-harness does not know the method.", NO_CACHE)
        super().set_cache_hook(cache_hook)

    def get_model_info(self) -> dict[str, Any]:
        """What lands in the results file: the method, and what it did to the requests since the last evaluation."""
        method, asked = self.method, self.asked
        _log.info("%s", self.requests.sentence())
        return {**super().get_model_info(), "kvbench": {
            "version": __version__, "method": method.name, "options": method.resolved,
            "ratio": None if asked["ratio"] is None else str(asked["ratio"]), "budget_tokens": asked["budget_tokens"],
            "adapter": None if asked["adapter"] is None else str(asked["adapter"]), "seed": asked["seed"],
            "split": self.split.name, "min_context": self.min_context,
            **self.requests.summary(),
        }}

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._counted():
            return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._counted():
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        with self._counted():
            return super().generate_until(requests, disable_tqdm)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Forget the counts of an evaluation that fails within the block."""
        try:
            yield
        except BaseException:
            self.requests.forget()
            raise

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Log-likelihoods of continuations, and of windows of longer texts."""
        whole, windows = list[int](), defaultdict[int, list[int]](list)
        prompts = defaultdict[tuple[tuple[int, ...], int], list[int]](list)
        for place, (strings, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UserError(
                    f"A continuation has {len(continuation)} tokens, and the model reads {self.max_length}.",
                    "Give shorter ones, or a larger max_length.",
                )
            ids = self._fitting(context, continuation)
            before = ids[: len(ids) - len(continuation)]
            # Blanks at the end of a context belong to the continuation, as they are tokenised.
            asked = strings[0].rstrip() if strings else ""
            question = self.split.tokens(asked, self.tok_encode) if asked else 1
            if (len(ids) - 1 if strings is None else len(before) - question) < self.min_context:
                whole.append(place)
            elif strings is None:
                windows[len(ids)].append(place)
            else:
                prompts[tuple(before), question].append(place)
        self.requests.leave_whole(len(whole))
        kept = super()._loglikelihood_tokens([requests[place] for place in whole], disable_tqdm, override_bs)
        found = dict(zip(whole, kept, strict=True))
        left = len(requests) - len(whole)
        with self._compressed() as run, tqdm(
            total=left, disable=disable_tqdm or not left, desc="Running compressed loglikelihood requests"
        ) as bar:
            for (before_ids, question), places in sorted(prompts.items(), key=lambda item: -len(item[0][0])):
                continuations = [requests[place][2] for place in places]
                found |= zip(places, self._continued(run, before_ids, question, continuations), strict=True)
                bar.update(len(places))
            for length, places in windows.items():
                for some in _batches(places, self.batch_size):
                    texts = [requests[place][1] + requests[place][2] for place in some]
                    scored = [len(requests[place][2]) for place in some]
                    found |= zip(some, self._read(run, torch.tensor(texts).view(-1, length), scored), strict=True)
                    bar.update(len(some))
        return [found[place] for place in range(len(requests))]

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """The ids of both; where they exceed the model's length, without those at the beginning."""
        ids, longest = context + continuation, self.max_length + 1
        if len(ids) > longest:
            _log.warning("A prompt is %s tokens too long: they are cut off at its beginning.", len(ids) - longest)
        return ids[-longest:]

    def _continued(
        self, run: CompressedModel, prompt: Sequence[int], question: int, continuations: Sequence[list[int]]
    ) -> Iterator[Answer]:
        """Compress a prompt up to its question, and score continuations behind the question."""
        asked = list(prompt[len(prompt) - question :])
        new = question + max(map(len, continuations)) - 1
        context = torch.tensor([prompt[: len(prompt) - question]], device=self.device)
        snapshot = run.prefill(context, torch.ones_like(context), new_tokens=new)
        self.requests.add(snapshot.cache.usage(), len(continuations))
        for some in _batches(continuations, self.batch_size):
            # Behind a continuation, any token may stand: nothing that is scored attends to it.
            ids = torch.zeros(len(some), question + max(map(len, some)) - 1, dtype=torch.long)
            targets = torch.full_like(ids, NO_TARGET)
            for row, continuation in enumerate(some):
                ids[row, : question + len(continuation) - 1] = torch.tensor(asked + continuation[:-1])
                targets[row, question - 1 : question + len(continuation) - 1] = torch.tensor(continuation)
            targets = targets.to(self.device)
            ids = ids.to(self.device)
            scores = run.score(ids, targets, after=snapshot, attention_mask=torch.ones_like(ids))
            yield from _answers(scores.log_likelihood, scores.is_best, targets)

    def _read(self, run: CompressedModel, ids: Tensor, scored: Sequence[int]) -> Iterator[Answer]:
        """Score windows ``[batch, n]`` while they are read and compressed: the last ``scored`` tokens of each."""
        targets = ids[:, 1:].clone()
        for row, count in enumerate(scored):
            targets[row, : targets.shape[1] - count] = NO_TARGET
        targets = targets.to(self.device)
        fed = ids[:, :-1].to(self.device)
        scores = run.score(fed, targets, attention_mask=torch.ones_like(fed))
        self.requests.add(scores.usage)
        yield from _answers(scores.log_likelihood, scores.is_best, targets)

    def tok_batch_encode(self, strings: list[str], *args: Any, **more: Any) -> Any:
        """Encode the prompts of a batch, and remember them: ``_model_generate`` is given their ids only."""
        self.prompts = list(strings)
        return super().tok_batch_encode(strings, *args, **more)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **settings: Any
    ) -> Tensor:
        """Generate behind prompts ``[batch, n]``, padded on the left; rows with equally long questions together."""
        lengths = attention_mask.sum(1).tolist()
        groups = defaultdict[tuple[int, int], list[int]](list)
        for row, (prompt, length) in enumerate(zip(self.prompts, lengths, strict=True)):
            question = self.split.tokens(prompt, self.tok_encode) if prompt else 1
            # Where rotations depend on the length, rows of equal length only can be read together.
            apart = length if dynamic_rotary(self.model) else 0
            groups[(question, apart) if length - question >= self.min_context else (0, 0)].append(row)
        written: dict[int, Tensor] = {}
        for (question, _), rows in groups.items():
            columns = max(1, *(lengths[row] for row in rows))
            ids, mask = context[rows, -columns:], attention_mask[rows, -columns:]
            limit = max_length - context.shape[1] + columns
            if question:
                with self._compressed() as run:
                    before = columns - question
                    snapshot = run.prefill(ids[:, :before], mask[:, :before], new_tokens=limit - before)
                    for group in snapshot.cache.groups:
                        self.requests.add(group.usage(0))
                    out = super()._model_generate(
                        ids, limit, stop, attention_mask=mask, past_key_values=snapshot.cache, **settings
                    )
            else:
                self.requests.leave_whole(len(rows))
                out = super()._model_generate(ids, limit, stop, attention_mask=mask, **settings)
            written |= zip(rows, out[:, columns:], strict=True)
        longest = max(map(len, written.values()))
        new = context.new_full((len(context), longest), self.tokenizer.pad_token_id)
        for row, tokens in written.items():
            new[row, : len(tokens)] = tokens
        return torch.cat([context, new], 1)


NO_CACHE = "Leave out use_cache (--use_cache)."
"""What to do about the request cache."""


def _check_arguments(others: Mapping[str, Any]) -> None:
    """Check the arguments of HFLM.

    Raises:
        UserError: one of them cannot be combined with compression.
    """
    refused = {
        "parallelize": "several devices", "tp_plan": "several devices", "mixed_precision_dtype": "mixed precision",
    }
    for name, what in refused.items():
        if others.get(name):
            raise UserError(f"{name} asks for {what}, which kvbench does not compress.", "Leave it out.")
    if others.get("backend") == "seq2seq":
        raise UserError("backend=seq2seq: kvbench compresses decoders only.", "Choose a causal language model.")
    size = others.get("batch_size", 1)
    if str(size).startswith("auto"):
        raise UserError("batch_size=auto measures the model without compression.", "Give a number.")
    if not re.fullmatch("0*[1-9][0-9]{0,8}", str(size)):
        raise UserError(f"batch_size={size!r} is no whole number of at least 1.", "It is the number of rows at a time.")


def _answers(likelihood: Tensor, is_best: Tensor, targets: Tensor) -> Iterator[Answer]:
    """Sums over the targets of each row, in single precision as in HFLM: where nothing is removed, its very number."""
    for row, best, wanted in zip(likelihood, is_best, targets != NO_TARGET, strict=True):
        yield float(row[wanted].float().sum()), bool(best[wanted].all())


def _batches(things: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]
