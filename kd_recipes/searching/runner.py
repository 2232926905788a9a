"""The trials of a search, one after the other, until there are enough of them, no time is left, or a signal comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from optuna.trial import Trial
from tqdm import tqdm

from kd_recipes.errors import RunError
from kd_recipes.history import History
from kd_recipes.processes import Stopped, StopRequest
from kd_recipes.searching.plan import Plan
from kd_recipes.searching.records import Record, best, shown
from kd_recipes.searching.study import Search
from kd_recipes.searching.trials import CONFIG, end_leftover, follow, start, why_failed

_MAX_FAILURES = 3  # one after the other: it is not the values then


@dataclass(frozen=True)
class Budget:
    """What a search may take.

    Args:
        num_trials: in all, those of earlier commands included.
        timeout_minutes: after which this command begins no other trial; None for no limit.
        num_processes: of each trial, on this machine.
    """

    num_trials: int
    timeout_minutes: float | None
    num_processes: int


class Runner:
    """Runs a search.

    Args:
        plan: what is searched.
        search: the trials so far.
        budget: what it may take.
        clear: deletes the weights of a trial; not called with the best one.
    """

    def __init__(self, plan: Plan, search: Search, budget: Budget, clear: Callable[[Path], None]) -> None:
        self._plan, self._search, self._budget, self._clear = plan, search, budget, clear

    def run(self) -> None:
        """Go on until the budget is used up.

        Raises:
            Stopped: a signal came; the trial that it came in has saved itself.
            RunError: several trials in a row have failed.
        """
        for directory in self._search.resume(self._budget.num_trials):
            end_leftover(directory)
        begun, num_failed = time.monotonic(), 0
        records, num_left = self._search.records(), self._search.num_left(self._budget.num_trials)
        total = len(records) + num_left
        progress = tqdm(total=total, initial=len(records), desc="sweep", unit="trial")
        with StopRequest() as stop, progress:
            while num_left := self._search.num_left(self._budget.num_trials):
                minutes = (time.monotonic() - begun) / 60
                if self._budget.timeout_minutes is not None and minutes >= self._budget.timeout_minutes:
                    tqdm.write(f"{minutes:.0f} minutes are over: {total - num_left} of {total} trials")
                    return
                record = self._run_trial(stop, records, progress)
                num_failed = num_failed + 1 if record.status == "failed" else 0
                records = self._search.records()
                self._keep_best(records)
                progress.update()
                if num_failed == _MAX_FAILURES:
                    raise RunError(f"{num_failed} trials failed one after the other, the last one: {record.message}")

    def _run_trial(self, stop: StopRequest, records: Sequence[Record], progress: Any) -> Record:
        trial, values = self._search.ask()
        directory = self._search.directory(trial)
        directory.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._plan.trial_config(values, directory), directory / CONFIG)
        leader = best(records)
        progress.set_postfix(trial=directory.name, best=shown(leader.metric) if leader else "none yet")
        status, is_pruned = self._follow(trial, directory, stop)
        if stop.count and status != 0 and not is_pruned:  # for the study it still runs, and will have been cut off
            raise Stopped(stop.number)
        message = "" if status == 0 or is_pruned else why_failed(directory, status)
        record = self._search.tell(trial, is_pruned=is_pruned, message=message)
        said = f" {self._plan.metric.name} {shown(record.metric)}" if record.metric is not None else ""
        tqdm.write(f"trial {record.name}: {record.status}{said} {record.message}".rstrip())
        if stop.count:
            raise Stopped(stop.number)
        return record

    def _follow(self, trial: Trial, directory: Path, stop: StopRequest) -> tuple[int, bool]:
        process = start(directory, self._budget.num_processes)
        is_hopeless = follow(process, History(directory), lambda entry: self._search.is_hopeless(trial, entry), stop)
        status = process.wait()
        return status, is_hopeless and status != 0  # one that came to its end before it was asked has a result

    def _keep_best(self, records: Sequence[Record]) -> None:
        leader = best(records)
        for record in records:
            if leader is None or record.name != leader.name:
                self._clear(self._search.trials / record.name)
