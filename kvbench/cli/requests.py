"""Creates requests from the parameters of a command and the settings file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.cli import options

if TYPE_CHECKING:
    from kvbench.config import ProfileSettings, RunSettings, SweepSettings
    from kvbench.planning.profile import ProfileRequest
    from kvbench.planning.quality import Request


def quality_request(
    given: Mapping[str, Any], settings: RunSettings | SweepSettings, model: str, seed: int
) -> Request:
    """Create the request of ``kvbench run`` or ``kvbench sweep``.

    Args:
        given: the command's parameters by name; None for those that the settings determine.

    Raises:
        UserError: a parameter is out of its range.
    """
    from kvbench.errors import UserError
    from kvbench.planning.methods import parse_budget
    from kvbench.planning.quality import Request

    ratio = given["ratio"] or ()
    if ratio and given["protocol"] == "decode":
        raise UserError("--ratio has no meaning with --protocol decode.", "Use --set entries= for what is kept.")
    return Request(
        **_shared(given, settings, model, seed), tasks=tuple(given["task"] or settings.task), data=given["data"],
        column=given["column"], protocol=given["protocol"], execution=given["execution"],
        limit=options.checked_limit(given["limit"], settings.limit), scorer=given["scorer"],
        mauve_features=given["mauve_features"], metrics=tuple(dict.fromkeys(given["metric"] or ())),
        budget=parse_budget(given["budget_tokens"], given["budget_bytes"], given["equal_bytes"], ratio),
    )


def profile_request(given: Mapping[str, Any], settings: ProfileSettings) -> ProfileRequest:
    """Create the request of ``kvbench profile``; see :func:`quality_request`."""
    from kvbench.planning.profile import ProfileRequest

    def number(name: str) -> int:
        value = given[name]
        return int(getattr(settings, name) if value is None else value)

    seed = options.checked_seed(given["seed"], settings.seed)
    return ProfileRequest(
        **_shared(given, settings, given["model"] or settings.model, seed),
        seq_lens=tuple(dict.fromkeys(given["seq_len"] or settings.seq_len)),
        batch_sizes=tuple(dict.fromkeys(given["batch_size"] or settings.batch_size)),
        new_tokens=number("new_tokens"), chunk=number("chunk"), fill=given["fill"] or settings.fill,
        repeats=number("repeats"), rounds=number("rounds"), warmups=number("warmups"), budget=given["memory_budget"],
        timeout=given["probe_timeout"],
    )


def _shared(
    given: Mapping[str, Any], settings: RunSettings | SweepSettings | ProfileSettings, model: str, seed: int
) -> dict[str, Any]:
    """The fields of :class:`kvbench.planning.request.MeasurementRequest`."""
    from kvbench.planning.quality import parse_options

    return {
        "model": options.shared(model, given.get("share")), "revision": given["revision"],
        "adapters": tuple(given["adapter"] or ()),
        "methods": tuple(given["method"] or settings.method),
        "ratios": tuple(given["ratio"] or (f"{ratio:.10g}" for ratio in settings.ratio)), "seed": seed,
        "options": parse_options(given["set_"] or []), "out": given["out"], "reports": Path(settings.out),
        "baselines": given["baselines"], "device": options.checked_device(given["device"] or settings.device),
        "dtype": options.checked_dtype(given["dtype"] or settings.dtype),
        "threads": options.checked_threads(given["threads"], settings.threads),
    }
