"""What must not move while the code is rearranged: keys of cells, and every number of a few small runs.

``python tests/frozen/measure.py OUT.json`` measures with the kvbench that Python finds; two checkouts are held
against each other, to the last digit, with ``--against OTHER.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
OLD_RUN, OLD_PROFILE = FOLDER / "old_run", FOLDER / "old_profile"
"""Folders written by version 0.1: a run of two tasks, and a profile, whose timings are reported again."""
NUMBERS_SEEN, KEYS_SEEN = FOLDER / "expected.json", FOLDER / "keys.json"
"""What version 0.1 measured, and its keys of cells: these stay for ever, since folders are continued by them."""

METHODS = (
    "sentinel", "ccm-merge", "meanpool", "snapkv", "h2o", "kivi", "streaming-llm", "refreshkv", "cam", "adakv",
    "random",
)
SHORT = ("--ratio", "0.8", "--limit", "2", "--threads", "1", "--json")
RUNS: dict[str, tuple[str, ...]] = {
    "block": (
        "sweep", "--task", "minidocs", *(f"--method={name}" for name in METHODS), "--set", "step=8", "--seed", "0",
        "--seed", "1", "--set", "block=160", *SHORT,
    ),
    "recall": (
        "run", "--task", "recall", "--method", "ccm-concat", "--method", "snapkv", "--method", "sinks", *SHORT,
    ),
    "stream": (
        "run", "--task", "minidocs", "--protocol", "stream", "--set", "tokens=160", "--method", "sentinel",
        "--method", "tova", "--method", "ccm-concat", "--set", "budget=96", *SHORT,
    ),
    "prefix": (
        "run", "--task", "minidocs", "--protocol", "prefix", "--method", "pyramidkv", "--method", "window", *SHORT,
    ),
    "masked": (
        "run", "--task", "minidocs", "--execution", "onepass", "--method", "sinks", "--set", "block=96", *SHORT,
    ),
    "generate": (
        "run", "--task", "minidocs-gen", "--method", "sentinel", "--method", "h2o", "--set", "prefix=96", "--set",
        "new_tokens=12", "--metric", "gen_ppl", "--metric", "rougeL", "--metric", "rep4", *SHORT,
    ),
    "online": (
        "run", "--task", "online", "--task", "online-profiles", "--method", "ccm-merge", "--method", "ccm-concat",
        *SHORT,
    ),
}
WORDS = ("task", "protocol", "method", "ratio_asked", "removal", "metric", "n", "unit", "baseline", "seed")
NUMBERS = ("ratio_realised", "ratio_mean", "entries_peak", "value", "ci_low", "ci_high", "delta", "delta_ci_low",
           "delta_ci_high", "p_value")

REQUESTS: dict[str, tuple[str, ...]] = {
    "block": ("run", "--task", "minidocs", *(f"--method={name}" for name in (
        "window", "sinks", "local", "scattered", "sentinel", "ccm-concat", "ccm-merge", "gist", "meanpool",
        "local-tuned", "scattered-tuned", "streaming-llm", "random", "knorm", "keydiff",
        "lagkv", "tova", "h2o", "snapkv", "pyramidkv", "chunkkv", "adakv", "expected-attention", "cascading", "cam",
        "d2o", "kivi", "fp8", "refreshkv", "lorc",
    )), "--ratio", "0.8"),
    "channels": ("run", "--task", "minidocs", "--method", "think", "--ratio", "0.3"),
    "options": (
        "run", "--task", "minidocs", "--method", "sinks", "--method", "snapkv", "--set", "sink=2", "--set",
        "window=16", "--set", "block=96", "--ratio", "0.5", "--seed", "7", "--dtype", "bfloat16", "--device", "cpu",
    ),
    "budget": ("run", "--task", "minidocs", "--method", "h2o", "--method", "window", "--budget-tokens", "64"),
    "onepass": ("run", "--task", "minidocs", "--method", "sentinel", "--execution", "onepass", "--ratio", "0.7"),
    "stream": ("run", "--task", "minidocs", "--protocol", "stream", "--method", "tova", "--method", "sentinel",
               "--ratio", "0.7"),
    "prefix": ("run", "--task", "minidocs", "--protocol", "prefix", "--method", "snapkv", "--method", "ccm-merge",
               "--ratio", "0.8"),
    "recall": ("run", "--task", "recall", "--method", "snapkv", "--method", "gist", "--ratio", "0.8", "--set",
               "question=known"),
    "online": ("run", "--task", "online", "--task", "online-profiles", "--method", "ccm-concat",
               "--ratio", "0.8"),
    "generate": ("run", "--task", "minidocs-gen", "--method", "sentinel", "--method", "kivi", "--ratio", "0.7"),
    "profile": ("profile", "--method", "sinks", "--method", "snapkv", "--method", "sentinel", "--method", "pic",
                "--method", "sinks-tuned", "--seq-len", "512", "--ratio", "0.75"),
}

Measured = dict[str, dict[str, Any]]
Say = Callable[..., dict[str, Any]]
"""How a command is run; see :func:`said`."""


def said(place: Path, *words: str) -> dict[str, Any]:
    """The document that a command prints, which is run in a folder."""
    mine = {name: value for name, value in os.environ.items() if not name.startswith("KVBENCH_")}
    environment = {**mine, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "kvbench", *words], cwd=place, env=environment, text=True,
                          capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kvbench {' '.join(words)} ended with {done.returncode}: {done.stderr}")
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def measured(say: Say = said) -> Measured:
    """By the name of a run: the keys of its cells, its signatures, and its rows (words: numbers)."""
    with tempfile.TemporaryDirectory() as place:
        found = {name: carried_out(Path(place), *words, "--out", name, say=say) for name, words in RUNS.items()}
        found["profile"] = _shortened(say(Path(place), "report", str(OLD_PROFILE), "--json", "--out", "reported"))
    return found


def carried_out(place: Path, *words: str, say: Say = said) -> dict[str, Any]:
    """What a command, whose last word is its folder, measures there."""
    found = _shortened(say(place, *words))
    return {**found, "cells": sorted(path.parent.name for path in (place / words[-1]).glob("cells/*/cell.json"))}


def keys(say: Say = said) -> dict[str, dict[str, str]]:
    """By request: the keys of the cells it asks for, by what they are.

    They are asked for by a sweep, which leaves out what a run refuses, and names it all the same.
    """
    found = {}
    for name, (command, *words) in REQUESTS.items():
        plan = say(Path.cwd(), "sweep" if command == "run" else command, *words, "--dry-run", "--json")
        cells = [*plan["cells"], *plan.get("left_out", ())]
        found[name] = {_name_of(cell): cell["key"] for cell in cells}
    return found


def _name_of(cell: dict[str, Any]) -> str:
    words = (cell[name] for name in ("task", "protocol", "method", "ratio_asked"))
    options = (cell["options"].get(name) for name in ("seq_len", "chunk"))
    return " ".join(str(word) for word in (*words, *options) if word is not None)


def differences(mine: Measured, theirs: Measured, relative: float = 0.0) -> list[str]:
    """Where two measurements differ: in a key, a word, or in a number by more than a share of it."""
    wrong = [f"{name}: measured by one only" for name in set(mine) ^ set(theirs)]
    for name in sorted(set(mine) & set(theirs)):
        one, other = mine[name], theirs[name]
        wrong += [f"{name}: other {part}" for part in ("cells", "signatures") if one.get(part) != other.get(part)]
        wrong += [f"{name}: {row} is a row of one only" for row in set(one["rows"]) ^ set(other["rows"])]
        wrong += [
            f"{name}: {field} of {row}: {a!r} against {b!r}"
            for row in sorted(set(one["rows"]) & set(other["rows"]))
            for field, a, b in zip(NUMBERS, one["rows"][row], other["rows"][row], strict=True)
            if not _near(a, b, relative)
        ]
    return wrong


def _near(one: float | None, other: float | None, relative: float) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= relative * max(abs(one), abs(other), 1.0)


def _shortened(document: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, list[float | None]] = {}
    for row in document["rows"]:
        if row["params"]["bin"] is not None:
            continue  # parts of other rows
        named = " ".join(str(row[name]) for name in WORDS)
        named += "".join(f" {key}={value}" for key, value in sorted(row["params"].items()) if value is not None)
        assert named not in rows, f"two rows are called {named}"
        rows[named] = [row[name] for name in NUMBERS]
    return {"rows": rows, "signatures": sorted({str(row["signature"]) for row in document["rows"]})}


def compact(found: Any) -> str:
    """JSON with a line per row, so that differences can be read."""
    return json.dumps(found, sort_keys=True, separators=(",", ":")).replace('],"', '],\n"') + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path)
    given = parser.parse_args()
    found = measured()
    given.out.write_text(compact(found), encoding="utf-8")
    if given.against is not None:
        wrong = differences(found, json.loads(given.against.read_text(encoding="utf-8")))
        print("\n".join(wrong[:40]) or "equal to the last digit")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
