"""A queue of adapters: turns, curves, files that are refused, and a kill in the middle of a turn."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kvbench.models.adapter import WEIGHTS, read_card
from kvbench.training.adapter_recipe import run_adapter_training
from kvbench.training.curve import Point, read_curve, write_curve
from kvbench.training.loop import CHECKPOINT, Measure, Progress, checkpoint_step
from kvbench.training.materials import Materials
from kvbench.training.queue import Queue, Queued
from kvbench.training.request import AdapterRequest
from tests.helpers.command import Outcome, begun

ROOT = Path(__file__).parents[2]
Call = Callable[[Sequence[str | Path]], Outcome]

QUEUE = """
out = "adapters"
about = "Which of the two comes first?"
model = "model"
data = ["text.txt"]
held_out = "text.txt"
tokens = 384
every = 128
length = 64
rank = 4
slice = 128
ratios = ["0.5"]
documents = 2
recall = false
beside = ["full", "local"]

[[adapter]]
method = "sentinel"

[[adapter]]
method = "local-tuned"
name = "window"
tokens = 256
lr = 1e-3
"""


@pytest.fixture
def folder(tmp_path: Path, model_folder: Callable[..., Path]) -> Path:
    """With text, a queue file, and the model that it names: a small one, whose steps take a tenth of kvbench-tiny's."""
    (tmp_path / "model").symlink_to(model_folder("llama"), target_is_directory=True)
    words = np.random.default_rng(1).choice(["river", "stone", "bridge", "mill", "the", "of", "and"], 4000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    (tmp_path / "queue.toml").write_text(QUEUE)
    return tmp_path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / WEIGHTS)
    return found


class BrokenOffError(Exception):
    """Stands for whatever ends a training early."""


