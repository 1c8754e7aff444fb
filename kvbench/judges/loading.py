"""Loading the models that judge generated texts, before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvbench.errors import UserError
from kvbench.judges.choice import NOTHING, SENTENCES, JudgeChoice
from kvbench.judges.encoder import Encoder, SentenceEncoder, StateEncoder, packed
from kvbench.judges.fluency import Scorer
from kvbench.metrics.mauve import LEAST_TEXTS
from kvbench.models.facts import ModelFacts
from kvbench.models.loading import Loaded, load_model
from kvbench.models.references import ModelReference
from kvbench.models.rope import dynamic_rotary
from kvbench.probe.cached import probed
from kvbench.store.records import ITSELF, Output


@dataclass(frozen=True)
class Judges:
    """The models that judge generated texts (``features``: for MAUVE); None for those that were not asked for."""

    scorer: Scorer | None = None
    encoder: Encoder | None = None
    features: Encoder | None = None

    def judged(self, prefixes: Sequence[str], outputs: Sequence[Output]) -> list[Output]:
        """The outputs with fluency and vectors added; ``prefixes`` holds the prefix of each output."""
        texts = [output.text for output in outputs]
        found = list(outputs)
        if self.scorer is not None:
            pairs = list(zip(prefixes, texts, strict=True))
            found = [
                replace(o, nll=f.nll, nll_tokens=f.tokens)
                for o, f in zip(found, self.scorer.score(pairs), strict=True)
            ]
        if self.encoder is not None:
            found = [replace(o, vector=packed(v)) for o, v in zip(found, self.encoder.encode(texts), strict=True)]
        if self.features is not None:
            found = [replace(o, features=packed(v)) for o, v in zip(found, self.features.encode(texts), strict=True)]
        return found

    def forget(self) -> None:
        """Free what was kept of prefixes: no text after them follows."""
        if self.scorer is not None:
            self.scorer.read.clear()


def load_judges(judging: JudgeChoice, loaded: Loaded, facts: ModelFacts, device: str, dtype: str) -> Judges:
    """Load the judges; ``loaded`` is the model under test, and ``facts`` are its.

    Raises:
        UserError: a model is missing, unreachable or unsuitable.
    """
    scorer = None
    if judging.scorer == ITSELF:
        scorer = _scorer(loaded, facts)
    elif judging.scorer != NOTHING:
        other = _load("--scorer", judging.models[judging.scorer], device, dtype)
        its_facts = probed(other, judging.models[judging.scorer].fingerprint)
        if its_facts.forward_refusal:
            raise UserError(f"--scorer {judging.scorer}: {its_facts.forward_refusal}", "Choose another model.")
        scorer = _scorer(other, its_facts)
    encoder: Encoder | None = None
    if judging.encoder:
        encoder = SentenceEncoder.load(str(next(loaded.model.parameters()).device))
    features: Encoder | None = None
    if judging.features not in (NOTHING, SENTENCES):
        if judging.features != judging.scorer:
            other = _load("--mauve-features", judging.models[judging.features], device, dtype)
        features = StateEncoder(other.model, other.tokenizer, other.context)
    return Judges(scorer, encoder, features)


def _scorer(loaded: Loaded, facts: ModelFacts) -> Scorer:
    shares = not facts.refusal and not dynamic_rotary(loaded.model)
    shared_up_to = min(facts.window or loaded.context, loaded.context) if shares else 0
    return Scorer(loaded.model, loaded.tokenizer, loaded.context, shared_up_to)


def _load(option: str, model: ModelReference, device: str, dtype: str) -> Loaded:
    try:
        loaded = load_model(model, device, dtype)
        model.check_unchanged()
    except UserError as error:
        raise UserError(f"{option} {model.name}: {error.message}", error.hint) from error
    return loaded


def check_mauve(judging: JudgeChoice, task: str, documents: int) -> None:
    """Check that there are enough texts for MAUVE, if it was asked for explicitly.

    Raises:
        UserError: there are too few.
    """
    if judging.mauve_asked and documents < LEAST_TEXTS:
        raise UserError(
            f"mauve needs at least {LEAST_TEXTS} documents, and task {task!r} has {documents} "
            "here: with fewer it says more about its own clustering than about the texts.",
            "Give more documents, or leave out --metric mauve and --mauve-features.",
        )
