"""Whether a model that says 70% is right in 70% of the cases."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from kd_recipes.evaluation.report.formats import number, one_line
from kd_recipes.evaluation.report.svg import NUM_MODEL_COLOURS, colour, picture, tip
from kd_recipes.evaluation.results import Evaluation, ModelResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5))  # in units of a line's width


def line_style(index: int) -> tuple[str, tuple[float, ...]]:
    """Variable and dashes of a model's line: as many as can be told apart, then again from the first."""
    return f"model-{index % NUM_MODEL_COLOURS}", DASHES[index // NUM_MODEL_COLOURS % len(DASHES)]


def reliability(evaluation: Evaluation, name: str, size: tuple[float, float]) -> Markup | None:
    """Confidence against accuracy of all models; None where none has bins."""
    models = {index: bins for index, model in enumerate(evaluation.models) if (bins := _bins(model))}
    if not models:
        return None

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MultipleLocator, PercentFormatter

        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color=colour("muted"), linewidth=1, linestyle=(0, (2, 3)))
        for index, bins in models.items():
            variable, dashes = line_style(index)
            axes.plot(
                [confidence for _, confidence, _ in bins],
                [right for _, _, right in bins],
                color=colour(variable),
                linestyle=(0, dashes) if dashes else "-",
                linewidth=2,
                marker="o",
                markersize=4.5,
                gid=tip(one_line(evaluation.models[index].name)),
            )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="confidence", ylabel="share that was right")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MultipleLocator(0.25))
            axis.set_major_formatter(PercentFormatter(1, 0))

    errors = (
        f"{one_line(evaluation.models[index].name)} {number(evaluation.models[index].text.calibration_error)}"
        for index in models
    )
    label = f"Confidence against the share of tokens that were right. Calibration error: {'; '.join(errors)}."
    return picture(name, label, size, draw)


def _bins(model: ModelResult) -> list[tuple[int, float, float]]:
    return [(tokens, confidence, right) for tokens, confidence, right in model.text.reliability if tokens > 0]
