"""The objective as configs set it: each divergence, a function of the user's, values that change, smoothed labels."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import Rejected
from torch import Tensor

from kd_recipes.losses import Differentiated
from toy import distill, logged

WriteConfig = Callable[..., Path]
DIVERGENCES: dict[str, dict[str, Any]] = {
    "AdaptiveKL": {"head_mass": 0.6},
    "AlphaBeta": {"alpha": 0.2, "beta": 0.7},
    "ForwardKL": {},
    "JensenShannon": {"beta": 0.1},
    "ReverseKL": {},
    "SkewForwardKL": {"alpha": 0.1},
    "SkewReverseKL": {"alpha": 0.1},
    "SymmetricKL": {"weight": 0.3},
    "TotalVariation": {},
}
KNOWN = (
    "quality/accuracy",
    "kd/agreement",
    "kd/forward_kl",
    "kd/reverse_kl",
    "kd/student_entropy",
    "kd/teacher_entropy",
    "kd/teacher_label_mass",
)


def squared_log_ratio(log_p: Tensor, log_q: Tensor, power: float = 2.0) -> Tensor:
    """A divergence as a user writes it."""
    return (log_p.exp() * (log_p - log_q).abs() ** power).sum(-1)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_by_its_name(name: str, write_config: WriteConfig, tmp_path: Path) -> None:
    section = {"_component_": f"kd_recipes.losses.{name}", **DIVERGENCES[name]}
    recipe = distill(write_config(tmp_path, kd_loss=section, temperature=2.0), "max_steps=2")
    assert type(recipe._objective.divergence).__name__ == name
    steps = logged(tmp_path / "run")
    for step in (1, 2):
        assert steps[step]["loss/divergence"] > 0
        assert all(math.isfinite(steps[step][known]) for known in KNOWN)


def test_a_function_of_two_log_probabilities(write_config: WriteConfig, tmp_path: Path) -> None:
    section = {"_component_": f"{__name__}.squared_log_ratio", "power": 1.5}
    recipe = distill(write_config(tmp_path, kd_loss=section), "max_steps=2")
    assert isinstance(recipe._objective.divergence, Differentiated)
    assert recipe._objective.divergence.function.keywords == {"power": 1.5}
    assert logged(tmp_path / "run")[1]["loss/divergence"] > 0


def test_ratio_and_temperature_change_from_step_to_step(write_config: WriteConfig, tmp_path: Path) -> None:
    schedules = {
        "kd_ratio": {"start": 1.0, "end": 0.5, "num_steps": 3},
        "temperature": {"start": 1.0, "end": 2.0, "shape": "cosine"},
    }
    distill(write_config(tmp_path, **schedules), "max_steps=3", "teacher_temperature=1.5", "label_smoothing=0.1")
    steps = logged(tmp_path / "run")
    assert [steps[step]["kd/kd_ratio"] for step in (1, 2, 3)] == pytest.approx([1.0, 0.75, 0.5])
    assert [steps[step]["kd/temperature"] for step in (1, 2, 3)] == pytest.approx([1.0, 1.5, 2.0])
    for step in (1, 2, 3):
        at = steps[step]
        ratio, temperature = at["kd/kd_ratio"], at["kd/temperature"]
        mixture = ratio * temperature**2 * at["loss/divergence"] + (1 - ratio) * at["loss/cross_entropy"]
        assert at["loss/total"] == pytest.approx(mixture, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        ([], {"kd_ratio": {"start": 0.5, "end": 1.5}}, "wanted a number in [0, 1], or {start, end"),
        ([], {"temperature": {"start": 1.0, "end": 2.0, "form": "linear"}}, "wanted a number above 0, or {start, end"),
        (["teacher_temperature=0"], {}, "teacher_temperature: got 0, wanted a number above 0"),
        (["label_smoothing=1"], {}, "label_smoothing: got 1, wanted a number in [0, 1)"),
        (
            [],
            {"kd_loss": {"_component_": f"{__name__}.squared_log_ratio", "pwer": 1}},
            "Did you mean `power`?",
        ),
        (
            [],
            {"kd_loss": {"_component_": "kd_recipes.losses.SkewForwardKL", "alpha": 2.0}},
            "alpha is 2.0, and has to be in [0, 1)",
        ),
        (
            ["label_smoothing=0.1"],
            {"kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLLoss"}},
            "label_smoothing: got 0.1, wanted none beside torchtune's kd_loss",
        ),
    ],
)
def test_a_setting_that_cannot_be(
    overrides: list[str], settings: dict[str, Any], message: str, rejected: Rejected
) -> None:
    assert message in rejected(*overrides, **settings)
