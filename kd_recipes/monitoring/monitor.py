"""Over-distillation noticed: a symptom that stays is an alert, with what was seen and what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from kd_recipes.history import Entry
from kd_recipes.monitoring.health import Action, Health
from kd_recipes.monitoring.symptoms import SYMPTOMS, Reading, Symptom, Vitals


@dataclass(frozen=True)
class Alert:
    """A symptom that has stayed.

    Args:
        signal: name of its value, as it is logged.
        step: updates made when it became an alert.
        value: of the student.
        limit: that it is beyond.
        reference: the teacher's value, or the best of the student's.
        since_step: of the first evaluation in the row that was beyond the limit.
        message: what was seen.
        remedy: what to change in the config.
    """

    signal: str
    step: int
    value: float
    limit: float
    reference: float
    since_step: int
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"step {self.step}, {self.signal}: {self.message}, since step {self.since_step}. To do: {self.remedy}"


class HealthMonitor:
    """Watches a student over its evaluations.

    A symptom is an alert once it has been beyond its limit at ``persistence`` evaluations in a row, and again only
    after it has recovered; an evaluation at which it was not measured does not count. A student may begin beyond a
    limit, as a pruned one does: until it has been within it, an evaluation only counts that is no nearer to the
    limit than one before.

    Args:
        health: the settings.
    """

    def __init__(self, health: Health) -> None:
        self._health = health
        self._past: list[tuple[int, Vitals]] = []
        self._watches = [_Watch(symptom, health.persistence) for symptom in SYMPTOMS]
        self._num_interventions = 0

    def observe(self, step: int, vitals: Vitals) -> list[Alert]:
        """The alerts that an evaluation gives rise to."""
        vitals = Vitals.of(asdict(vitals))  # as a history has them, so that a replay finds the same
        self._past.append((step, vitals))
        alerts = []
        for watch in self._watches:
            reading = watch.symptom.at(self._health, self._past)
            if watch.observe(step, reading):
                message = watch.symptom.describe(reading, vitals)
                numbers = reading.value, reading.limit, reading.reference
                alerts.append(Alert(watch.symptom.name, step, *numbers, watch.since, message, watch.symptom.remedy))
        self._num_interventions += bool(alerts)
        return alerts

    def replay(self, entries: Iterable[Entry]) -> list[Alert]:
        """Observe what a run's history has recorded, as ``asdict`` of its vitals; lines of other kinds are left out."""
        entries = [entry for entry in entries if entry.split == "health"]
        return [alert for entry in entries for alert in self.observe(entry.step, Vitals.of(entry.values))]

    def metrics(self) -> dict[str, float]:
        """The latest evaluation by the names of the alerts, with the teacher's values beside the student's."""
        if not self._past:
            return {}
        now = asdict(self._past[-1][1])
        beside = {name: now[name] for s in SYMPTOMS if (name := f"teacher_{s.name}") in now}
        return {**beside, **{s.name: s.at(self._health, self._past).value for s in SYMPTOMS}}

    @property
    def action(self) -> Action:
        """What is to be done at the latest alert."""
        is_exhausted = self._num_interventions > self._health.max_restores
        return "stop" if self._health.action == "restore_best" and is_exhausted else self._health.action

    def adjust(self, settings: Mapping[str, float]) -> dict[str, float]:
        """The objective's ``kd_ratio`` and ``temperature`` after what ``action`` has done to them so far."""
        adjusted = dict(settings)
        if self._health.action == "anneal_kd_ratio":
            adjusted["kd_ratio"] *= self._health.kd_ratio_factor**self._num_interventions
        if self._health.action == "raise_temperature":
            adjusted["temperature"] *= self._health.temperature_factor**self._num_interventions
        return adjusted


class _Watch:
    """How long a symptom has been there."""

    def __init__(self, symptom: Symptom, persistence: int) -> None:
        self.symptom = symptom
        self.since = 0
        self._persistence = persistence
        self._num_in_a_row = 0
        self._is_on_its_way = True  # from where it began towards the limit
        self._nearest = math.inf  # excess over the limit that it has come to on the way

    def observe(self, step: int, reading: Reading) -> bool:
        """Whether it becomes an alert at this evaluation."""
        excess = self.symptom.excess(reading.value, reading.limit)
        if excess != excess:
            return False
        is_there = excess > 0 and not (self._is_on_its_way and excess < self._nearest)
        self._is_on_its_way &= excess > 0
        self._nearest = min(self._nearest, excess)
        if not is_there:
            self._num_in_a_row = 0
            return False
        if self._num_in_a_row == 0:
            self.since = step
        self._num_in_a_row += 1
        is_alert = self._num_in_a_row == self._persistence
        self._is_on_its_way &= not is_alert
        return is_alert
