"""What a search found, as one HTML file that needs nothing else: the table, and Optuna's pictures of it."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from kd_recipes.searching.records import Record, rows

_TEMPLATE = "sweep.html.j2"
_WIDE = 5.0  # largest value over smallest from which an axis is logarithmic


def html(records: Sequence[Record], trials: Sequence[FrozenTrial], metric: str, verdict: str) -> str:
    """The page.

    Args:
        records: of the trials that have ended.
        trials: the same as the study has them, in the order of their names.
        metric: its name.
        verdict: the sentence at the top.
    """
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("kd_recipes.searching", "."), autoescape=True, trim_blocks=True)
    head, *body = rows(records, metric)
    failures = [(record.name, record.message) for record in records if record.message]
    content = {"verdict": verdict, "head": head, "body": body, "failures": failures}
    return environment.get_template(_TEMPLATE).render(**content, pictures=pictures(trials, metric))


def pictures(trials: Sequence[FrozenTrial], metric: str) -> dict[str, str]:
    """SVG by title: what each setting did, which of them mattered, how each trial went; none of a single trial."""
    study = optuna.create_study()  # of its own, so that a trial's number is its name
    study.add_trials(trials)
    values = [trial.value for trial in trials if trial.state.is_finished() and trial.value is not None]
    if len([trial for trial in trials if trial.state == optuna.trial.TrialState.COMPLETE]) < 2:
        return {}
    from optuna.visualization import matplotlib as plots

    is_wide = min(values) > 0 and max(values) > _WIDE * min(values)
    named: dict[str, tuple[Callable[[], Any], bool]] = {
        f"{metric} over each setting": (lambda: plots.plot_slice(study, target_name=metric), is_wide),
        "How much each setting mattered": (lambda: plots.plot_param_importances(study, target_name=metric), False),
        f"{metric} over the steps of each trial": (lambda: plots.plot_intermediate_values(study), is_wide),
        f"{metric} over the trials": (lambda: plots.plot_optimization_history(study, target_name=metric), is_wide),
    }
    return {title: _svg(draw, is_logarithmic) for title, (draw, is_logarithmic) in named.items()}


def _svg(draw: Callable[[], Any], is_logarithmic: bool) -> str:
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "kd_recipes", "backend": "agg"}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the pictures are experimental, and of axes with a single value
        from matplotlib import pyplot

        axes = np.ravel(draw())  # one, or one for each setting
        figure = axes[0].figure
        figure.suptitle("")  # the page has titles of its own
        for ax in axes:
            ax.set_title("")
            ax.set_title("", loc="left")
            ax.tick_params("x", rotation=30)
            if is_logarithmic:
                ax.set_yscale("log")
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return re.sub(r"\A.*?(?=<svg)", "", text.getvalue(), flags=re.DOTALL)  # what stands before it is not HTML
