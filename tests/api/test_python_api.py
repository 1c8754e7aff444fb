"""The public names: loaded when they are used, and used as the documentation says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvbench
from kvbench.models.references import assets

PAGE = Path(__file__).parents[2] / "docs" / "python-api.md"


def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "MODEL": str(assets() / "kvbench-tiny"), "ADAPTER": str(assets() / "adapters" / "kvbench-tiny-sentinel"),
    }
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), names)
    assert (tmp_path / "harbour.safetensors").is_file()


def test_importing_kvbench_loads_nothing() -> None:
    code = (
        "import sys, kvbench; assert 'compress' in dir(kvbench)\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_others_are_not() -> None:
    for name in kvbench.__all__:
        assert getattr(kvbench, name)
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = kvbench.compres  # type: ignore[attr-defined]
