"""A process that has imported effzoo and does nothing else: what is checked runs in forks of it.

To import torch takes longer than most checks. A fork begins with it imported, and knows no more than a new process: the
server is started before anything is read, drawn or computed that a checked file must not know.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, NoReturn

import torch

from effzoo.errors import OptionError

MOST_FILES = 65_536  # that a server may have open
MODULES = ("effzoo.checks.child", "effzoo.course.child")  # whose `main(folder)` a fork calls


class Server:
    """The server, from outside.

    asks: where a line says what to run, as JSON.
    answers: where a line says the number of the process, and another, when it has ended, its exit code; not buffered.
    wait: waits for the end of the server.
    """

    def __init__(self, asks: IO[bytes], answers: IO[bytes], wait: Callable[[], Any]):
        self.asks, self.answers, self.wait = asks, answers, wait

    def run(self, module: str, folder: str, environment: Mapping[str, str], seconds: float) -> int | None:
        """The exit code of `main(folder)` of a module, in a process of its own; None where it was stopped."""
        line = {"module": module, "folder": folder, "environment": dict(environment)}
        with suppress(BrokenPipeError):  # then there is no answer
            self.asks.write(json.dumps(line).encode() + b"\n")
        number, ended = self._answer(), False
        try:
            ended = bool(select.select([self.answers], [], [], seconds)[0])
        finally:
            end_group(number, not ended)
            code = self._answer()
        return code if ended else None

    def close(self) -> None:
        """Let the server end."""
        self.asks.close()
        self.answers.close()
        self.wait()

    def _answer(self) -> int:
        line = self.answers.readline()
        if not line:
            raise OptionError("the process in whose forks files are checked has ended, which a file can do; try again")
        return int(line)


_ready: list[Server] = []


def server() -> Server | None:
    """The one that was made ready; None where each file begins a process anew."""
    return _ready[-1] if _ready else None


@contextmanager
def ready(fork: bool = False) -> Iterator[None]:
    """Run what is checked inside in forks of a server, where the system has forks that are safe: on Linux.

    One that is ready already is taken.

    fork: whether the server is a fork of this process, which then has run nothing with torch yet; else it is new.
    """
    if _ready or sys.platform != "linux":
        yield
        return
    started = _forked() if fork else _new()
    _ready.append(started)
    try:
        yield
    finally:
        _ready.remove(started)
        started.close()


def _new() -> Server:
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    begun = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve(0, 1)"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=environment,
    )  # fmt: skip
    assert begun.stdin is not None and begun.stdout is not None
    return Server(begun.stdin, begun.stdout, begun.wait)


def _forked() -> Server:
    (asked, asks), (answers, answered) = os.pipe(), os.pipe()
    for module in MODULES:
        importlib.import_module(module)
    number = os.fork()
    if number == 0:
        os.close(asks)
        os.close(answers)
        try:
            with suppress(BrokenPipeError):  # nobody asks any more
                serve(asked, answered)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(asked)
    os.close(answered)
    return Server(os.fdopen(asks, "wb", 0), os.fdopen(answers, "rb", 0), lambda: os.waitpid(number, 0))


def serve(asked: int, answered: int) -> None:
    """Fork for each line of one file descriptor, and answer on the other, until the first is closed."""
    for module in MODULES:
        importlib.import_module(module)
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(asked, "rb") as lines, os.fdopen(answered, "wb", 0) as answers:
        for line in lines:
            told = json.loads(line)
            number = os.fork()
            if number == 0:
                _become(**told)
            answers.write(b"%d\n" % number)
            answers.write(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))


def _become(module: str, folder: str, environment: dict[str, str]) -> NoReturn:
    """Be a process that was started with this environment in this folder, and has no file open but its own."""
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        tempfile.tempdir = None
        random.seed()
        torch.seed()
        sys.argv = [module, folder]
        for signal_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal_, signal.SIG_DFL)
        nothing, said = os.open(os.devnull, os.O_RDONLY), os.open("said.txt", os.O_WRONLY | os.O_CREAT)
        for old, new in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(old, new)
        os.closerange(3, MOST_FILES)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.modules[module].main(Path(folder))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # the parent reads what it says
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def end_group(number: int, running: bool) -> None:
    """End a process, where it is running, with all that it has started."""
    try:
        os.killpg(number, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        if running:  # and has not begun a group of its own yet
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
