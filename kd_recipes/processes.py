"""A recipe in a process of its own, started as a user would: for the recipes that start others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise, takewhile
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from kd_recipes.entry import RECIPES
from kd_recipes.errors import ConfigError, Problem, RunError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_RECIPE = re.compile(rf"(.*/)?kd_recipes([./]({'|'.join(RECIPES)})(\.py)?)?")
_SECONDS_TO_SAVE = 600.0  # a large student's step, and its checkpoint
_SECONDS_TO_DIE = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1


class Stopped(RunError):
    """A recipe that starts others was asked to end; what it had begun is there, to go on from.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}; the same command goes on from here")
        self.exit_status = 128 + number  # as a shell says it


class StopRequest:
    """While it is entered, a SIGTERM or SIGINT is remembered instead of ending the process."""

    def __init__(self) -> None:
        self.count, self.number = 0, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.count, self.number = self.count + 1, number


def start(recipe: str, config: Path, num_processes: int = 1, *, output: Any = None) -> subprocess.Popen[bytes]:
    """Begin a recipe.

    Args:
        recipe: its name.
        config: its file.
        num_processes: on this machine, that torchrun starts; 1 does without.
        output: an open file for all that it says; where this process's goes by default.
    """
    tune = Path(sys.executable).with_name("tune")
    torchrun = ["--nproc_per_node", str(num_processes)] if num_processes > 1 else []
    command = [str(tune), "run", *torchrun, f"kd_recipes/{recipe}", "--config", str(config.resolve())]
    stderr = None if output is None else subprocess.STDOUT
    # in a session of its own: a terminal's Ctrl-C is for this process alone, which then asks the other to end
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=stderr, start_new_session=True)


def end_leftover(config: Path, stop: StopRequest | None = None, *, seconds: float = _SECONDS_TO_SAVE) -> None:
    """End the processes of a recipe that outlived the one that had started it: two of one directory would mix.

    Args:
        config: the file that it was started with.
        stop: of who waits; at a signal it is waited for no longer, and left to save itself.
        seconds: that it is given to save itself; then it is killed, and goes on from its last checkpoint.
    """
    stop = stop or StopRequest()  # which, not entered, hears nothing
    word = str(config.resolve())
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.pid != os.getpid() and _is_recipe(process.info["cmdline"] or [], word)
    ]
    if not left:
        return
    numbers = ", ".join(str(process.pid) for process in left)
    print(f"{config.stem}: an earlier run of it is not over (process {numbers}): waiting until it is saved", flush=True)
    for process in left:
        with suppress(psutil.Error):  # it has ended by itself, or is another user's
            process.terminate()
    alive = _still_alive(left, seconds, stop)
    if stop.count:
        return
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    _still_alive(left, _SECONDS_TO_DIE, stop)


def _is_recipe(command: Sequence[str], config: str) -> bool:
    """Whether a command line is a recipe's, as the shell, ``tune run`` or torchrun starts it, with this config."""
    program = takewhile(lambda word: word != "--config", command)
    return ("--config", config) in pairwise(command) and any(map(_RECIPE.fullmatch, program))


def _still_alive(processes: Iterable[psutil.Process], seconds: float, stop: StopRequest) -> list[psutil.Process]:
    """Those that have not ended after some seconds, or at a signal."""
    end = time.monotonic() + seconds
    while (left := [process for process in processes if _is_alive(process)]) and time.monotonic() < end:
        if stop.count:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return left


def _is_alive(process: psutil.Process) -> bool:
    try:  # where nothing collects orphans, as in many containers, one that has ended is a zombie for good
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@contextmanager
def alone(directory: Path, recipe: str) -> Iterator[None]:
    """Keep another process out of a directory: it would take what runs for something that was cut off.

    Args:
        directory: is made where there is none.
        recipe: what runs in it, for the message.

    Raises:
        ConfigError: another is in it.
    """
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / ".lock", blocking=False):
            yield
    except Timeout as error:
        wanted = f"a directory that no {recipe} is running in"
        raise ConfigError(Problem("output_dir", str(directory), wanted)) from error
