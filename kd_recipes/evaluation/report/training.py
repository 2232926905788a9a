"""What teachers and students make of the text: a teacher that predicts it badly has to be corrected first."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kd_recipes.evaluation.report.formats import MISSING, is_known, number, percent
from kd_recipes.evaluation.report.runs import Run, runs_of
from kd_recipes.evaluation.report.tables import Cell, Table, without_empty
from kd_recipes.evaluation.results import Evaluation

_OF_TEACHER = re.compile(r"(?:kd/)?teacher_(.+)/cross_entropy")
_LAST = 0.1  # of the steps, over which the student's is a mean: one step has but a few sequences
_HEADINGS = ("run", "model", "training text", "held-out text", "KL to the student", "weight")


def training_table(evaluation: Evaluation) -> Table | None:
    """A row for the teacher of each run, one for each teacher of a mixture, and one for the student; None without."""
    rows = [row for run in runs_of(evaluation) for row in _rows(run)]
    if not rows:
        return None
    notes = (
        "Cross entropy in nats a token. Training text: of a teacher, the mean over the run's steps; of the student, "
        f"over the last {percent(_LAST, 0)} of them. Held-out text: that of the run, at its last evaluation."
    )
    return without_empty(Table("Cross entropy in training", _HEADINGS, rows, notes, num_labels=2))


def _rows(run: Run) -> list[list[Cell]]:
    train = [values for _, values in run.recorded.get("train") or ()]
    evaluated = run.recorded.get("held_out") or ()
    last: Mapping[str, Any] = evaluated[-1][1] if evaluated else {}
    config = run.recorded.get("config") or {}
    names = dict.fromkeys(
        match[1] for tag in (*last, *(train[0] if train else ())) if (match := _OF_TEACHER.match(tag))
    )
    said = "mixture of teachers" if names else "teacher"
    found = [_row(run, said, _mean(train, "kd/teacher_cross_entropy"), last, "teacher_cross_entropy", "kl")]
    for name in names:
        tag = f"teacher_{name}"
        cells = _row(run, name, _mean(train, f"kd/{tag}/cross_entropy"), last, f"{tag}/cross_entropy", f"{tag}/kl")
        weight = _mean(train, f"kd/{tag}/weight")
        found.append([*cells[:-1], Cell(percent(weight if is_known(weight) else last.get(f"{tag}/weight"), 0))])
    late = train[-max(1, round(_LAST * len(train))) :] if not config.get("label_smoothing") else []
    found.append(_row(run, "student", _mean(late, "loss/cross_entropy"), last, "cross_entropy"))
    return [row for row in found if any(cell.text != MISSING for cell in row[2:])]


def _row(
    run: Run, model: str, in_training: float | None, last: Mapping[str, Any], loss: str, divergence: str = ""
) -> list[Cell]:
    figures = (in_training, last.get(loss), last.get(divergence))
    return [Cell(run.name), Cell(model), *(Cell(number(figure)) for figure in figures), Cell(MISSING)]


def _mean(steps: Sequence[Mapping[str, Any]], tag: str) -> float | None:
    values = [float(step[tag]) for step in steps if is_known(step.get(tag))]
    return sum(values) / len(values) if values else None
