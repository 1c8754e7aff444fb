"""Small models made on the spot, and a way to call the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test waits for a hub

import pytest
import torch
from hypothesis import settings
from torch import nn

from kvbench.methods import Method
from kvbench.models.adapter import Adapter, AdapterCard
from kvbench.models.attention import register

if "PYTEST_XDIST_WORKER" in os.environ:  # cores are shared: a command has one child, unless its test says otherwise
    torch.set_num_threads(1)
    os.environ.setdefault("KVBENCH_THREADS", "1")
settings.register_profile("kvbench", deadline=None, max_examples=40)  # shared machines are slow at times
settings.load_profile("kvbench")

FAMILIES = ("llama", "qwen3", "mistral", "neox", "opt", "gpt2")
VOCABULARY = 97
CONTEXT = 256


def small_config(family: str, vocabulary: int = VOCABULARY, context: int = CONTEXT) -> Any:
    import transformers as hf

    sizes = {"vocab_size": vocabulary, "max_position_embeddings": context}
    marks = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    match family:
        case "llama":
            return hf.LlamaConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, initializer_range=0.1, **sizes, **marks)
        case "qwen3":
            return hf.Qwen3Config(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, initializer_range=0.1, **sizes, **marks)
        case "mistral":
            return hf.MistralConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, sliding_window=None, initializer_range=0.1, **sizes, **marks)
        case "neox":
            return hf.GPTNeoXConfig(
                hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
                initializer_range=0.1, **sizes, **marks)
        case "opt":
            return hf.OPTConfig(
                hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, init_std=0.1,
                word_embed_proj_dim=64, **sizes, **{**marks, "pad_token_id": 1})
        case "gpt2":
            return hf.GPT2Config(
                vocab_size=vocabulary, n_positions=context, n_embd=64, n_layer=3, n_head=4,
                initializer_range=0.1, **marks)
    raise ValueError(family)


def small_model(family: str, **sizes: int) -> nn.Module:
    """A random model of a family, with weights large enough for attention to matter."""
    import transformers as hf

    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(small_config(family, **sizes), attn_implementation=register())
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def small_card(gate: str = "gated", method: str = "sentinel", n_rows: int = 2, **options: str) -> AdapterCard:
    return AdapterCard(method, gate, 4, 4.0, n_rows, "small", "hash", options=options)


def small_adapter(model: nn.Module, gate: str = "gated", n_rows: int = 2) -> Adapter:
    """An adapter that changes what it acts on."""
    torch.manual_seed(1)
    adapter = Adapter.fresh(small_card(gate, n_rows=n_rows), model)
    for pair in adapter.by_path.values():
        nn.init.normal_(pair.b, std=0.2)
    with torch.no_grad():
        for weight in adapter.whole.values():
            weight.mul_(1.1)
    return adapter.eval().requires_grad_(False)


def adapter_for(model: nn.Module, method: Method, gate: str | None = None) -> Adapter | None:
    """An adapter that the method can be read with; None if it needs none."""
    if not method.adapter_kinds:
        return None
    return small_adapter(model, gate or method.adapter_kinds[0], method.n_rows)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep between them is not the user's, here or in processes that tests start."""
    os.environ["KVBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def model(family: str) -> nn.Module:
    return small_model(family)


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return small_model("llama")


@pytest.fixture(scope="session")
def llama_4096() -> nn.Module:
    """A random model that knows the ids of kvbench-tiny's tokenizer."""
    return small_model("llama", vocabulary=4096)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from kvbench.models.references import assets

    return AutoTokenizer.from_pretrained(str(assets() / "kvbench-tiny"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Makes (once each) a saved small model with the tokenizer of kvbench-tiny."""
    made: dict[Any, Path] = {}

    def make(family: str, **sizes: int) -> Path:
        key = (family, tuple(sorted(sizes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"model-{family}")
            wanted = {"vocabulary": 4096, "context": 1024, **sizes}
            small_model(family, **wanted).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Makes (once each) a saved small model of any type, with the tokenizer of kvbench-tiny."""
    from tests.zoo import zoo_model

    made: dict[str, Path] = {}

    def make(kind: str, **more: Any) -> Path:
        key = f"{kind} {more}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"zoo-{kind}")
            zoo_model(kind, vocab_size=4100, **more).save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def kvbench(*arguments: str | Path, cwd: Path, env: dict[str, str] | None = None) -> Outcome:
    """Run the command in a process of its own, offline."""
    done = subprocess.run(
        [sys.executable, "-m", "kvbench", *map(str, arguments)], cwd=cwd, text=True, capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "140", **(env or {})}, timeout=600, check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[[Sequence[str | Path]], Outcome]:
    """Run the command inside this process, in an empty folder: much faster for bad requests."""
    from kvbench.cli import app

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(arguments: Sequence[str | Path]) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvbench", *map(str, arguments)])
        capfd.readouterr()
        try:
            app.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call
