"""Settings: flag > environment > kvbench.toml > default, and sentences for what is wrong."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvbench.errors import UserError
from kvbench.models.references import DEFAULT_MODEL

CONFIG_NAME = "kvbench.toml"
DTYPES = ("auto", "float32", "bfloat16", "float16")

M = TypeVar("M", bound=BaseModel)


class RunSettings(BaseModel):
    """The ``[run]`` table: the defaults of ``kvbench run``.

    Attributes:
        model: hub id or path of a causal language model; ``kvbench-tiny`` is embedded.
        method: methods to run.
        ratio: shares of cache entries to remove.
        task: tasks to run.
        limit: documents per task; 0 for all.
        seed: of the layouts and the resampling.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: of weights and cache; ``auto`` is float32 on CPU, the checkpoint's elsewhere.
        threads: CPU threads; 0 leaves the choice to kvbench.
        out: folder under which run folders are made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str = DEFAULT_MODEL
    method: list[str] = Field(default=["sentinel"], min_length=1)
    ratio: list[float] = Field(default=[0.7], min_length=1)
    task: list[str] = Field(default=["minidocs", "recall", "minidocs-gen"], min_length=1)
    limit: int = Field(default=0, ge=0)
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(default=0, ge=0)
    out: str = "reports"


class ProfileSettings(BaseModel):
    """The ``[profile]`` table: the defaults of ``kvbench profile``.

    Attributes:
        model: as for a run, or ``shape:NAME``.
        seq_len: tokens of the prompt.
        batch_size: prompts at a time.
        new_tokens: tokens to write.
        chunk: tokens of the prompt that are fed at a time.
        fill: ``real`` or ``synthetic``.
        repeats: processes; ``rounds`` timed requests of every cell in each, 0 for as many as are quick;
            ``warmups`` the most before them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: str = DEFAULT_MODEL
    method: list[str] = Field(default=["sinks", "sentinel"], min_length=1)
    ratio: list[float] = Field(default=[0.7], min_length=1)
    seq_len: list[int] = Field(default=[4096], min_length=1)
    batch_size: list[int] = Field(default=[1], min_length=1)
    new_tokens: int = 128
    chunk: int = 256
    fill: str = "real"
    repeats: int = 3
    rounds: int = 0
    warmups: int = 1
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(default=0, ge=0)
    out: str = "reports"


class SweepSettings(BaseModel):
    """The ``[sweep]`` table: the grid of ``kvbench sweep``, and how it is carried out.

    Attributes:
        model, method, ratio, task, seed: all combinations are measured.
        executor: ``local``, ``ray`` or ``slurm``; ``workers`` of it, 0 for as many as are useful here.
        timeout: seconds without a sign of life after which a measuring process is ended.
        keep_going: whether the other cells are measured after one has failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    model: list[str] = Field(default=[DEFAULT_MODEL], min_length=1)
    method: list[str] = Field(default=["sentinel", "ccm-concat", "gist"], min_length=1)
    ratio: list[float] = Field(default=[0.3, 0.5, 0.7, 0.8, 0.9], min_length=1)
    task: list[str] = Field(default=["minidocs", "recall"], min_length=1)
    seed: list[int] = Field(default=[0], min_length=1)
    limit: int = Field(default=0, ge=0)
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    threads: int = Field(default=0, ge=0)
    executor: Literal["local", "ray", "slurm"] = "local"
    workers: int = Field(default=0, ge=0)
    timeout: float = Field(default=3600.0, gt=0)
    keep_going: bool = True
    out: str = "reports"


class Settings(BaseModel):
    """The whole ``kvbench.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    run: RunSettings = RunSettings()
    profile: ProfileSettings = ProfileSettings()
    sweep: SweepSettings = SweepSettings()


def load_settings(path: Path | None) -> Settings:
    """The settings of a file, or of ``kvbench.toml`` in the current folder if there is one.

    Raises:
        UserError: the file is missing, not TOML, or has an unknown key or a wrong type.
    """
    if path is None:
        named = os.environ.get("KVBENCH_CONFIG")
        path = Path(named) if named else Path(CONFIG_NAME)
        if not named and not path.exists():
            return Settings()
    return read_toml(path, Settings, "settings file", "Check --config.")


def read_toml(path: Path, model: type[M], what: str, hint: str) -> M:
    """A TOML file, checked against a model.

    Args:
        what: the file is called; ``hint``: what to do where there is none.

    Raises:
        UserError: the file is missing, not TOML, or has an unknown key or a wrong type.
    """
    try:
        return model.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"There is no {what} {path}.", hint) from None
    except OSError as error:
        raise UserError(f"The {what} {path} cannot be read: {error.strerror}.") from error
    except ValidationError as error:
        raise UserError(_sentence(path, error)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"The {what} {path} is not valid TOML: {error}.") from error


def _sentence(path: Path, error: ValidationError) -> str:
    """File, key and allowed values of the first fault, as one sentence."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table = _model_at(error.title, first["loc"][:-1])
        allowed = f" Allowed keys here: {', '.join(sorted(table))}." if table else ""
        return f"{path}: unknown key {key!r}.{allowed}"
    return f"{path}: {key}: {first['msg']} (given: {first['input']!r})."


def _model_at(title: str, where: tuple[int | str, ...]) -> list[str]:
    """Names of the keys that the table at ``where`` may have."""
    roots = {kind.__name__: kind for kind in BaseModel.__subclasses__()}
    model: type[BaseModel] | None = roots.get(title)
    for part in where:
        field = model.model_fields.get(str(part)) if model else None
        annotation = field.annotation if field else None
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return list(model.model_fields) if model else []
