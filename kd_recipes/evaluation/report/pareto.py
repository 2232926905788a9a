"""Size against quality, with speed as colour: which models are worth having at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from kd_recipes.evaluation.report.comparison import reference_of
from kd_recipes.evaluation.report.formats import interval, is_known, num_bytes, one_line, ratio, times
from kd_recipes.evaluation.report.names import draw_names
from kd_recipes.evaluation.report.svg import colour, picture, tip
from kd_recipes.evaluation.results import Evaluation, ModelResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Decode speed over the reference's: below the bound, the colour. Steps, as nobody reads 1.37 off a colour.
SPEEDS = (
    (0.67, "speed-0", "less than 0.67×"),
    (0.91, "speed-1", "0.67 to 0.91×"),
    (1.1, "speed-2", "0.91 to 1.1×"),
    (1.5, "speed-3", "1.1 to 1.5×"),
    (math.inf, "speed-4", "1.5× and more"),
)
UNKNOWN_SPEED = ("speed-unknown", "not measured")


def front(models: Sequence[ModelResult]) -> list[ModelResult]:
    """Models that none beats in both size on disk and bits per byte, the smallest first."""
    kept: list[ModelResult] = []
    for model in sorted(models, key=lambda model: (model.cost.num_bytes, model.text.bits_per_byte.mean)):
        if not kept or model.text.bits_per_byte.mean < kept[-1].text.bits_per_byte.mean:
            kept.append(model)
    return kept


def speed_colour(model: ModelResult, reference: ModelResult) -> tuple[str, str]:
    """Variable and words for a model's decode speed beside the reference's."""
    of = ratio(model.cost.decode_tokens_per_second, reference.cost.decode_tokens_per_second)
    return UNKNOWN_SPEED if of is None else next((name, said) for bound, name, said in SPEEDS if of < bound)


def pareto(evaluation: Evaluation, name: str, size: tuple[float, float]) -> Markup | None:
    """The picture; None where there are not two models with both figures."""
    models = [
        model
        for model in evaluation.models
        if is_known(model.text.bits_per_byte.mean) and is_known(model.cost.num_bytes) and model.cost.num_bytes > 0
    ]
    if len(models) < 2:
        return None
    best = front(models)
    reference = reference_of(evaluation)
    by_rank = [*best, *(model for model in models if model not in best)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for model in reversed(by_rank):  # the best on top
            _draw_point(axes, model, reference)
        _scale(axes, [model.cost.num_bytes for model in models])
        _draw_front(axes, best)
        draw_names(axes, {(model.cost.num_bytes, model.text.bits_per_byte.mean): model.name for model in by_rank})

    label = "Size on disk against bits per byte. " + "; ".join(_said(model, reference) for model in models)
    label += f". On the front: {', '.join(one_line(model.name) for model in best)}."
    return picture(name, label, size, draw)


def _said(model: ModelResult, reference: ModelResult) -> str:
    bits = interval(model.text.bits_per_byte)
    said = f"{one_line(model.name)}: {num_bytes(model.cost.num_bytes)}, {bits} bits per byte"
    speed = ratio(model.cost.decode_tokens_per_second, reference.cost.decode_tokens_per_second)
    return said if speed is None else f"{said}, {times(speed)} as fast"


def _draw_point(axes: Axes, model: ModelResult, reference: ModelResult) -> None:
    bits = model.text.bits_per_byte
    paint = colour(speed_colour(model, reference)[0])
    if is_known(bits.low) and is_known(bits.high):
        axes.vlines(model.cost.num_bytes, bits.low, bits.high, color=paint, linewidth=2)
    axes.plot(
        model.cost.num_bytes,
        bits.mean,
        marker="D" if model is reference else "o",
        markersize=9 if model is reference else 11,
        color=paint,
        markeredgecolor=colour("surface"),
        markeredgewidth=1.2,
        gid=tip(_said(model, reference)),
    )


def _scale(axes: Axes, sizes: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    is_narrow = axes.get_window_extent().width < 500
    if max(sizes) > 5 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if is_narrow else (1, 2, 5)))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3 if is_narrow else 7))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: num_bytes(round(value))))
    axes.set_xlabel("size on disk")
    axes.set_ylabel("bits per byte")
    axes.margins(x=0.14, y=0.1)
    axes.annotate(
        "↙ better",
        (0.012, 0.02),
        xycoords="axes fraction",
        color=colour("muted"),
    )


def _draw_front(axes: Axes, best: Sequence[ModelResult]) -> None:
    """With the edges of what it beats: a single model can beat all others."""
    axes.autoscale_view()
    (_, right), (_, top) = axes.get_xlim(), axes.get_ylim()
    axes.autoscale(False)
    axes.plot(
        [best[0].cost.num_bytes, *(model.cost.num_bytes for model in best), right],
        [top, *(model.text.bits_per_byte.mean for model in best), best[-1].text.bits_per_byte.mean],
        drawstyle="steps-post",
        color=colour("muted"),
        linewidth=1.2,
        linestyle=(0, (2, 3)),
        zorder=1,
    )
