"""lm-evaluation-harness without what it does beside measuring."""

from __future__ import annotations

import pytest


def without_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes the harness seconds: the index of thousands of its own tasks, which are on the hub and of
    which no test speaks, and a description of the machine, for which it starts other programs."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
