"""Exposure bias: a drift that was planted is found at its size, and none where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from kd_recipes.evaluation.exposure import measure_exposure


def _noisy(mean_L: torch.Tensor, num_texts: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return mean_L * -torch.rand(num_texts, len(mean_L), generator=generator).log()  # exponential, as KLs nearly are


def test_a_drift_that_grows_with_the_position_is_measured_at_its_size() -> None:
    position_L = torch.arange(1, 129.0)
    drift_NL, flat_NL = (position_L / 64)[None].expand(4, -1), torch.ones(3, 128)
    exposure = measure_exposure(drift_NL, flat_NL)
    # the mean of 1 … l, over 64
    assert exposure.regret_L.tolist() == pytest.approx((position_L * (position_L + 1) / 128).tolist())
    assert exposure.expected_L.tolist() == position_L.tolist()
    assert [exposure.at(length) for length in (1, 127, 128)] == pytest.approx([100 * (1 / 64 - 1), 0, 100 / 128])


def test_noise_about_a_drift_of_half_again_and_about_none() -> None:
    level_L, late_L = torch.full((96,), 0.4), (torch.arange(96) >= 48).float()
    teacher_NL = _noisy(level_L, 256, seed=0)
    drifting = measure_exposure(_noisy(level_L * (1 + late_L), 256, seed=1), teacher_NL)
    steady = measure_exposure(_noisy(level_L, 256, seed=2), teacher_NL)
    # the error of a sum of 48 * 256 exponentials is 1 / sqrt(48 * 256) of it; five of them, for two sums
    tolerance = 100 * 5 * math.sqrt(2 / (48 * 256))
    assert drifting.at(48) == pytest.approx(0, abs=tolerance)
    assert drifting.at(96) == pytest.approx(50, abs=1.5 * tolerance)
    assert steady.at(48) == pytest.approx(0, abs=tolerance)
    assert steady.at(96) == pytest.approx(0, abs=tolerance)


def test_a_text_counts_as_far_as_it_goes() -> None:
    nan = math.nan
    student_NL = torch.tensor([[1.0, 2.0, 3.0, nan], [3.0, 4.0, nan, nan], [5.0, nan, nan, nan]])
    teacher_NL = torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0]])
    exposure = measure_exposure(student_NL, teacher_NL)
    assert exposure.regret_L[:3].tolist() == [3.0, 6.0, 9.0]
    assert math.isnan(exposure.at(4))  # no text of the student's is as long
    assert math.isnan(exposure.at(0))
    assert math.isnan(exposure.at(5))
    assert measure_exposure(student_NL, teacher_NL, min_texts=1).at(3) == 200.0
    two = measure_exposure(student_NL, teacher_NL.expand(2, -1), min_texts=2)
    assert two.at(2) == 200.0
    assert math.isnan(two.at(3))


def test_a_student_that_is_the_teacher_has_no_excess_to_speak_of() -> None:
    zero_NL = torch.zeros(2, 8)
    assert measure_exposure(zero_NL, zero_NL).excess_L.isnan().all()
