"""What the pages tell a reader to type: every command and every snippet, in the order in which they stand there.

A page is followed in a folder that has what it speaks of, under the same names: a small random model for every model, a
few texts for every corpus. So commands stand here as they stand there. What would take minutes, a network or a GPU is
planned, made short, or only parsed; each such exception has its reason.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from kvbench.cli.app import app
from kvbench.models.references import assets
from tests.helpers.command import Call
from tests.helpers.gguf_file import write_gguf
from tests.helpers.models import small_model
from tests.helpers.pages import PAGES, ROOT, Fence, commands, fences

MEASURED = ("docs/tutorial.md",)
"""Pages whose measurements are carried out. Elsewhere they are planned by ``--dry-run``, which resolves model, methods,
options, tasks and texts, and refuses what the run would refuse: they would take minutes to hours."""

SHORT = {
    "profile": ["--repeats", "1", "--rounds", "1", "--new-tokens", "4"],
    "ask": ["--new-tokens", "4"],
    "train --queue": ["--curves"],
    "train --method": ["--steps", "1", "--batch-size", "1", "--length", "64", "--rank", "2"],
}
"""What is added to commands that begin so, and take minutes otherwise."""

PARSED = {
    r"kvbench doctor": "takes a minute; tests/doctor",
    r"kvbench lm-eval": "its tasks are on the hub; tests/api/test_lm_eval.py has one of its own",
    r"--device cuda": "needs a GPU",
    r"--method (ends|mean-rows)": "of a package that is not installed; tests/methods/test_plugins.py",
    r"report (?!.*--bundle)\S*(\.\.\.|grid/|kvpress)": "draws for seconds; that of the tutorial is made",
    r"--task (longbench-hotpotqa|scbench-kv|wikitext2)": "texts on the hub",
}
"""Commands of which only names and values of options are checked."""

LEFT = {
    "kvbench --install-completion": "writes into the reader's home; tests/cli/test_completion.py",
    "cd mine/paper": "the folder of a report that is not made here",
    "pdflatex main": "LaTeX need not be there; tests/reporting/test_paper.py",
    "bibtex main": "the same",
}
"""Commands that are not looked at."""

NAMED = {"smollm2-135m": "MODEL", "ID": "story-01"}
"""Words that stand for something else here: a model from PyPI (make test-real runs it), a document."""

SKETCHED = {"docs/architecture.md": "an interface that is not built", "docs/lm-eval.md": "tests/api/test_python_api.py"}
"""Pages whose Python is compiled, not run."""

TOML = {
    "docs/adding-a-task.md": "notes.toml", "docs/how-to/cluster.md": "grid.toml",
    "docs/training.md": "adapters.toml",
}
"""What the first TOML file of a page is called."""

FOLLOWED = [page for page in PAGES if {"bash", "console", "python"} & {fence.language for fence in fences(page)}]

TEXT = "The ferry leaves at nine, and the tide turns an hour later. "


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with what the pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    small_model("llama", vocabulary=4097, context=512).save_pretrained(folder / "my-model")
    small_model("llama", vocabulary=4096, context=8192).save_pretrained(folder / "MODEL")
    for name in ("my-model", "MODEL"):
        tiny_tokenizer.save_pretrained(folder / name)
    write_gguf(folder / "my-model.gguf", small_model("llama", vocabulary=4097, context=512), tiny_tokenizer)
    for name in ("Qwen/Qwen3-0.6B", "gpt2-large"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(folder / "MODEL")
    rows = "".join(json.dumps({"text": f"{i}. {TEXT * 150}"}) + "\n" for i in range(3))
    for name in ("texts.jsonl", "notes.jsonl"):
        (folder / name).write_text(rows)
    for name in ("mybooks.jsonl.gz", "books.jsonl.gz", "valid.jsonl.gz"):
        (folder / name).write_bytes(gzip.compress(rows.encode()))
    (folder / "my-texts").mkdir()
    for name in ("mybook.txt", "report.txt", "my-texts/a.txt", "my-texts/b.txt"):
        (folder / name).write_text(TEXT * 40)
    import pandas as pd

    pd.DataFrame({"content": [TEXT * 40] * 2}).to_parquet(folder / "pages.parquet")
    question = {"context": TEXT * 40, "question": "When?", "answers": ["nine"]}
    (folder / "qasper.jsonl").write_text(json.dumps({**question, "input": "When?", "_id": "a"}) + "\n")
    for press, ratio in (("no_press", 0.0), ("snapkv", 0.5), ("knorm", 0.5)):
        place = folder / "results" / f"ruler__4096__Qwen--Qwen3-8B__{press}__{ratio:.2f}"
        place.mkdir(parents=True)
        (place / "predictions.csv").write_text(
            "answer,predicted_answer,task,compression_ratio,question,answer_prefix\n"
            + "".join(f"['{n}'],{n},niah_single_1,{ratio},What is {n}?,Answer: \n" for n in range(3))
        )
    frozen = ROOT / "tests" / "frozen"
    for page in PAGES:  # run folders whose names are cut short
        for name in re.findall(r"reports/[\w.-]*\.\.\.", (ROOT / page).read_text(encoding="utf-8")):
            source = "old_profile" if "profile" in name else "old_run"
            shutil.copytree(frozen / source, folder / name, dirs_exist_ok=True)
    for page, name in TOML.items():
        (folder / name).write_text(next(fence.code for fence in fences(page) if fence.language == "toml"))
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("page", FOLLOWED)
def test_a_page_can_be_followed(
    page: str, stand_ins: Path, tmp_path: Path, called: Call, llama_4096: Any
) -> None:
    shutil.copytree(stand_ins, tmp_path, symlinks=True, dirs_exist_ok=True)
    names: dict[str, Any] = {
        "MODEL": str(assets() / "kvbench-tiny"), "ADAPTER": str(assets() / "adapters" / "kvbench-tiny-sentinel"),
    }
    if page == "README.md":
        import torch

        names |= {"model": llama_4096.eval(), "inputs": {"input_ids": torch.arange(192)[None]}}
    for fence in fences(page):
        if fence.language == "python":
            code = compile(fence.code, page, "exec")
            if page not in SKETCHED:
                exec(code, names)
        elif fence.language == "latex":
            for file in re.findall(r"\\(?:includegraphics|input)\{(.*?)\}", fence.code):
                assert (tmp_path / file).is_file(), file
        elif fence.language in ("bash", "console"):
            for words in commands(fence, tmp_path):
                follow(page, [NAMED.get(word, word) for word in words], called)


def follow(page: str, words: list[str], called: Call) -> None:
    """Do what a page says."""
    program, *rest = words
    if shlex.join(words) in LEFT:
        return
    if program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip":
        installs(rest)
    elif program == "kvbench":
        if any(re.search(asked, shlex.join(words)) for asked in PARSED):
            parses(rest)
        else:
            done = called([*rest, *added(page, rest)])
            assert done.code == 0, f"{shlex.join(words)}\n{done.err}\n{done.out}"
    else:
        raise AssertionError(f"{page}: nobody knows whether this works: {shlex.join(words)}")


def added(page: str, words: list[str]) -> list[str]:
    if words[0] in ("run", "sweep", "profile") and page not in MEASURED:
        return ["--dry-run"]
    return next((more for begins, more in SHORT.items() if shlex.join(words).startswith(begins)), [])


def parses(words: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    with command.make_context(words[0], list(words[1:])):
        pass


def installs(words: list[str]) -> None:
    """The extras that are asked for exist, and so do the files."""
    assert words[0] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        if word == "constraints.txt":
            assert (ROOT / word).is_file()
        elif word != "-c":
            name, _, extras = word.removesuffix("]").partition("[")
            assert name in (".", "kvbench")
            assert set(filter(None, extras.split(","))) <= set(project["optional-dependencies"])


def test_every_block_says_what_it_is() -> None:
    """So that none is left out in silence."""
    known = {"bash", "console", "python", "toml", "diff", "latex", "text"}
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert {fence.language for fence in fences(page)} <= known, page
        assert len(re.findall(r"^ *```", text, flags=re.M)) == 2 * len(fences(page)), page
        for fence in fences(page):
            if fence.language == "text":
                assert not re.match(r"(kvbench \w+ --|pip|make|import) ", fence.code), (page, fence.code)


def test_no_exception_is_out_of_date(tmp_path: Path) -> None:
    said = [shlex.join(words) for page in PAGES for fence in fences(page) if fence.language in ("bash", "console")
            for words in commands(fence, tmp_path)]
    for asked in PARSED:
        assert any(re.search(asked, words) for words in said), asked
    assert set(LEFT) <= set(said)
    for word in NAMED:
        assert any(word in words.split() for words in said), word
    for page in (*MEASURED, *SKETCHED, *TOML):
        assert page in PAGES


def test_commands_are_read_as_a_shell_does(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    loop = "for n in 1 2; do\n  kvbench run --set x=$n *.txt   # said\ndone\n"
    code = f"{loop}make real && kvbench ask --question 'a b' \\\n  --chat\n"
    assert commands(Fence("bash", code), tmp_path) == [
        ["kvbench", "run", "--set", "x=1", "a.txt"], ["kvbench", "run", "--set", "x=2", "a.txt"], ["make", "real"],
        ["kvbench", "ask", "--question", "a b", "--chat"],
    ]
    assert commands(Fence("console", "$ kvbench list methods\nfull  everything\n"), tmp_path) == [
        ["kvbench", "list", "methods"]
    ]


def test_conclusions_have_their_numbers_from_the_page() -> None:
    """What results.md says in short stands below, digit for digit."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    _, short, below = re.split(r"^## In short\n|(?<=\n)(?=## A real model)", page, maxsplit=2, flags=re.M)
    number = re.compile(r"[+-]?\d+\.\d+")
    asked = {"0.7", "0.9"}  # ratios
    assert set(number.findall(short)) - set(number.findall(below)) - asked == set()
