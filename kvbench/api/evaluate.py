"""Measuring from a program: what ``kvbench run``, ``profile`` and ``report`` do, with the same folders and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbench.api.results import Evaluation
from kvbench.api.wording import in_python
from kvbench.config import ProfileSettings, RunSettings
from kvbench.models.references import DEFAULT_MODEL

if TYPE_CHECKING:
    from kvbench.methods import Method

    Methods = Sequence[str | Method]


def evaluate(
    model: Any = DEFAULT_MODEL, methods: Methods = ("sentinel",), ratios: Sequence[float | str] = (0.7,),
    tasks: Sequence[str | Path] = tuple(RunSettings().task), *, limit: int = 0, out: str | Path | None = None,
    options: Mapping[str, Any] | None = None, fresh: bool = False, progress: bool = True, tokenizer: Any = None,
    **more: Any,
) -> Evaluation:
    """Measure the quality of compressed models; the same call continues what was interrupted.

    Args:
        model: hub id or folder; or a model object, which is saved to kvbench's cache once, with its ``tokenizer``.
        methods: names, with options of their own as in ``snapkv:window=16``, or method objects.
        ratios: shares of entries to remove.
        tasks: names, or paths of task files.
        limit: documents per task; 0 for all.
        out: the run folder; None for one under ``reports``.
        options: given to every method and protocol that has them, as ``--set`` does.
        fresh: measure again what is on disk.
        progress: show what is being measured on the standard error.
        more: other fields of :class:`kvbench.planning.quality.Request`, such as ``adapters``, ``data``, ``seed``,
            ``baselines``, ``budget``, ``device``, ``dtype``, ``threads``, ``protocol``, ``scorer``.

    Raises:
        UserError: the request cannot be carried out; nothing was written.
        KeyboardInterrupt: stopped by the user; what was measured is kept.
    """
    from kvbench.api.measure import run_plan
    from kvbench.planning.quality import Request, build_plan

    usual: dict[str, Any] = {
        "revision": None, "adapters": (), "seed": 0, "reports": Path(RunSettings().out), "baselines": True,
        "device": "auto", "dtype": "auto", "threads": 0, "data": None, "protocol": None, "execution": "streamed",
    }
    request = Request(**{
        **usual, "model": _place(model, tokenizer), "methods": spelled(_several(methods)),
        "ratios": tuple(map(str, _several(ratios))),
        "tasks": tuple(map(str, _several(tasks))), "limit": limit, "options": _texts(options),
        "out": None if out is None else Path(out), **_known(more, Request),
    })
    with in_python():
        plan = build_plan(request)
        return Evaluation(plan.folder, run_plan(plan, ["kvbench.evaluate"], _console(progress), fresh))


def profile(
    model: Any = DEFAULT_MODEL, methods: Methods = ("sinks", "sentinel"), ratios: Sequence[float | str] = (0.7,),
    seq_lens: Sequence[int] = (4096,), batch_sizes: Sequence[int] = (1,), *, new_tokens: int = 128,
    out: str | Path | None = None, options: Mapping[str, Any] | None = None, fresh: bool = False, progress: bool = True,
    tokenizer: Any = None, **more: Any,
) -> Evaluation:
    """Measure time and memory; see :func:`evaluate`.

    Args:
        model: as there, or ``shape:NAME`` for random weights.
        seq_lens: tokens of the prompt.
        batch_sizes: prompts at a time.
        new_tokens: to generate.
        more: other fields of :class:`kvbench.planning.profile.ProfileRequest`, such as ``repeats`` or ``fill``.
    """
    from kvbench.api.measure import profile_plan
    from kvbench.planning.profile import ProfileRequest, build_profile_plan

    settings = ProfileSettings()
    usual: dict[str, Any] = {
        "revision": None, "adapters": (), "seed": 0, "reports": Path(settings.out), "baselines": True,
        "device": "auto", "dtype": "auto", "threads": 0, "chunk": settings.chunk, "fill": settings.fill,
        "repeats": settings.repeats, "rounds": settings.rounds, "warmups": settings.warmups, "budget": None,
        "timeout": 300,
    }
    request = ProfileRequest(**{
        **usual, "model": _place(model, tokenizer), "methods": spelled(_several(methods)),
        "ratios": tuple(map(str, _several(ratios))),
        "seq_lens": tuple(_several(seq_lens)), "batch_sizes": tuple(_several(batch_sizes)), "new_tokens": new_tokens,
        "options": _texts(options), "out": None if out is None else Path(out), **_known(more, ProfileRequest),
    })
    with in_python():
        plan = build_profile_plan(request)
        return Evaluation(plan.folder, profile_plan(plan, ["kvbench.profile"], _console(progress), fresh))


def load(folder: str | Path) -> Evaluation:
    """The results of a run folder, from what is on disk; needs neither the model nor PyTorch.

    Raises:
        UserError: it is no run folder, or it is damaged.
    """
    from kvbench.analysis.results import compute_results
    from kvbench.store.folder import RunFolder

    return Evaluation(Path(folder), compute_results(RunFolder(Path(folder))))


def list_methods() -> list[dict[str, str]]:
    """Every method, those of other packages included: ``name``, ``summary``, ``paper``, and its ``options``."""
    from kvbench.methods import METHODS

    return [
        {
            "name": kind.name, "summary": kind.summary, "paper": kind.paper,
            "options": ", ".join(f"{name}={option.default}" for name, option in kind.options().items()),
        }
        for kind in METHODS.values()
    ]


def spelled(methods: Methods) -> tuple[str, ...]:
    """Methods as on the command line: ``snapkv:window=16``."""
    found = []
    for method in methods:
        if isinstance(method, str):
            found.append(method)
            continue
        known = method.options()
        given = [f"{name}={text}" for name, text in method.resolved.items() if text != known[name].default]
        found.append(f"{method.name}:{','.join(given)}" if given else method.name)
    return tuple(found)


def _several(given: Any) -> Sequence[Any]:
    """A sequence as it is; anything else, such as a single name, as a sequence of one."""
    return given if isinstance(given, (list, tuple)) else (given,)


def _place(model: Any, tokenizer: Any) -> str:
    """What the commands call a model: its id or folder."""
    if isinstance(model, (str, Path)):
        return str(model)
    from kvbench.api.saved_model import model_folder

    return str(model_folder(model, tokenizer))


def _texts(options: Mapping[str, Any] | None) -> dict[str, str]:
    given = (options or {}).items()
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given}


def _known(more: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """The other fields of a request; sequences as tuples, paths as paths.

    Raises:
        UserError: a name is none of its fields.
    """
    import dataclasses

    from kvbench.errors import unknown

    names = [field.name for field in dataclasses.fields(kind)]
    for name in more:
        if name not in names:
            raise unknown("argument", name, names)
    return {
        name: tuple(map(str, value)) if isinstance(value, (list, tuple)) else Path(value) if name == "data" and value
        else value for name, value in more.items()
    }


def _console(progress: bool) -> Any:
    from rich.console import Console

    return Console(stderr=True, quiet=not progress)
