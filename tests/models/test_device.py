"""The device that a name stands for."""

from __future__ import annotations

import pytest
import torch

from kvbench.errors import UserError
from kvbench.models.device import pick_device


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda:1"), ("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_a_gpu_is_named_with_its_number(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert pick_device(name) == torch.device(device)


@pytest.mark.parametrize("name", ["mps", "cuda:x", "cuda:99", ""])
def test_what_is_not_there_is_said(name: str) -> None:
    with pytest.raises(UserError, match="is not available here"):
        pick_device(name)
