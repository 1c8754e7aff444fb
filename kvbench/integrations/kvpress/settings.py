"""What a prediction file was measured with: said by ``config.yaml`` beside it, by its folder's name, or by the user."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

from kvbench.errors import UserError

CONFIG = "config.yaml"
FULL = "full"
_UNCOMPRESSED = ("no_press", FULL)
_TAKEN = ("none", "human", "adapted")
"""Names that tables give to something else."""


@dataclass(frozen=True)
class Settings:
    """Settings of kvpress' evaluation, by the names that they have there; None where nothing says them."""

    press_name: str | None = None
    model: str | None = None
    dataset: str | None = None
    data_dir: str | None = None
    compression_ratio: float | None = None
    threshold: float | None = None
    head_compression_ratio: float | None = None
    key_channel_compression_ratio: float | None = None
    target_size: int | None = None
    compression_interval: int | None = None
    max_context_length: int | None = None
    max_new_tokens: int | None = None
    query_aware: bool = False
    fp8: bool = False
    press_init_command: str | None = None
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore", "coerce_numbers_to_str": True}

    @property
    def method(self) -> str:
        """The press; ``full`` where nothing is removed."""
        return FULL if self.is_full else self.press_name or ""

    @property
    def is_full(self) -> bool:
        return self.press_name in _UNCOMPRESSED or (
            self.ratio == 0 and not self.key_channel_compression_ratio
        )

    @property
    def ratio(self) -> float | None:
        """The share to remove that was asked for; None for presses that are asked for something else."""
        name = self.press_name or ""
        other = (self.threshold, self.head_compression_ratio) != (None, None)
        return None if other or name == "think" or name.startswith("decoding_") else self.compression_ratio

    @property
    def ratio_text(self) -> str | None:
        """The ratio as its shortest decimal; None for the full cache, and where no share was asked for."""
        return None if self.is_full or self.ratio is None else _shortest(self.ratio)

    @property
    def variant(self) -> str:
        """What else was asked of the press, as in ``threshold=-4``."""
        asked = ["threshold", "head_compression_ratio", "key_channel_compression_ratio"]
        if (self.press_name or "").startswith("decoding_"):
            asked += ["target_size", "compression_interval"]
        values = {name: getattr(self, name) for name in asked}
        return "" if self.is_full else ",".join(
            f"{name}={_shortest(value)}" for name, value in values.items() if value is not None
        )

    @property
    def task(self) -> str:
        """Name of the task: data set, its part, and where contexts were cut."""
        cut = None if self.max_context_length is None else f"max{self.max_context_length}"
        return "-".join(part for part in ("kvpress", self.dataset, self.data_dir, cut) if part)


def _shortest(value: float) -> str:
    return f"{Decimal(str(value)).normalize():f}"


def settings_of(path: Path, given: Settings) -> Settings:
    """The settings of a prediction file; ``given`` by the user are those that the file's surroundings do not say.

    Raises:
        UserError: something needed is said nowhere, or twice and differently; or ``config.yaml`` is damaged.
    """
    config = path.parent / CONFIG
    source = f"{CONFIG} beside it" if config.is_file() else "the name of its folder"
    said = _read(config) if config.is_file() else _named(path)
    for option, name in OPTIONS.items():
        mine, theirs = getattr(said, name), getattr(given, name)
        if None not in (mine, theirs) and mine != theirs:
            raise UserError(
                f"{path}: {source} says {mine}, and --{option} {theirs}.", f"Leave --{option} out, or mend the file."
            )
    filled = {
        name: value for name in (*OPTIONS.values(), "data_dir") if (value := getattr(given, name)) is not None
        and getattr(said, name) is None
    }
    found = dataclasses.replace(said, **filled)
    _check(found, path)
    return found


OPTIONS = {"method": "press_name", "ratio": "compression_ratio", "model": "model", "dataset": "dataset"}
"""Option of the command -> setting that it stands for."""


def _check(found: Settings, path: Path) -> None:
    needed = {option: name for option, name in OPTIONS.items() if option != "ratio"}
    missing = [option for option, name in needed.items() if getattr(found, name) is None]
    asked_otherwise = found.variant or (found.press_name or "").startswith("decoding_") or found.is_full
    if not missing and found.ratio is None and not asked_otherwise:
        missing = ["ratio"]
    if missing:
        raise UserError(
            f"{path}: neither {CONFIG} beside it nor its folder's name says the {missing[0]}.",
            f"Give --{missing[0]}, or the file where kvpress wrote it.",
        )
    if found.ratio is not None and not 0 <= found.ratio < 1:
        raise UserError(f"{path}: its ratio {found.ratio} is no share in [0, 1).", "Give the share that was removed.")
    if found.press_name in _TAKEN:
        raise UserError(
            f"{path}: {found.press_name!r} is the name of something else in tables.",
            "The full cache is no_press; give presses their kvpress names.",
        )


def _read(path: Path) -> Settings:
    """Read ``config.yaml``; Python objects in it, which kvpress writes of some settings of a model, are not made."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("", lambda *_: None)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), loader)
        return TypeAdapter(Settings).validate_python({k: v for k, v in dict(raw).items() if v is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {first['loc'][0]}: {first['msg']}.", "Mend it.") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise UserError(
            f"{path}{line}: no settings of kvpress' evaluation.", "Copy it again, or leave it out."
        ) from error


def _named(path: Path) -> Settings:
    """Settings from the name of the folder, as in ``ruler__4096__Qwen--Qwen3-8B__snapkv__0.50__query_aware``."""
    folder = path.resolve().parent
    name = folder.parent.name if folder.name.isdecimal() else folder.name  # repeated runs are in numbered folders
    parts = name.split("__")
    more: dict[str, Any] = {}
    while parts and (found := _SUFFIX.fullmatch(parts[-1])):
        parts.pop()
        more |= {key: value for key, value in found.groupdict().items() if value is not None}
    if len(parts) not in (4, 5) or not _NUMBER.fullmatch(parts[-1]):
        return Settings()
    dataset, *data_dir, model, press, number = parts
    value = float(number)
    by_head, by_share = press.startswith("duo_attention"), 0 <= value <= 1
    return Settings(
        press_name=press, model=model.replace("--", "/"), dataset=dataset, data_dir=data_dir[0] if data_dir else None,
        query_aware="query_aware" in more,
        max_context_length=int(more["max_context"]) if "max_context" in more else None,
        key_channel_compression_ratio=float(more["key_channel_cr"]) if "key_channel_cr" in more else None,
        head_compression_ratio=value if by_head else None,
        compression_ratio=value if by_share and not by_head else None,
        threshold=None if by_share or by_head else value,
    )


_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_SUFFIX = re.compile(
    r"fraction[\d.]+|max_context(?P<max_context>\d+)|(?P<query_aware>query_aware)"
    r"|key_channel_cr(?P<key_channel_cr>[\d.]+)|needle_depth\d+"
)
