"""Settings of commands: flag > environment > kvbench.toml > default. Faults in the file raise a ``UserError``."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Literal, TypeVar, get_args

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
        ratio: fractions of cache entries to remove.
        task: tasks to run.
        limit: maximum number of documents per task; 0 for all.
        seed: seed of the layouts and of the resampling.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: dtype of weights and cache; ``auto`` is float32 on a CPU, that of the checkpoint elsewhere.
        threads: number of CPU threads; 0 lets kvbench choose.
        out: folder in which run folders are created.
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
        model: as for a run, or ``shape:NAME`` for random weights in a published shape.
        seq_len: lengths of the prompt in tokens.
        batch_size: numbers of prompts per batch.
        new_tokens: number of tokens to generate.
        chunk: prompt tokens per forward pass; the full cache reads the prompt in a single pass.
        fill: ``real`` reads the prompt, ``synthetic`` fills the cache with random entries.
        repeats: number of processes.
        rounds: timed requests of every cell per process; 0 for 4, or fewer if they are slow.
        warmups: maximum number of warm-up requests before them.
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
    """The ``[sweep]`` table: the grid of ``kvbench sweep``, and how it is executed.

    Attributes:
        model, method, ratio, task, seed: every combination is measured.
        executor: ``local``, ``ray`` or ``slurm``.
        workers: number of processes that measure; 0 for as many as are useful locally, or 2 elsewhere.
        timeout: seconds without progress after which a measuring process is killed.
        keep_going: whether to measure the remaining cells after one has failed.
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
    """The content of ``kvbench.toml``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    run: RunSettings = RunSettings()
    profile: ProfileSettings = ProfileSettings()
    sweep: SweepSettings = SweepSettings()


def load_settings(path: Path | None) -> Settings:
    """Read settings from ``path``, else from ``$KVBENCH_CONFIG``, else from ``./kvbench.toml`` if it exists.

    Raises:
        UserError: the file is missing, is not TOML, or has an unknown key or a value of the wrong type.
    """
    if path is None:
        named = os.environ.get("KVBENCH_CONFIG")
        path = Path(named) if named else Path(CONFIG_NAME)
        if not named and not path.exists():
            return Settings()
    return read_toml(path, Settings, "settings file", "Check --config.")


def read_toml(path: Path, model: type[M], what: str, hint: str) -> M:
    """Read a TOML file and validate it against a pydantic model.

    Args:
        what: the kind of file, for error messages; ``hint``: what to do if the file is missing.

    Raises:
        UserError: the file is missing, is not TOML, or has an unknown key or a value of the wrong type.
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
    """The first fault as an error message: file, key, and the allowed keys or the given value."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        table = _model_at(error.title, first["loc"][:-1])
        allowed = f" Allowed keys here: {', '.join(sorted(table))}." if table else ""
        return f"{path}: unknown key {key!r}.{allowed}"
    return f"{path}: {key}: {first['msg']} (given: {first['input']!r})."


def _model_at(title: str, where: tuple[int | str, ...]) -> list[str]:
    """Names of the keys allowed in the table at ``where``."""
    model = _kinds().get(title)
    for part in where:
        if isinstance(part, int):  # an item of a list of tables
            continue
        field = model.model_fields.get(part) if model else None
        annotation = field.annotation if field else None
        inner = (annotation, *get_args(annotation))
        model = next((kind for kind in inner if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return list(model.model_fields) if model else []


def _kinds() -> dict[str, type[BaseModel]]:
    """All kinds of tables, by name."""
    found, left = {}, [BaseModel]
    while left:
        kind = left.pop()
        found[kind.__name__] = kind
        left += kind.__subclasses__()
    return found
