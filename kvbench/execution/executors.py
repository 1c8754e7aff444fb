"""Executors: run the workers of a sweep on a Ray cluster, or as Slurm jobs.

Distribution needs no protocol of its own. A worker is the same command on the same run folder, and measures the shards
that no other process has locked; an executor only starts commands and waits for them. All workers must share the
folder, and its file system must support locks, as NFS 4 does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from kvbench.errors import MissingPackageError, UserError

POLL = 1.0
"""Seconds between two checks of the folder."""


@dataclass(frozen=True)
class Ended:
    """How a worker ended.

    Attributes:
        code: exit code; None if the worker was lost.
        words: the end of its error output.
    """

    code: int | None
    words: str


class Executor(Protocol):
    """Starts ``workers`` processes that run a command, and waits for them."""

    def __call__(
        self, command: Sequence[str], workers: int, options: Mapping[str, str], begin: Callable[[], None],
        look: Callable[[float], None],
    ) -> list[Ended]:
        """Run the workers and return how each of them ended.

        Args:
            command: command line; it runs in the current folder, under the same path on every machine.
            options: options of the executor.
            begin: called once, after all checks and before the first worker starts.
            look: called repeatedly while waiting, with the number of seconds that it should take.

        Raises:
            UserError: the executor is not installed or not available, or an option is unknown.
        """


def participate(command: Sequence[str], folder: str) -> Ended:
    """Run a worker until it ends; Ray and Slurm call this on their machines."""
    if not Path(folder).is_dir():
        return Ended(2, f"The folder {folder} is not seen on {os.uname().nodename}. Run from a shared folder.")
    process = subprocess.Popen(
        list(command), cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, words = process.communicate()
    except BaseException:  # cancelled: end the worker; what it has measured is kept
        process.terminate()
        process.wait()
        raise
    return Ended(process.returncode, words.strip()[-2000:])


def on_ray(
    command: Sequence[str], workers: int, options: Mapping[str, str], begin: Callable[[], None],
    look: Callable[[float], None],
) -> list[Ended]:
    """Run workers as Ray tasks. Options: ``address`` of the cluster (default: one on this machine), ``num_cpus`` and
    ``num_gpus`` per worker."""
    try:
        import ray
    except ImportError:
        raise MissingPackageError("Ray is not installed.", "Install it: pip install 'kvbench[ray]'.") from None
    _check_options("ray", options, ("address", "num_cpus", "num_gpus"))
    needs = {name: float(options.get(name, default)) for name, default in (("num_cpus", "1"), ("num_gpus", "0"))}
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=options.get("address"), log_to_driver=False, logging_level="error")
        except Exception as error:
            raise UserError(f"There is no Ray cluster to be had: {error}.", "Check the option address=.") from error
    try:
        work = ray.remote(max_retries=0, **needs)(participate)
        begin()
        running = [work.remote(list(command), os.getcwd()) for _ in range(workers)]
        left = running
        try:
            while left:
                _, left = ray.wait(left, num_returns=len(left), timeout=POLL)
                look(POLL)
        except BaseException:
            for task in running:
                ray.cancel(task)
            ray.wait(running, num_returns=len(running), timeout=10)
            raise
        return [_told(partial(ray.get, task)) for task in running]
    finally:
        if started:
            ray.shutdown()


def on_slurm(
    command: Sequence[str], workers: int, options: Mapping[str, str], begin: Callable[[], None],
    look: Callable[[float], None],
) -> list[Ended]:
    """Run workers as Slurm jobs through submitit. Options are parameters of submitit, such as ``slurm_partition``,
    ``timeout_min`` or ``gpus_per_node``; ``cluster=local`` runs the jobs on this machine."""
    try:
        import submitit
    except ImportError:
        raise MissingPackageError("submitit is not installed.", "Install it: pip install 'kvbench[slurm]'.") from None
    given = dict(options)
    cluster = given.pop("cluster", "slurm")
    logs = Path(".kvbench-slurm").resolve()
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(**{"name": "kvbench", **{key: _number(value) for key, value in given.items()}})
    except Exception as error:
        raise UserError(
            f"Slurm is not to be had on this machine, or an option is wrong: {error}.",
            "Run on a login node, and give parameters of submitit, such as slurm_partition=gpu.",
        ) from error
    begin()
    jobs = [executor.submit(participate, list(command), os.getcwd()) for _ in range(workers)]
    try:
        while not all(job.done() for job in jobs):
            look(POLL)
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    return [_told(job.result) for job in jobs]


EXECUTORS: Mapping[str, Executor] = {"ray": on_ray, "slurm": on_slurm}
"""Executors besides ``local``, for which this process starts the child processes itself."""


def worker_command() -> list[str]:
    """The current command as a worker runs it: with one child process, on its own machine."""
    words, given = [], iter(sys.argv[1:])
    for word in given:
        if word == "--executor-option":
            next(given, None)
        elif word != "--fresh" and not word.startswith("--executor-option="):
            words.append(word)
    return [sys.executable, "-m", "kvbench", *words, "--executor", "local", "--workers", "1", "--json"]


def _told(result: Callable[[], Any]) -> Ended:
    try:
        ended = result()
    except Exception as error:  # the machine, the job or the task was lost; what it measured is on disk
        return Ended(None, str(error).strip()[-2000:])
    return Ended(ended.code, ended.words)


def _check_options(executor: str, given: Mapping[str, str], known: Sequence[str]) -> None:
    from kvbench.errors import unknown

    for name in given:
        if name not in known:
            raise unknown(f"option of {executor}", name, known)


def _number(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text