def test_turns_give_the_weights_of_an_uninterrupted_training(folder: Path) -> None:
    """Turns of one step each, broken off in the middle; beside it, each adapter trained by itself in one go."""
    order: list[str] = []

    def follow_of(breaks: int) -> Callable[..., Callable[..., None]]:
        def follow(one: object) -> Callable[..., None]:
            order.append(one.name)  # type: ignore[attr-defined]

            def followed(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
                for step, loss in training:
                    if len(order) == breaks:
                        raise BrokenOffError
                    measure(step, loss)

            return followed

        return follow

    with pytest.raises(BrokenOffError):
        Queue(folder / "queue.toml", threads=1).run(follow_of(4))
    assert order == ["sentinel", "window", "sentinel", "window"]
    Queue(folder / "queue.toml", threads=1).run(follow_of(0))
    assert order[4:] == ["window", "sentinel"]
    assert [len(read_curve(folder / "adapters" / name)) for name in ("sentinel", "window")] == [3, 2]

    def through(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
        assert [progress.step for progress in training] == list(range(1, steps + 1))

    materials = Materials()
    for one in Queue(folder / "queue.toml", threads=1).queued:
        whole = folder / f"{one.name}-whole"
        request = AdapterRequest(**{**vars(one.request), "out": whole, "held_out": None, "shared": None})
        assert run_adapter_training(request, through, materials=materials)
        ours, theirs = weights(one.request.out), weights(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        cards = read_card(one.request.out).training, read_card(whole).training
        assert cards[0]["loss"] == cards[1]["loss"]


def test_a_longer_training_begins_where_the_rate_of_a_shorter_one_falls(folder: Path) -> None:
    """Both have the weights of trainings from the start, and no step that both have is taken twice."""
    text = QUEUE.split("[[adapter]]", maxsplit=1)[0].replace("slice = 128", "slice = 256\nwarmup = 256")
    text += """
[[adapter]]
method = "sentinel"
name = "long"
tokens = 1536
[[adapter]]
method = "sentinel"
name = "short"
tokens = 768
"""
    (folder / "queue.toml").write_text(text)
    taken: dict[str, list[int]] = {"long": [], "short": []}

    def follow(one: Queued) -> Callable[..., None]:
        def followed(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
            taken[one.name] += [progress.step for progress in training]

        return followed

    queue = Queue(folder / "queue.toml", threads=1)
    queue.run(follow)
    assert taken["short"] == [1, 2, 2, 3, 4, 4, 5, 6]  # a turn says first where it begins
    assert taken["long"] == [5, 6, 7, 7, 8, 9, 9, 10, 11, 11, 12]
    materials = Materials()
    for one in queue.queued:
        whole = AdapterRequest(**{**vars(one.request), "out": folder / f"{one.name}-whole", "shared": None})
        run_adapter_training(whole, lambda training, *_: list(training), materials=materials)
        ours, theirs = weights(one.request.out), weights(whole.out)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_command_and_curves(called: Call, folder: Path) -> None:
    done = called(["train", "--queue", "queue.toml", "--threads", "1"])
    assert done.code == 0, done.err
    shown = called(["train", "--queue", "queue.toml", "--curves", "--json"])
    rows = shown.document["rows"]
    assert shown.document["about"] == "Which of the two comes first?"
    assert [(row["name"], row["tokens"]) for row in rows] == [
        ("full", 0), ("local", 0), ("sentinel", 128), ("sentinel", 256), ("sentinel", 384), ("window", 128),
        ("window", 256),
    ]
    assert all(list(row["held_out"]) == ["0.5"] for row in rows[1:])
    drawn = called(["train", "--queue", "queue.toml", "--curves", "--figure", "drawn/curves.png"])
    assert drawn.code == 0
    assert "figure: drawn/curves.png, drawn/curves.pdf" in drawn.err
    assert {path.name for path in (folder / "drawn").iterdir()} == {"curves.png", "curves.pdf"}
    card = read_card(folder / "adapters" / "window")
    assert (card.method, card.training["lr"], card.training["tokens"]) == ("local-tuned", 1e-3, 256)
    assert card.held_out == rows[-1]["held_out"]
    assert f"{rows[-1]['held_out']['0.5']['nll']:.4f}" in done.out
    before = (folder / "adapters" / ".beside.json").read_bytes()
    assert called(["train", "--queue", "queue.toml"]).code == 0  # nothing is left to do
    assert (folder / "adapters" / ".beside.json").read_bytes() == before
    (folder / "queue.toml").write_text(QUEUE.replace("lr = 1e-3", "lr = 1e-4"))
    changed = called(["train", "--queue", "queue.toml"])
    assert changed.code == 2
    assert "window was trained with other settings: lr." in changed.err


@pytest.mark.parametrize(("old", "new", "said"), [
    ("recall = false", "recal = false", "unknown key 'recal'. Allowed keys here: about, adapter, batch_size"),
    ("lr = 1e-3", "lrr = 1e-3", "unknown key 'adapter.1.lrr'. Allowed keys here: batch_size"),
    ('method = "local-tuned"\nname = "window"', 'method = "sentinel"', "two adapters have the folder sentinel"),
    ('"local-tuned"\nname = "window"\ntokens = 256\nlr = 1e-3', '"sentinel"\nname = "b"',
     "b is trained in the same way as sentinel"),
    ('"local-tuned"', '"snapkv"', "Unknown trained method 'snapkv'"),
    ('"local-tuned"', '"local-tunde"', "local-tuned"),
    ('name = "window"', 'name = "../window"', "adapter.1.name"),
    ('name = "window"', 'set = {adapter = "gated"}', "gated"),
    ("tokens = 256", "tokens = 0", "adapter.1.tokens"),
    ('["full", "local"]', '["full", "sentinel"]', "Unknown method without an adapter 'sentinel'"),
    ('data = ["text.txt"]', 'data = ["missing.txt"]', "missing.txt"),
    ('ratios = ["0.5"]', 'ratios = ["1.5"]', "1.5"),
    ('ratios = ["0.5"]', 'ratios = ["0.99"]', "sentinel can reach none of the ratios 0.99 on the held-out text"),
    ('name = "window"', 'name = ".."', "adapter.1.name"), ('name = "window"', 'name = ".shared"', "adapter.1.name"),
    ("lr = 1e-3", 'data = ["missing.txt"]', "window: There is no data file"),
    ("lr = 1e-3", "length = 100000", "window: --length 100000"), ("lr = 1e-3", "seed = 9000000000000000000", "seed"),
    ("lr = 1e-3", 'set = {boundary = "4"}', "window: --set boundary= weighs the loss behind compressed pieces"),
    ("lr = 1e-3", 'held_out = "missing.txt"', "window: There is no data file"),
    ('"local-tuned"\nname = "window"\ntokens = 256\nlr = 1e-3', '"sentinel"\nname = "b"\nset = {adapter = "gated"}',
     "b is trained in the same way as sentinel"),
    ('held_out = "text.txt"\n', "", "beside is measured on held-out text"), ('"adapters"', '"a\\u0000"', "out"),
])
def test_queue_files_that_are_refused(called: Call, folder: Path, old: str, new: str, said: str) -> None:
    assert old in QUEUE
    (folder / "queue.toml").write_text(QUEUE.replace(old, new))
    done = called(["train", "--queue", "queue.toml"])
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert not list((folder / "adapters").glob("*/card.json"))


@pytest.mark.parametrize(("more", "said"), [
    (["--steps", "3"], "--steps does not go with --queue"), (["--method", "gist"], "--method does not go with"),
])
def test_options_beside_a_queue(called: Call, folder: Path, more: list[str], said: str) -> None:
    done = called(["train", "--queue", "queue.toml", *more])
    assert done.code == 2
    assert said in done.err


def test_text_that_changed_under_a_checkpoint_is_refused(called: Call, folder: Path) -> None:
    def stops(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
        list(training)

    queue = Queue(folder / "queue.toml", threads=1)
    one = next(queue.turns())
    assert not run_adapter_training(one.request, stops, one.steps_per_turn)
    assert checkpoint_step(one.request.out) == one.steps_per_turn == 1
    with (folder / "text.txt").open("a") as file:
        file.write(" another ending")
    done = called(["train", "--queue", "queue.toml"])
    assert done.code == 2
    assert "sentinel: " in done.err
    assert "on other texts: a --data file has changed" in done.err
    assert "--fresh" not in done.err
    assert "give the adapter another name in the file" in done.err
    assert checkpoint_step(one.request.out) == 1


def test_what_is_measured_may_not_change_under_a_checkpoint(called: Call, folder: Path) -> None:
    (folder / "queue.toml").write_text(QUEUE)
    one = next(Queue(folder / "queue.toml", threads=1).turns())
    run_adapter_training(one.request, lambda training, *_: list(training), one.steps_per_turn)
    (folder / "queue.toml").write_text(QUEUE.replace('["0.5"]', '["0.7"]'))
    done = called(["train", "--queue", "queue.toml"])
    assert done.code == 2
    assert "with other settings: held_out" in done.err


@pytest.mark.parametrize(("old", "new", "said"), [
    ('data = ["text.txt"]', 'data = ["other.txt"]', "other settings: data"),
    ("documents = 2", "documents = 1", "other settings: held_out"),
    ('model = "model"', 'model = "./other"', "other settings: model"),
])
def test_finished_adapters_are_those_of_the_file(
    called: Call, folder: Path, model_folder: Callable[..., Path], old: str, new: str, said: str
) -> None:
    (folder / "queue.toml").write_text(QUEUE.split("[[adapter]]", maxsplit=2)[0] + '[[adapter]]\nmethod = "sentinel"\n')
    queue = Queue(folder / "queue.toml", threads=1)
    queue.run(lambda one: lambda training, *_: list(training))
    (folder / "other.txt").write_text((folder / "text.txt").read_text() + " more")
    shutil.copytree(model_folder("qwen3"), folder / "other")
    (folder / "queue.toml").write_text((folder / "queue.toml").read_text().replace(old, new))
    done = called(["train", "--queue", "queue.toml"])
    assert done.code == 2
    assert said in done.err


def test_an_adapter_that_diverges_is_left_behind(called: Call, folder: Path) -> None:
    (folder / "queue.toml").write_text(QUEUE.replace('method = "sentinel"', 'method = "sentinel"\nlr = 1e30'))
    for _ in range(2):
        done = called(["train", "--queue", "queue.toml", "--threads", "1"])
        assert done.code == 1
        assert re.search(r"sentinel: .*not finite", done.err)
        assert "Traceback" not in done.err
    assert (folder / "adapters" / "window" / "card.json").exists()
    assert not (folder / "adapters" / "sentinel" / "card.json").exists()


def test_a_kill_while_the_first_files_are_written_does_not_block_the_queue(folder: Path) -> None:
    """What lies in the folder then is a training's own, and is written anew."""
    queue = Queue(folder / "queue.toml", threads=1)
    one = next(queue.turns())
    one.request.out.mkdir(parents=True)
    for name in ("checkpoint.pt.part", "log.jsonl.part", "best.safetensors.part", "best.safetensors"):
        (one.request.out / name).write_bytes(b"half")
    run_adapter_training(one.request, lambda training, *_: list(training), one.steps_per_turn)
    assert checkpoint_step(one.request.out) == 1


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_kill_while_an_adapter_is_saved_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Saving renames a card, the former folder and the new one; killed at any of these, the adapter is there later."""
    (folder / "queue.toml").write_text(QUEUE.split("[[adapter]]", maxsplit=2)[0] + '[[adapter]]\nmethod = "sentinel"\n')
    queue, rename, count = Queue(folder / "queue.toml", threads=1), os.replace, 0

    def breaks(source: str | Path, target: str | Path) -> None:
        nonlocal count
        if "card.json" in str(source) or Path(source).is_dir():
            count += 1
            if count == killed_at:
                raise BrokenOffError
        rename(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", breaks)
        with pytest.raises(BrokenOffError):
            queue.run(lambda one: lambda training, *_: list(training))
    steps: list[int] = []
    queue.run(lambda one: lambda training, *_: steps.extend(progress.step for progress in training))
    assert set(steps) <= {3}  # no step is taken twice: at most the last one is said again
    assert len(read_curve(folder / "adapters" / "sentinel")) == 1
    assert {path.name for path in (folder / "adapters").iterdir()} <= {".lock", ".beside.json", ".shared", "sentinel"}
    assert queue.queued[0].is_finished


def test_the_best_weights_do_not_depend_on_what_other_adapters_have_done(folder: Path) -> None:
    """Random words are learnt, and text is held out, whose loss rises: the best weights are early ones."""
    (folder / "held-out.txt").write_text("The ferry leaves at nine, and the tide turns an hour later. " * 40)
    text = QUEUE.split("[[adapter]]", maxsplit=1)[0].replace("slice = 128", "warmup = 128")
    text = text.replace('model = "model"', 'model = "kvbench-tiny"').replace('= "text.txt"', '= "held-out.txt"')
    text += 'set = {keep = "best", adapter = "plain", autocast = "none"}\nlr = 0.03\n'
    text = text.replace("tokens = 384", "tokens = 1280")
    both = '[[adapter]]\nmethod = "sentinel"\nname = "short"\ntokens = 640\n'
    long = '[[adapter]]\nmethod = "sentinel"\nname = "long"\n'
    cards = []
    for name, adapters in (("both", both + long), ("alone", long)):
        (folder / f"{name}.toml").write_text(text.replace('"adapters"', f'"{name}"') + adapters)

        def follow(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
            for step, loss in training:
                measure(step, loss)

        Queue(folder / f"{name}.toml", threads=1).run(lambda one: follow)
        cards.append(read_card(folder / name / "long"))
    assert cards[0].training["kept_step"] < 4  # where the rate of the shorter one falls
    assert cards[0].training["kept_step"] == cards[1].training["kept_step"]
    assert cards[0].held_out == cards[1].held_out


def test_checkpoints_from_before_an_option_are_continued(folder: Path) -> None:
    queue = Queue(folder / "queue.toml", threads=1)
    one = next(queue.turns())
    assert one.name == "sentinel"
    run_adapter_training(one.request, lambda training, *_: list(training), one.steps_per_turn)
    state = torch.load(one.request.out / CHECKPOINT, weights_only=True)
    assert state["plan"]["options"] == {"predict_from_cr": "false"}  # as it was before closing= and sees=


def test_queue_files_of_the_results_are_valid() -> None:
    """Those that results rest on; they name texts that are not part of the project."""
    assert [len(Queue(path).queued) for path in sorted((ROOT / "reports/reference/adapters").glob("*.toml"))] == [2, 4]
    found = [Queue(path) for path in sorted((ROOT / "reports/real/adapters").glob("*.toml"))]
    assert [len(queue.queued) for queue in found] == [15, 5, 9]
    by_method: dict[str, set[float]] = {}
    for one in found[2].queued:
        by_method.setdefault(one.request.method, set()).add(one.request.lr)
    assert {len(rates) for rates in by_method.values()} == {3}  # as many tries for each


def test_a_torn_line_of_a_curve_is_left_out(tmp_path: Path) -> None:
    points = [Point(2, 3.5, {"0.5": {"nll": 3.25}}), Point(4, float("nan"), {})]
    write_curve(tmp_path, points)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 6, "loss": 3.')
    found = read_curve(tmp_path)
    assert [point.step for point in found] == [2, 4]
    assert found[0] == points[0]


@pytest.mark.heavy
def test_killed_queue_continues_to_the_same_weights(folder: Path) -> None:
    """Kill -9 in the middle of a turn, go on: the weights and curves of an uninterrupted queue."""
    longer = QUEUE.replace("tokens = 384", "tokens = 1024").replace("tokens = 256", "tokens = 768")
    for name in ("whole", "killed"):
        text = longer.replace('"adapters"', f'"{name}"').replace("slice = 128", "slice = 256")
        (folder / f"{name}.toml").write_text(text)

    def follow(training: Iterator[Progress], steps: int, measure: Measure, every: int) -> None:
        for step, loss in training:
            measure(step, loss)

    def run(name: str) -> None:
        torch.set_num_threads(1)
        Queue(folder / f"{name}.toml", threads=1).run(lambda one: follow)

    with open(os.devnull, "w") as nothing:
        victim = begun(
            "train", "--queue", "killed.toml", "--threads", "1", cwd=folder, out=nothing.fileno(), err=nothing.fileno()
        )
    deadline = time.monotonic() + 120
    while not (folder / "killed" / "window" / CHECKPOINT).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (folder / "killed" / "window" / WEIGHTS).exists()
    run("killed")
    run("whole")
    for name in ("sentinel", "window"):
        whole, killed = (weights(folder / made / name) for made in ("whole", "killed"))
        assert all(torch.equal(whole[key], killed[key]) for key in whole)
        curves = [read_curve(folder / made / name) for made in ("whole", "killed")]
        assert curves[0] == curves[1]
        assert all(b.step - a.step == 1 for a, b in pairwise(curves[0]))
