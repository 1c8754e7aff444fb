"""Small models made on the spot, and a way to call the command line."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything reads it: no test waits for a hub

import pytest
import torch
from hypothesis import settings
from torch import nn

if "PYTEST_XDIST_WORKER" in os.environ:  # cores are shared: a command has one child, unless its test says otherwise
    torch.set_num_threads(1)
    os.environ.setdefault("KVBENCH_THREADS", "1")

from tests.helpers.command import Outcome
from tests.helpers.models import FAMILIES, small_model
from tests.helpers.warm import children_begin_warm

gc.disable()  # while packages are imported, whose million objects are then left out of every collection

settings.register_profile("kvbench", deadline=None, max_examples=40)  # shared machines are slow at times
settings.load_profile("kvbench")


FIRST = ("guarantees", "profiling", "execution", "store", "cli", "training", "doctor")
"""Folders whose files take minutes: first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.parent.name, len(FIRST)))


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What commands keep between them is not the user's, here or in processes that tests start."""
    os.environ["KVBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _warm_children() -> None:
    """Children of commands that are called in this process need not import torch and transformers each."""
    if sys.platform == "linux":
        children_begin_warm()


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
    from tests.helpers.zoo import zoo_model

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
