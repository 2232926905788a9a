"""How a student learned: what it was on the text that it saw, and on text that it did not, along one axis."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kd_recipes.evaluation.report.formats import is_known, number, one_line
from kd_recipes.evaluation.report.runs import Run
from kd_recipes.evaluation.report.svg import colour, picture, tip

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = list[tuple[float, float]]

_GROUP = re.compile(r"^(loss|kd|quality)/")  # in a step's records; teacher_large/kl is another quantity than kl
_MAX_POINTS = 300  # of a line; more cannot be seen, and would make the page heavy


@dataclass(frozen=True)
class Quantity:
    """What is drawn.

    Args:
        title: with its unit.
        names: in the records, whatever group stands before them (``loss/cross_entropy``).
        neutral: settings, and the value at which training measures the same as the evaluation.
    """

    title: str
    names: tuple[str, ...]
    neutral: Mapping[str, float]


@dataclass(frozen=True)
class RunCurves:
    """The pictures of one run, by its name: one for each quantity that it recorded."""

    name: str
    pictures: Sequence[Markup]


_QUANTITIES = (
    Quantity("loss on the text, nats a token", ("cross_entropy",), {"label_smoothing": 0.0}),
    Quantity("KL to the teacher, nats a token", ("kl", "forward_kl"), {"temperature": 1.0, "teacher_temperature": 1.0}),
)


def curves(runs: Sequence[Run], size: tuple[float, float]) -> list[RunCurves]:
    """Pictures of every run that recorded something; a quantity has the same vertical axis in all of them."""
    lines = {(run.name, quantity.title): _lines(run, quantity) for run in runs for quantity in _QUANTITIES}
    limits = {quantity.title: _limits(lines[run.name, quantity.title] for run in runs) for quantity in _QUANTITIES}
    found = []
    for place, run in enumerate(runs):
        pictures = [
            _picture(f"curve-{place}-{index}", run, quantity.title, lines[run.name, quantity.title], limits, size)
            for index, quantity in enumerate(_QUANTITIES)
            if any(lines[run.name, quantity.title])
        ]
        if pictures:
            found.append(RunCurves(run.name, pictures))
    return found


def _lines(run: Run, quantity: Quantity) -> tuple[Series, Series]:
    """Of training and of evaluations; training is left out where it measured something else."""
    config = run.recorded.get("config") or {}
    is_comparable = all(config.get(name) in (None, value) for name, value in quantity.neutral.items())
    train = _series(run.recorded.get("train") or (), quantity.names) if is_comparable else []
    return train, _series(run.recorded.get("held_out") or (), quantity.names)


def _series(records: Iterable[tuple[int, Mapping[str, float | None]]], names: Sequence[str]) -> Series:
    points = []
    for step, values in records:
        by_name = {_GROUP.sub("", tag): value for tag, value in values.items()}
        value = next((by_name[name] for name in names if name in by_name), None)
        if value is not None and is_known(value):
            points.append((float(step), float(value)))
    return points


def _limits(pairs: Iterable[tuple[Series, Series]]) -> tuple[float, float]:
    values = [value for pair in pairs for line in pair for _, value in line] or [0.0]
    margin = 0.08 * (max(values) - min(values)) or 0.1
    return min(values) - margin, max(values) + margin


def _thinned(points: Series) -> Series:
    """Means of neighbours, so that at most ``_MAX_POINTS`` are left."""
    width = -(-len(points) // _MAX_POINTS)
    if width < 2:
        return points
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _picture(
    name: str,
    run: Run,
    title: str,
    lines: tuple[Series, Series],
    limits: Mapping[str, tuple[float, float]],
    size: tuple[float, float],
) -> Markup:
    train, held_out = lines
    alerts: Sequence[Mapping[str, Any]] = run.recorded.get("alerts") or ()

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set(ylim=limits[title], xlabel="step")
        axes.set_title(title, color=colour("muted"))
        if train:
            axes.plot(*zip(*_thinned(train), strict=True), color=colour("muted"), linewidth=1.3)
        if held_out:
            axes.plot(*zip(*_thinned(held_out), strict=True), color=colour("accent"), linewidth=2.2)
            _draw_end(axes, held_out)
        for alert in alerts:
            _draw_alert(axes, alert["step"], alert["signal"])

    said = [
        f"{what} from {number(line[0][1])} to {number(line[-1][1])}"
        for what, line in (("training", train), ("held-out", held_out))
        if line
    ]
    fired = f"; alerts at steps {', '.join(str(alert['step']) for alert in alerts)}" if alerts else ""
    return picture(name, f"{one_line(run.name)}, {title}: {', '.join(said)}{fired}.", size, draw)


def _draw_end(axes: Axes, held_out: Series) -> None:
    step, value = held_out[-1]
    axes.plot(step, value, marker="o", markersize=6, color=colour("accent"), clip_on=False, gid=tip(number(value)))
    axes.annotate(
        number(value, 2),
        (step, value),
        (0, 8),
        textcoords="offset points",
        horizontalalignment="right",
        color=colour("accent"),
        fontweight="bold",
    )


def _draw_alert(axes: Axes, step: int, signal: str) -> None:
    axes.axvline(step, color=colour("alert"), linewidth=1.2, linestyle=(0, (4, 2)), zorder=1)
    axes.plot(
        step,
        0.97,
        marker="v",
        markersize=8,
        color=colour("alert"),
        transform=axes.get_xaxis_transform(),
        gid=tip(f"step {step}: {one_line(signal)}"),
    )
