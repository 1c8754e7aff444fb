"""Training over several processes gives the weights of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvbench.errors import UserError
from kvbench.models.adapter import ROWS, WEIGHTS
from kvbench.training.team import assemble
from tests.helpers.command import module


def test_alone_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    team = assemble("cpu", 3)
    assert (team.rank, team.size, team.leads, team.accelerator) == (0, 1, True, None)
    assert torch.equal(team.own_rows(torch.arange(3)), torch.arange(3))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="cannot be shared out over 2"):
        assemble("cpu", 3)


@pytest.mark.heavy
def test_two_processes_train_the_weights_of_one(tmp_path: Path) -> None:
    """Rows are shared out and gradients averaged; only the first process writes.

    They are started as accelerate launch starts those of several GPUs: on a CPU, it starts one only.
    """
    (tmp_path / "text.txt").write_text("The mill by the old bridge had nine flat stones. " * 300)
    root = Path(__file__).parents[2]
    command: list[str | Path] = [
        "train", "--method", "ccm-concat", "--data", tmp_path / "text.txt", "--steps", "4", "--batch-size", "4",
        "--length", "64", "--rank", "4", "--every", "2", "--device", "cpu", "--threads", "1",
        "--set", "autocast=none",
    ]
    team = [
        "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29531", "-m", "tests.helpers.member",
    ]
    for run, out in ((["kvbench"], "alone"), (team, "team")):
        done = module(*run, *command, "--out", tmp_path / out, cwd=root, env={"OMP_NUM_THREADS": "1"})
        assert done.code == 0, done.err[-3000:]
    for name in (WEIGHTS, ROWS):
        one, two = load_file(tmp_path / "alone" / name), load_file(tmp_path / "team" / name)
        assert one.keys() == two.keys()
        assert all((one[key] - two[key]).abs().max() < 2e-4 for key in one)
    names = [sorted(p.name for p in (tmp_path / out).iterdir()) for out in ("alone", "team")]
    assert names[0] == names[1]
