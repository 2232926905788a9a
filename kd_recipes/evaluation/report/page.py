"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from kd_recipes.evaluation.report.accuracies import task_pictures
from kd_recipes.evaluation.report.comparison import leader_of, reference_of
from kd_recipes.evaluation.report.curves import curves
from kd_recipes.evaluation.report.formats import number
from kd_recipes.evaluation.report.highlights import highlights
from kd_recipes.evaluation.report.pareto import SPEEDS, UNKNOWN_SPEED, pareto, speed_colour
from kd_recipes.evaluation.report.reliability import line_style, reliability
from kd_recipes.evaluation.report.runs import alerts_of, runs_of
from kd_recipes.evaluation.report.samples import side_by_side
from kd_recipes.evaluation.report.tables import diversity_table, model_tables, task_table
from kd_recipes.evaluation.report.training import training_table
from kd_recipes.evaluation.report.verdict import verdict
from kd_recipes.evaluation.results import Evaluation

_WIDE, _NARROW, _PANEL, _SQUARE = (1040, 420), (320, 330), (400, 245), (400, 400)
_NUM_OPEN = 3  # prompts that are not folded away


@dataclass(frozen=True)
class Key:
    """An entry of a legend: a line in a variable of report.css, as wide and with such dashes as in the picture."""

    variable: str
    label: str
    width: float = 2.0
    dashes: str = "none"


def to_html(evaluation: Evaluation) -> str:
    """The page: UTF-8, the same for the same evaluation."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    leader = leader_of(evaluation)
    return environment.from_string(_read("report.html.jinja")).render(
        css=Markup(stylesheet()),
        evaluation=evaluation,
        subject=_subject(evaluation),
        verdict=verdict(evaluation),
        leader=leader.name if leader else "",
        highlights=highlights(evaluation),
        alerts=alerts_of(evaluation),
        tables=model_tables(evaluation),
        tasks=task_table(evaluation),
        diversity=diversity_table(evaluation),
        training=training_table(evaluation),
        prompts=side_by_side(evaluation),
        num_open=_NUM_OPEN,
        made_by=_made_by(evaluation),
        **_pictures(evaluation),
    )


def stylesheet() -> str:
    """What the page looks like, for other pages that are to look like it."""
    return _read("report.css")


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _subject(evaluation: Evaluation) -> str:
    num_models = len(evaluation.models)
    return (
        f"{num_models} models against {evaluation.reference}"
        if num_models > 1
        else f"One model: {evaluation.reference}"
    )


def _pictures(evaluation: Evaluation) -> dict[str, Any]:
    return {
        "pareto": pareto(evaluation, "pareto-wide", _WIDE),
        "narrow_pareto": pareto(evaluation, "pareto-narrow", _NARROW),
        "speeds": _speeds(evaluation),
        "scores": task_pictures(evaluation, _PANEL[0]),
        "runs": curves(runs_of(evaluation), _PANEL),
        "splits": _splits(evaluation),
        "reliability": reliability(evaluation, "reliability", _SQUARE),
        "colours": {model.name: line_style(index)[0] for index, model in enumerate(evaluation.models)},
        "lines": _lines(evaluation),
    }


def _lines(evaluation: Evaluation) -> list[Key]:
    """Each model's line, with its calibration error."""
    keys = []
    for index, model in enumerate(evaluation.models):
        variable, dashes = line_style(index)
        label = f"{model.name}: {number(model.text.calibration_error)}"
        keys.append(Key(variable, label, dashes=" ".join(str(2 * dash) for dash in dashes) or "none"))
    return keys


def _speeds(evaluation: Evaluation) -> list[Key]:
    """The colours that a model has."""
    reference = reference_of(evaluation)
    had = {speed_colour(model, reference) for model in evaluation.models}
    scale = [(variable, said) for _, variable, said in SPEEDS] + [UNKNOWN_SPEED]
    return [Key(variable, said, width=10) for variable, said in scale if (variable, said) in had]


def _splits(evaluation: Evaluation) -> list[Key]:
    keys = [Key("muted", "training text", 1.3), Key("accent", "held-out text", 2.2)]
    return [*keys, Key("alert", "alert", 1.2, "5 2.5")] if alerts_of(evaluation) else keys


def _made_by(evaluation: Evaluation) -> list[tuple[str, str]]:
    configs = {f"run of {run.name}": run.recorded.get("config") for run in runs_of(evaluation)}
    return [(name, _text(value)) for name, value in {**evaluation.made_by, **configs}.items() if value]


def _text(value: object) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return str(value)
