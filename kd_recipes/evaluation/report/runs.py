"""The runs behind the models, each of them once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_recipes.evaluation.results import Evaluation


@dataclass(frozen=True)
class Run:
    """A distillation.

    Args:
        name: of the model that came of it, or of several: a run leaves its best student and its last one.
        recorded: as :class:`Evaluation` has it.
    """

    name: str
    recorded: Mapping[str, Any]


@dataclass(frozen=True)
class FiredAlert:
    """One alert of a run, in the words of the monitor.

    Args:
        run: its name.
        step: at which it fired.
        signal: name of the value that was beyond its limit.
        message: what was seen.
        remedy: what to change.
    """

    run: str
    step: int
    signal: str
    message: str
    remedy: str


def runs_of(evaluation: Evaluation) -> list[Run]:
    """In the order of the evaluation."""
    found: list[Run] = []
    for name, recorded in evaluation.runs.items():
        same = next((index for index, run in enumerate(found) if run.recorded == recorded), None)
        if same is None:
            found.append(Run(name, recorded))
        else:
            found[same] = Run(f"{found[same].name}, {name}", recorded)
    return found


def alerts_of(evaluation: Evaluation) -> list[FiredAlert]:
    """All alerts of all runs, in their order."""
    return [
        FiredAlert(run.name, alert["step"], alert["signal"], alert["message"], alert["remedy"])
        for run in runs_of(evaluation)
        for alert in run.recorded.get("alerts", ())
    ]
