"""Tasks at a glance: each model's score with its interval, beside the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from kd_recipes.evaluation.report.comparison import task_tone
from kd_recipes.evaluation.report.formats import interval, is_known, one_line
from kd_recipes.evaluation.report.svg import colour, picture, tip
from kd_recipes.evaluation.results import Evaluation, TaskFigures
from kd_recipes.evaluation.uncertainty import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROW = 24  # CSS pixels


@dataclass(frozen=True)
class _Score:
    model: str
    task: TaskFigures
    estimate: Estimate


def task_pictures(evaluation: Evaluation, width: float) -> list[Markup]:
    """One for each task that two models have been given: the task's first metric."""
    names = dict.fromkeys(name for model in evaluation.models for name in model.tasks)
    pictures = []
    for index, name in enumerate(names):
        tasks = {model.name: model.tasks[name] for model in evaluation.models if name in model.tasks}
        metric = next((metric for task in tasks.values() for metric in task.metrics), "")
        scores = [
            _Score(model, task, task.metrics[metric])
            for model, task in tasks.items()
            if metric in task.metrics and is_known(task.metrics[metric].mean)
        ]
        if len(scores) > 1:
            pictures.append(_picture(f"task-{index}", f"{name}, {metric}", scores, evaluation.reference, width))
    return pictures


def _picture(name: str, title: str, scores: Sequence[_Score], reference: str, width: float) -> Markup:
    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot()
        axes.set_title(one_line(title, 48), color=colour("muted"))
        for row, score in enumerate(scores):
            if score.model == reference:
                axes.axvline(score.estimate.mean, color=colour("muted"), linewidth=1, linestyle=(0, (2, 3)), zorder=1)
            _draw_score(axes, row, score, is_reference=score.model == reference)
        axes.set_yticks(range(len(scores)), [one_line(score.model, 20) for score in scores])
        axes.tick_params("y", labelcolor=colour("ink"))
        axes.set_ylim(len(scores) - 0.4, -0.6)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)

    said = "; ".join(f"{one_line(score.model)} {interval(score.estimate)}" for score in scores)
    return picture(name, f"{one_line(title)}: {said}.", (width, 64 + _ROW * len(scores)), draw)


def _draw_score(axes: Axes, row: int, score: _Score, *, is_reference: bool) -> None:
    found = score.estimate
    tone = task_tone(score.task)
    paint = colour("ink" if is_reference else tone if tone in ("better", "worse") else "muted")
    if is_known(found.low) and is_known(found.high):
        axes.hlines(row, found.low, found.high, color=paint, linewidth=2.2)
    axes.plot(
        found.mean,
        row,
        marker="D" if is_reference else "o",
        markersize=7,
        color=paint,
        gid=tip(f"{one_line(score.model)}: {interval(found)}"),
    )
