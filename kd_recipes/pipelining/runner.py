"""The steps of a pipeline, one after the other, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from kd_recipes import processes
from kd_recipes.compression.checkpoint import lineage
from kd_recipes.errors import RunError
from kd_recipes.pipelining.contents import Contents, adding_key, step_key
from kd_recipes.pipelining.plan import CONFIGS, Plan, Step
from kd_recipes.pipelining.progress import RUNNING, overview
from kd_recipes.pipelining.records import Record, Records
from kd_recipes.processes import Stopped, StopRequest
from kd_recipes.storage import atomic_file

_HASHES = ".hashes.json"
_SECONDS_BETWEEN_LOOKS = 0.2


class StepFailed(RunError):
    """A step ended early; what it said is above.

    Args:
        step: the step.
        status: its process's.
    """

    def __init__(self, step: Step, status: int) -> None:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        super().__init__(f"step `{step.name}` ({step.recipe}) {how}; the same command goes on from there")
        self.exit_status = status if status > 0 else 128 - status


class Runner:
    """Runs a pipeline.

    Args:
        plan: the pipeline.
        records: of its steps so far.
        keeps_old: whether a step's earlier result is moved aside, or deleted.
    """

    def __init__(self, plan: Plan, records: Records, *, keeps_old: bool) -> None:
        self._plan, self._records, self._keeps_old = plan, records, keeps_old
        self._contents = Contents(plan.directory / _HASHES)
        self.found: dict[str, str] = {}  # what has become of each step so far: unchanged, or done

    def run(self) -> None:
        """Run what is to be run.

        Raises:
            ConfigError: a step's config does not suit what the steps before it have left.
            StepFailed: a step ended early.
            Stopped: a signal came; the step that it came in has saved itself, if its recipe can.
        """
        with StopRequest() as stop:
            for step in self._plan.steps:
                processes.end_leftover(self._file(step), stop)
                if stop.count:
                    raise Stopped(stop.number)
            for number, step in enumerate(self._plan.steps, start=1):
                self._run_step(step, f"[{number}/{len(self._plan.steps)}] {step.name}", stop)
                if stop.count:
                    raise Stopped(stop.number)

    def _run_step(self, step: Step, head: str, stop: StopRequest) -> None:
        cfg = step.config()
        content: Any = OmegaConf.to_container(cfg, resolve=True)
        key = step_key(step.recipe, content, step.directory, self._contents)
        adds_to = adding_key(step.recipe, content, step.directory, self._contents)
        place = step.place(cfg)
        if self._is_done(step, key, place):
            self.found[step.name] = "unchanged"
            print(f"{head}: nothing has changed since it was made: {place}", flush=True)
            return
        goes_on = self._make_room(step, key, adds_to, head)
        file = self._file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as new:
            OmegaConf.save(cfg, new)
        self._records.begin(step.name, Record(key, step.recipe, adds_to))
        begun = time.monotonic()
        if not (goes_on and _is_whole(step)):
            print(self._overview(step), flush=True)
            print(f"{head}: tune run kd_recipes/{step.recipe} --config {file}", flush=True)
            self._follow(step, file, stop)
        if not place.exists():
            raise RunError(f"step `{step.name}` has come to its end, and left no {place}: is its `result` right?")
        self._records.finish(step.name, os.path.relpath(place, step.directory), self._contents.of(place))
        self.found[step.name] = "done"
        print(f"{head}: done in {time.monotonic() - begun:.0f} s: {place}", flush=True)

    def _overview(self, running: Step) -> str:
        names = [step.name for step in self._plan.steps]
        states = {**self.found, running.name: RUNNING}
        seconds = {name: record.seconds for name in states if (record := self._records.get(name))}
        return overview(names, states, seconds)

    def _file(self, step: Step) -> Path:
        return self._plan.directory / CONFIGS / f"{step.name}.yaml"

    def _is_done(self, step: Step, key: str, place: Path) -> bool:
        record = self._records.get(step.name)
        if record is None or not record.is_done or record.key != key or not place.exists():
            return False
        found = self._contents.of(place)  # what was added since is no matter
        return all(found.get(name) == digest for name, digest in record.result.items())

    def _make_room(self, step: Step, key: str, adds_to: str, head: str) -> bool:
        """Put away what is there of another run; returns whether what is there is this one's, cut off."""
        record, directory = self._records.get(step.name), step.directory
        if record is not None and record.key == key and not record.is_done:
            if directory.is_dir() and all(path.name.startswith(".") for path in directory.iterdir()):
                shutil.rmtree(directory)  # files that were not whole yet, for which some recipes would refuse it
            return True
        if not directory.exists() or (record is not None and adds_to and record.adds_to == adds_to):
            return False
        if not self._keeps_old:
            print(f"{head}: its inputs have changed; {directory} is made anew", flush=True)
            shutil.rmtree(directory)
            return False
        names = (directory.with_name(f"{directory.name}.old-{number}") for number in count(1))
        old = next(path for path in names if not path.exists())
        directory.rename(old)
        why = "its inputs have changed" if record else "it was not made by this pipeline"
        print(f"{head}: {why}; what was in {directory} is in {old}", flush=True)
        return False

    def _follow(self, step: Step, file: Path, stop: StopRequest) -> None:
        if stop.count:
            raise Stopped(stop.number)
        begun = time.monotonic()
        try:
            status = _wait(processes.start(step.recipe, file, step.num_processes), stop)
        finally:
            self._records.add_seconds(step.name, time.monotonic() - begun)
        if status != 0:
            raise Stopped(stop.number) if stop.count else StepFailed(step, status)


def _wait(process: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """Until it ends; each signal is handed on: most recipes save themselves at the first, and end at another."""
    num_asked = 0
    while process.poll() is None:
        if num_asked < stop.count:
            num_asked += 1
            process.terminate()
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return process.wait()


def _has_figures(directory: Path) -> bool:
    return "figures" in (lineage(directory) or [{}])[-1]


# Recipes that refuse a directory with something in it, though it be their own: how one is known that is finished.
_WHOLE: dict[str, Callable[[Path], bool]] = {
    "import_gguf": lambda directory: (directory / "config.json").is_file(),  # it comes into being whole
    "compress": _has_figures,  # which it adds last
}


def _is_whole(step: Step) -> bool:
    """Whether a step that was cut off had come to its end, and only its record is missing."""
    return step.recipe in _WHOLE and _WHOLE[step.recipe](step.directory)
