"""The search itself: Optuna's study in a file beside the trials, so that it goes on where it was cut off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from kd_recipes.history import Entry, History
from kd_recipes.searching.records import Metric, Record, Status
from kd_recipes.searching.space import Dimension
from kd_recipes.searching.strategy import Strategy

FILE = "study.db"
_STATUS: dict[TrialState, Status] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Search:
    """The trials so far, and the next ones.

    A trial has a directory of its own, named by its number. One that was cut off (the search itself was ended) is
    marked failed in the study and enqueued again with the directory it has, where it goes on from its checkpoint.

    Args:
        directory: for everything that the search writes.
        space: what is searched.
        own: what the config itself has there, by key.
        strategy: how.
        metric: what trials are compared by.
    """

    def __init__(
        self, directory: Path, space: Sequence[Dimension], own: Mapping[str, Any], strategy: Strategy, metric: Metric
    ) -> None:
        self.trials = directory / "trials"
        self._space, self._own, self._metric = space, own, metric
        self._is_grid = strategy.sampler == "grid"
        self._seed = strategy.seed
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what it says of each trial would tear the progress bar
        directory.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{(directory / FILE).resolve()}"
        self._study = optuna.create_study(storage=storage, study_name="sweep", load_if_exists=True)
        self._study.sampler = strategy.build_sampler(len(self._study.trials))
        self._study.pruner = strategy.build_pruner()

    def resume(self, num_trials: int) -> list[Path]:
        """Enqueue what is known to come: trials that were cut off, the config's own values, the points of a grid.

        Args:
            num_trials: that there are to be, at most.

        Returns:
            The directories of the trials that were cut off.
        """
        cut_off = self._study.get_trials(states=(TrialState.RUNNING,))
        for trial in cut_off:
            self._study.tell(trial.number, state=TrialState.FAIL)
            params = trial.system_attrs.get("fixed_params", {}) | trial.params
            self._study.enqueue_trial(params, trial.user_attrs)
        if not self._study.trials:
            self._study.enqueue_trial(self._baseline, {"is_baseline": True})
        for params in self._grid()[:num_trials]:
            self._study.enqueue_trial(params, skip_if_exists=True)
        return [self.directory(trial) for trial in cut_off if "name" in trial.user_attrs]

    @property
    def _baseline(self) -> dict[str, Any]:
        """The config's own values, as far as they are among what is searched."""
        own = [dimension.suggestions(self._own[dimension.key]) for dimension in self._space]
        return {key: value for suggested in own for key, value in suggested.items()}

    def _grid(self) -> list[dict[str, Any]]:
        """All combinations, in an order that is the same each time and has no direction."""
        points = [
            dict(zip((dimension.key for dimension in self._space), values, strict=True))
            for values in product(*(dimension.grid or () for dimension in self._space))
            if self._is_grid
        ]
        Random(self._seed).shuffle(points)
        return points

    def num_left(self, num_trials: int) -> int:
        """How many trials are still to come of a number of them; a grid may have fewer points."""
        num_left = max(num_trials - len(self.ended()), 0)
        num_waiting = len(self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))
        return min(num_left, num_waiting) if self._is_grid else num_left

    def directory(self, trial: Trial | FrozenTrial) -> Path:
        """Of a trial."""
        return self.trials / str(trial.user_attrs["name"])

    def ask(self) -> tuple[Trial, dict[str, Any]]:
        """The next trial, and the values by key that its config has in place of its own."""
        trial = self._study.ask()
        if "name" not in trial.user_attrs:
            names = {other.user_attrs.get("name") for other in self._study.get_trials(deepcopy=False)}
            trial.set_user_attr("name", f"{len(names - {None}):03d}")
        is_baseline, own = trial.user_attrs.get("is_baseline"), self._baseline
        for dimension in self._space:
            if dimension.key in own or not is_baseline:  # what the config has and the search has not stays as it is
                dimension.suggest(trial)
        return trial, self._values(trial)

    def values(self, name: str) -> dict[str, Any]:
        """What a trial that has ended has in its config in place of the config's own, by key."""
        return self._values(next(trial for trial in self.ended() if trial.user_attrs["name"] == name))

    def _values(self, trial: Trial | FrozenTrial) -> dict[str, Any]:
        return {d.key: d.value(trial.params[d.key]) for d in self._space if d.key in trial.params}

    def is_hopeless(self, trial: Trial, entry: Entry) -> bool:
        """Hand a held-out evaluation on; whether the trial is to be pruned after it."""
        if entry.step == 0:  # nothing has been learned
            return False
        value = self._metric.of(entry.values)
        trial.report(float("nan") if value is None else value, entry.step)
        return trial.should_prune()

    def tell(self, trial: Trial, *, is_pruned: bool, message: str = "") -> Record:
        """What became of a trial: its end, or that it was pruned, or why it failed."""
        value = self._least(self.directory(trial))[0]
        if not message and value is None:
            message = f"no held-out {self._metric.name} that is finite"
        if is_pruned:
            self._study.tell(trial, state=TrialState.PRUNED)
        elif message:
            trial.set_user_attr("message", message)
            self._study.tell(trial, state=TrialState.FAIL)
        else:
            self._study.tell(trial, value)
        return self._record(self._study.trials[trial.number])

    def records(self) -> list[Record]:
        """Of :meth:`ended`."""
        return [self._record(trial) for trial in self.ended()]

    def ended(self) -> list[FrozenTrial]:
        """The trials that have ended by themselves, as the study has them, in the order of their names."""
        trials = self._study.get_trials(states=tuple(_STATUS))
        ended = [trial for trial in trials if trial.state != TrialState.FAIL or "message" in trial.user_attrs]
        return sorted(ended, key=lambda trial: str(trial.user_attrs["name"]))

    def _least(self, directory: Path) -> tuple[float | None, Entry | None]:
        entries = [e for e in History(directory).read("held_out") if e.step > 0 and e.values.get("counts", True)]
        known = [(value, entry) for entry in entries if (value := self._metric.of(entry.values)) is not None]
        return min(known, key=lambda pair: pair[0], default=(None, None))

    def _record(self, trial: FrozenTrial) -> Record:
        directory = self.directory(trial)
        metric, entry = self._least(directory)
        return Record(
            name=directory.name,
            status=_STATUS[trial.state],
            is_baseline=bool(trial.user_attrs.get("is_baseline")),
            values={d.key: trial.params.get(d.key, self._own[d.key]) for d in self._space},
            metric=metric,
            step=entry.step if entry else None,
            num_steps=max((entry.step for entry in History(directory).read()), default=0),
            seconds=trial.duration.total_seconds() if trial.duration else 0.0,
            held_out=entry.values if entry else {},
            message=trial.user_attrs.get("message", ""),
        )
