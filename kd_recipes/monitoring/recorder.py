"""What a run reports: to its metric logger, to ``history.jsonl``, and to whoever watches over its health."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from kd_recipes.batch import Batch
from kd_recipes.evaluation.behaviour import Behaviour, Speaker, beginnings
from kd_recipes.evaluation.held_out import HeldOut
from kd_recipes.history import Entry, History
from kd_recipes.monitoring.board import Board
from kd_recipes.monitoring.health import Action, Health
from kd_recipes.monitoring.metrics import log
from kd_recipes.monitoring.monitor import Alert, HealthMonitor
from kd_recipes.monitoring.symptoms import Vitals
from kd_recipes.training.parallel import Parallel


def prompts_of(held_out: Iterable[Batch], health: Health, parallel: Parallel) -> list[list[int]]:
    """The beginnings of held-out texts that are watched, the same in all processes."""
    found = parallel.each(beginnings(held_out, health.num_prompts, health.prompt_length))
    return list(chain(*found))[: health.num_prompts]


class Recorder:
    """Takes what is measured; the main process writes it, all of them know of alerts.

    Args:
        directory: the run's.
        parallel: the processes.
        logger: torchtune's metric logger, in the main process.
        health: None watches over nothing.
        teacher_temperature: of the divergence; None for the student's.
    """

    def __init__(
        self,
        directory: Path,
        parallel: Parallel,
        logger: Any,
        health: Health | None,
        teacher_temperature: float | None = None,
    ) -> None:
        self._parallel, self._logger, self._health = parallel, logger, health
        self._is_softened = teacher_temperature not in (None, 1)
        self.behaviour: Behaviour | None = None  # what measures generated texts, where there is a teacher to compare
        self._history = History(directory)
        self._monitor = HealthMonitor(health) if health else None
        self._board = Board(logger) if parallel.is_main else None
        self._train_kls: list[float] = []
        self._num_evaluations = 0

    def describe(self, config: Mapping[str, Any], model: TransformerDecoder | None = None) -> None:
        """Report what is known beforehand: the config, plain and without secrets, and the graph of a model."""
        if self._board:
            self._board.describe(config)
            if model is not None:
                self._board.graph(model)

    def histograms(self, step: int, parameters: Mapping[str, Tensor]) -> None:
        """The distributions of the weights."""
        if self._board:
            self._board.histograms(step, parameters)

    def resume(self, step: int) -> None:
        """Go on after a step; what has been recorded of later ones is forgotten."""

        def rewind() -> list[Entry]:
            self._history.rewind(step or -1)  # a run that begins anew evaluates step 0 anew
            health = list(self._history.read("health"))
            last = health[-1].step if health else 0
            return health + [entry for entry in self._history.read("train") if entry.step > last]

        entries = self._parallel.each(rewind() if self._parallel.is_main else [])[0]
        self._num_evaluations = sum(entry.split == "health" for entry in entries)
        for entry in entries:
            if entry.split == "train":
                self._remember(entry.values)
        if self._monitor:
            self._monitor.replay(entries)

    def _remember(self, metrics: Mapping[str, Any]) -> None:
        """The KL of a training step, if it was at temperature 1, as on held-out text."""
        kl = metrics.get("kd/forward_kl")
        if self._is_softened or metrics.get("kd/temperature") != 1 or kl is None or not math.isfinite(kl):
            return
        self._train_kls.append(kl)

    def step(self, step: int, metrics: Mapping[str, float], *, is_logged: bool) -> None:
        """One update.

        Args:
            step: updates made.
            metrics: by tag.
            is_logged: whether the metric logger gets it.
        """
        self._remember(metrics)
        if self._parallel.is_main:
            self._history.append(step, "train", metrics)
            if is_logged:
                log(self._logger, "", metrics, step)

    def evaluation(self, step: int, held_out: HeldOut, student: Speaker, *, counts: bool = True) -> list[Alert]:
        """An evaluation on held-out text; measures and reports what else there is, and returns what is wrong.

        Args:
            step: updates so far.
            held_out: what has been found.
            student: to write texts.
            counts: whether the student is a result, and not on the way to what its constraints ask for.
        """
        values = held_out.metrics()
        if self._parallel.is_main:
            self._history.append(step, "held_out", values if counts else {**values, "counts": False})
            log(self._logger, "held_out/", values, step)
            tqdm.write(f"step {step}: held-out " + ", ".join(f"{k} {v:.4g}" for k, v in values.items() if v == v))
        if self._monitor is None or self._health is None:
            return []
        texts = (dict[str, float](), dict[str, float](), list[dict[str, str]]())
        if self.behaviour and self._num_evaluations % self._health.every_n_evaluations == 0:
            texts = self.behaviour.measure(student)
        self._num_evaluations += 1
        train_kl = sum(self._train_kls) / len(self._train_kls) if self._train_kls else math.nan
        self._train_kls = []
        mine = {
            **values,
            **texts[0],
            "train_kl": train_kl,
            "held_out_kl": held_out.kl,
            "entropy": held_out.student_entropy,
        }
        vitals = self._parallel.each(Vitals.of(mine, texts[1]))[0]  # one for all, whatever was rounded where
        alerts = self._monitor.observe(step, vitals)
        if self._parallel.is_main:
            self._history.append(step, "health", asdict(vitals))
            log(self._logger, "health/", self._monitor.metrics(), step)
            self._report(step, alerts, texts[2])
        return alerts

    def _report(self, step: int, alerts: list[Alert], samples: list[dict[str, str]]) -> None:
        for alert in alerts:
            self._history.append(step, "alert", asdict(alert))
            tqdm.write(f"ALERT {alert}")
        if samples and self._board:
            self._history.append(step, "samples", {"samples": samples})
            self._board.samples(step, samples)

    @property
    def action(self) -> Action:
        """What is to be done at the latest alert, besides adjusting the objective."""
        return self._monitor.action if self._monitor else "warn"

    def adjust(self, settings: Mapping[str, float]) -> dict[str, float]:
        """The objective's ``kd_ratio`` and ``temperature``, after what alerts have done to them."""
        return self._monitor.adjust(settings) if self._monitor else dict(settings)

    def close(self) -> None:
        """Flush what has been written."""
        if self._board:
            self._board.finish()
            self._logger.close()
