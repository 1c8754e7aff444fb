"""Processes that begin warm: forked from one that has imported what takes seconds, and has done nothing else.

A command and the children that it starts are processes of their own in the tests as they are for users, with their own
files, settings and ends; only their imports are there already. Tests of what is imported start processes as users do.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

PLACE = "KVBENCH_TESTS_WARM"
"""The variable that names the socket of the process that is forked."""

_READ_ONCE = {name: os.environ.get(name) for name in ("HF_HOME", "XDG_CACHE_HOME")}
"""Variables that packages read when they are imported: where a test sets them, children begin cold."""

CHILDREN = ("kvbench.execution.worker", "kvbench.profiling.worker")
IMPORTED = (
    *CHILDREN, "sentence_transformers", "sacrebleu", "rouge_score.rouge_scorer", "matplotlib.figure", "scipy.stats",
    "pandas", "pydantic", "typer", "rich.progress", "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
)


class WarmProcess:
    """A module that is run in a fork, with what ``subprocess.Popen`` would say of it."""

    def __init__(
        self, words: Sequence[str], files: Sequence[int], env: Mapping[str, str], cwd: Path | None = None
    ) -> None:
        self.returncode: int | None = None
        self.call = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door = place()
        self.call.connect(door)
        request = {"words": list(words), "env": {**env, PLACE: door}, "cwd": str(cwd or Path.cwd())}
        socket.send_fds(self.call, [json.dumps(request).encode()], files)
        self.pid = int(self.call.recv(64))

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.call], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a warm process", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self.call.recv(64)))
            self.call.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmChild(WarmProcess):
    """A child of a command, which reads and writes through pipes."""

    def __init__(self, words: Sequence[str], stderr: IO[str], env: Mapping[str, str]) -> None:
        (read, given), (taken, write) = os.pipe(), os.pipe()
        try:
            super().__init__(words, (read, write, stderr.fileno()), env)
        finally:
            os.close(read)
            os.close(write)
        self.stdin, self.stdout = open(given, "w", encoding="utf-8"), open(taken, encoding="utf-8")  # noqa: SIM115


def start_child(command: Sequence[str], *, stderr: IO[str], env: Mapping[str, str], **how: Any) -> Any:
    """In place of ``subprocess.Popen`` where a command starts its children."""
    if any(env.get(name) != value for name, value in _READ_ONCE.items()):
        return subprocess.Popen(command, stderr=stderr, env=env, **how)
    return WarmChild([command[-1]], stderr, env)


def children_begin_warm() -> None:
    """From now on in this process, and in commands that begin warm."""
    from kvbench.execution import process

    process.subprocess = SimpleNamespace(  # type: ignore[assignment]
        Popen=start_child, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired
    )


def call_warm(words: Sequence[str], cwd: Path, env: Mapping[str, str], timeout: float) -> tuple[int, str, str]:
    """Run a module with its arguments in a fork to its end: its code, and what it said."""
    with open(os.devnull) as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        done = WarmProcess(words, [file.fileno() for file in (nothing, out, err)], env, cwd)
        try:
            code = done.wait(timeout)
        finally:
            done.kill()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return code, said[0], said[1]


def place() -> str:
    """The socket of the process that is forked; it begins when it is first needed, and ends with this one."""
    if PLACE not in os.environ:
        door = Path(tempfile.mkdtemp(prefix="kvbench-warm-")) / "s"
        atexit.register(shutil.rmtree, door.parent, ignore_errors=True)
        source = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm", str(door)], cwd=Path(__file__).parents[2], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert source.stdout is not None
        assert source.stdout.readline() == "ready\n"
        _kept.append(source)
        os.environ[PLACE] = str(door)
    return os.environ[PLACE]


_kept: list[Any] = []


def _next_request(place: str) -> tuple[dict[str, Any], list[int]]:
    """Wait for requests, and fork for each; returns in the forks only."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as door:
        door.bind(place)
        door.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("ready", flush=True)
        while True:
            if 0 in select.select([door, 0], [], [])[0]:  # those who ask have ended
                os._exit(0)
            call, _ = door.accept()
            with call:
                if os.fork():
                    continue
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                message, files, _, _ = socket.recv_fds(call, 1 << 20, 3)
                child = os.fork()
                if not child:
                    return json.loads(message), files
                for file in files:
                    os.close(file)
                with suppress(BrokenPipeError):  # who asked has been killed meanwhile
                    call.send(str(child).encode())
                _, status = os.waitpid(child, 0)
                with suppress(BrokenPipeError):
                    call.send(str(status).encode())
                os._exit(0)


def _begin(place: str) -> None:
    """Import, and carry out a request in each fork."""
    gc.disable()
    for module in IMPORTED:
        import_module(module)
    for module in CHILDREN:  # each child runs its own module itself
        del sys.modules[module]
    children_begin_warm()
    installed = os.environ.get("PYTHONPATH", "")
    gc.freeze()
    gc.enable()
    request, files = _next_request(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if "HF_HUB_CACHE" in os.environ:  # read when the hub's package was imported
        import_module("huggingface_hub.constants").HF_HUB_CACHE = os.environ["HF_HUB_CACHE"]  # type: ignore[attr-defined]
    module, *words = request["words"]
    also = os.environ.get("PYTHONPATH", "")
    sys.argv, sys.path[:1] = [module, *words], [request["cwd"], *also.split(os.pathsep)]
    if also != installed:  # other methods may be there: kvbench itself is imported anew
        for name in [name for name in sys.modules if name.partition(".")[0] == "kvbench"]:
            del sys.modules[name]
        children_begin_warm()
    _end(_code_of(module))


def _code_of(module: str) -> int:
    """Run a module as Python does, and return the code that it ends with."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """End as Python does, but for the last look at all objects: it would copy the memory that forks share."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _as_command() -> None:
    """Be the command, in a pipe: one that has begun warm has this process's streams, and its code is this one's."""
    code = WarmProcess(["kvbench", *sys.argv[2:]], (0, 1, 2), os.environ).wait()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    _as_command() if sys.argv[1] == "kvbench" else _begin(sys.argv[1])
