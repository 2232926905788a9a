"""Which models are set beside which, and whether a difference shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from kd_recipes.evaluation.measure import change
from kd_recipes.evaluation.report.formats import is_known
from kd_recipes.evaluation.results import Evaluation, ModelResult, TaskFigures
from kd_recipes.evaluation.uncertainty import Estimate

Tone = Literal["", "better", "worse", "same"]  # of a figure beside the reference's; nothing where that is not known

SIGNIFICANT = 0.05


def reference_of(evaluation: Evaluation) -> ModelResult:
    """The model that the others are measured against."""
    return next(model for model in evaluation.models if model.name == evaluation.reference)


def leader_of(evaluation: Evaluation) -> ModelResult | None:
    """The model of the fewest bits a byte beside the reference; None where there is no other."""
    return _best(model for model in evaluation.models if model.name != evaluation.reference)


def best_trained(evaluation: Evaluation, *, labels_alone: bool) -> ModelResult | None:
    """The best model whose run is known, among those trained without a teacher or those trained with one."""
    return _best(
        model
        for model in evaluation.models
        if model.name in evaluation.runs
        and model.name != evaluation.reference
        and (evaluation.runs[model.name].get("config", {}).get("kd_ratio") == 0) == labels_alone
    )


def paired(model: ModelResult, other: ModelResult) -> Estimate | None:
    """Bits a byte of a model less another's; None where it is not known that they are of the same sequences."""
    lengths = [found.text.by_sequence.get("num_bytes") for found in (model, other)]
    return change(model.text, other.text) if lengths[0] and lengths[0] == lengths[1] else None


def change_tone(difference: Estimate) -> Tone:
    """Of a change in bits per byte, of which fewer are better: whether its interval is on one side of 0."""
    return "worse" if difference.low > 0 else "better" if difference.high < 0 else "same"


def task_tone(task: TaskFigures) -> Tone:
    """Of the items that only one of two models has right."""
    if task.changed is None or not is_known(task.p_value):
        return ""
    _, lost, won, _ = task.changed
    return "same" if not (task.p_value or 0.0) < SIGNIFICANT else "worse" if lost > won else "better"


def _best(models: Iterable[ModelResult]) -> ModelResult | None:
    known = [model for model in models if is_known(model.text.bits_per_byte.mean)]
    return min(known, key=lambda model: model.text.bits_per_byte.mean, default=None)
