"""One trial: a distillation in a process of its own, followed by what it writes to its history."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from kd_recipes import processes
from kd_recipes.history import Entry, History
from kd_recipes.processes import StopRequest

CONFIG = "config.yaml"
LOG = "log.txt"
_SECONDS_BETWEEN_LOOKS = 0.3


def start(directory: Path, num_processes: int) -> subprocess.Popen[bytes]:
    """Begin the distillation whose ``config.yaml`` is in a directory, as a user would; its output goes to a log there.

    Args:
        directory: of the trial.
        num_processes: on this machine, that torchrun starts; 1 does without.
    """
    with (directory / LOG).open("wb") as log:  # what an attempt that was cut off had said would be taken for its own
        return processes.start("distill", directory / CONFIG, num_processes, output=log)


def follow(
    process: subprocess.Popen[bytes], history: History, is_hopeless: Callable[[Entry], bool], stop: StopRequest
) -> bool:
    """Wait for a trial to end, and ask it to where it is hopeless or the search is to stop.

    Args:
        process: the trial's.
        history: what it writes.
        is_hopeless: called once with each held-out evaluation; whether the trial is to end there.
        stop: of the search. Each signal is handed on: the trial saves itself at the first, and ends at once at
            another some seconds later.

    Returns:
        Whether it was asked to end because it was hopeless.
    """
    steps: set[int] = set()
    num_asked, is_pruned, size = 0, False, -1
    while True:
        is_over = process.poll() is not None  # looked at before the history: the last lines come before the end
        written = history.path.stat().st_size if history.path.is_file() else 0
        for entry in history.read("held_out") if written != size else ():
            if entry.step not in steps:
                steps.add(entry.step)
                is_pruned = is_pruned or is_hopeless(entry)
        size = written
        if is_over:
            return is_pruned
        if num_asked < stop.count + is_pruned:
            num_asked += 1
            process.terminate()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def why_failed(directory: Path, status: int) -> str:
    """What a trial that ended with a status other than 0 said last."""
    text = (directory / LOG).read_text(encoding="utf-8", errors="replace")
    for head in ("kd_recipes.distill stopped:", "kd_recipes.distill cannot run:"):
        _, found, message = text.rpartition(head)
        if found:
            return " ".join(line.strip().removeprefix("- ") for line in message.splitlines() if line.strip())
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    lines = [line for line in text.replace("\r", "\n").splitlines() if line[:1].strip()]  # of a traceback its end
    return f"exit status {status}: {lines[-1] if lines else 'nothing was said'}"


def end_leftover(directory: Path) -> None:
    """End the processes of a trial that outlived the search that had started it."""
    processes.end_leftover(directory / CONFIG)
