"""Names that the shell completes.

Methods, metrics, models and protocols are written down here, since asking the tables that define them takes seconds
(PyTorch is imported); a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

METHODS = (
    "full", "none", "window", "sinks", "local", "scattered", "sentinel", "ccm-concat", "ccm-merge", "gist", "meanpool",
    "pic", "prompt", "icae", "comprexit", "ic-former", "rmt", "autocompressors", "gradual-forgetting", "output-memory",
    "unigist", "unigist-tuned", "beacon", "strided", "local-tuned", "scattered-tuned", "sinks-tuned", "strided-tuned",
    "adapted", "streaming-llm", "random", "knorm", "keydiff", "lagkv", "lagkv-tuned", "tova", "h2o", "snapkv",
    "pyramidkv", "chunkkv", "adakv", "expected-attention", "cascading", "cam", "d2o", "subgen", "kivi", "fp8", "think",
    "refreshkv", "lorc", "homer",
)
TRAINED = (
    "sentinel", "ccm-concat", "ccm-merge", "gist", "pic", "prompt", "icae", "comprexit", "ic-former", "rmt",
    "autocompressors", "gradual-forgetting", "unigist", "unigist-tuned", "beacon",
    "local-tuned", "scattered-tuned", "sinks-tuned", "strided-tuned", "adapted", "lagkv-tuned",
)
MODELS = ("kvbench-tiny", "smollm2-135m")
SHAPES = (
    "shape:gpt2", "shape:opt-125m", "shape:opt-1.3b", "shape:pythia-160m",
    "shape:pythia-1.4b", "shape:redpajama-3b", "shape:qwen2.5-0.5b", "shape:llama-3.2-1b", "shape:llama-3.1-8b",
)
PROTOCOLS = ("block", "stream", "prefix", "online", "generate", "decode", "answer")
WRITTEN = (
    "gen_ppl", "bleu", "chrf", "rouge1", "rouge2", "rougeL", "semantic", "prefix_coherence", "rep2", "rep3", "rep4",
    "diversity", "gen_length", "empty_share", "loop_share", "prefix_match", "distinct", "mauve",
)
"""Metrics of written text."""
METRICS = (
    "ppl", "nll", "bits_per_byte", "kl", "kl_p99", "top1_agreement", "kv_bytes_logical", "kv_bytes_physical",
    "kv_bytes_full", "accuracy", "answer_nll", "recovery", *WRITTEN, "answer_accuracy", "evidence_survival",
    "negative_share", "answer_length",
)
GROUPS = ("ruler", "babi", "longbench", "scbench", "babilong", "infinitebench")
"""Names that stand for several tasks."""


def _methods() -> Iterable[str]:
    from importlib.metadata import entry_points  # takes as long as all of the command line

    return (*METHODS, *(entry.name for entry in entry_points(group="kvbench.methods")))


def _tasks() -> Iterable[str]:
    package = Path(__file__).resolve().parents[1]
    places = (package / "tasks", package.parent / "tasks")  # in a wheel, in a checkout
    return (*GROUPS, *sorted(path.stem for place in places for path in place.glob("*.toml")))


def _among(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completion: the names that begin with what was typed."""
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


method, task = _among(_methods), _among(_tasks)
trained, protocol = _among(lambda: TRAINED), _among(lambda: PROTOCOLS)
model, model_or_shape = _among(lambda: MODELS), _among(lambda: (*MODELS, *SHAPES))
metric, metric_of_text = _among(lambda: METRICS), _among(lambda: WRITTEN)
listed = _among(lambda: ("methods", "tasks", "models", "metrics", *_methods()))
