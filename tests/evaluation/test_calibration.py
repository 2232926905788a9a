"""Confidence against accuracy, against a loop over tokens."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_recipes.evaluation.calibration import Reliability

_TOKENS = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40)


def _reliability(confidences, correct, **kwargs):
    found = Reliability(**kwargs)
    found.add(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct, dtype=torch.float64))
    return found


def _error_by_a_loop(tokens, num_bins):
    """The definition of arXiv 1706.04599, equations 2 to 4, with its half-open bins."""
    error = 0.0
    for b in range(1, num_bins + 1):
        inside = [(p, right) for p, right in tokens if (b - 1) / num_bins < p <= b / num_bins or (b == 1 and p == 0)]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            confidence = sum(p for p, _ in inside) / len(inside)
            error += len(inside) / len(tokens) * abs(accuracy - confidence)
    return error


@given(_TOKENS, st.sampled_from([1, 2, 10, 15]))
@settings(deadline=None)
def test_the_error_is_that_of_the_paper(tokens, num_bins):
    found = _reliability(*zip(*tokens, strict=True), num_bins=num_bins)
    assert found.expected_calibration_error == pytest.approx(_error_by_a_loop(tokens, num_bins), abs=1e-12)


@given(_TOKENS, st.integers(0, 40))
@settings(deadline=None)
def test_parts_add_up_to_the_whole(tokens, cut):
    whole = _reliability(*zip(*tokens, strict=True))
    parts = [Reliability(), Reliability()]
    for index, (confidence, is_right) in enumerate(tokens):  # a batch each
        parts[index >= cut].add(torch.tensor([confidence], dtype=torch.float64), torch.tensor([is_right]))
    torch.testing.assert_close((parts[0] + parts[1]).sums_3B, whole.sums_3B)
    reduced = Reliability(torch.stack([part.sums_3B for part in parts]).sum(0))  # as over processes
    assert reduced.expected_calibration_error == pytest.approx(whole.expected_calibration_error)


def test_known_errors():
    assert _reliability([0.8] * 5, [1, 1, 1, 1, 0]).expected_calibration_error == pytest.approx(0, abs=1e-15)
    assert _reliability([0.9] * 4, [1, 1, 0, 0]).expected_calibration_error == pytest.approx(0.4)
    # A bin that is too sure does not make up for one that is not sure enough: (2 * .5 + 2 * .8) / 4.
    assert _reliability([0.5, 0.5, 0.8, 0.8], [1, 1, 0, 0]).expected_calibration_error == pytest.approx(0.65)


def test_bins_of_a_diagram():
    found = _reliability([0.05, 0.25, 0.15, 0.95], [0, 1, 0, 1], num_bins=5).bins
    assert found == [
        (2, pytest.approx(0.10), 0.0),
        (1, pytest.approx(0.25), 1.0),
        (1, pytest.approx(0.95), 1.0),
    ]
    assert all(isinstance(count, int) for count, _, _ in found)


def test_a_bin_holds_its_upper_edge():
    found = _reliability([0.0, 0.25, 0.25 + 1e-9, 0.5, 1.0], [0] * 5, num_bins=4)
    assert found.sums_3B[0].tolist() == [2, 2, 0, 1]


def test_there_are_15_bins_and_a_softmax_may_round_above_1():
    found = Reliability()
    found.add(torch.tensor([1.0000001]), torch.tensor([1.0]))
    assert found.sums_3B.shape == (3, 15)
    assert found.sums_3B[0, -1] == 1


def test_sums_of_many_tokens_are_exact_in_half_precision():
    found = Reliability()
    for _ in range(40):
        found.add(torch.full((1000,), 0.75, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bfloat16))
    assert found.bins == [(40_000, 0.75, 1.0)]


def test_no_tokens_have_no_error():
    found = Reliability()
    found.add(torch.empty(0), torch.empty(0))
    assert math.isnan(found.expected_calibration_error)
    assert found.bins == []


def test_nan_is_not_hidden():
    assert math.isnan(_reliability([0.5, math.nan], [1, 1]).expected_calibration_error)


def test_adding_leaves_both_as_they_were_and_a_copy_travels():
    one, two = _reliability([0.5], [1]), _reliability([0.9], [0])
    assert pickle.loads(pickle.dumps(one + two)).bins == [(1, 0.5, 1.0), (1, 0.9, 0.0)]
    assert (one.bins, two.bins) == ([(1, 0.5, 1.0)], [(1, 0.9, 0.0)])


@pytest.mark.parametrize(
    ("confidences", "correct", "message"),
    [([3.5], [1], "probabilities"), ([-0.1], [1], "probabilities"), ([0.5, 0.5], [1], "one of each")],
)
def test_what_is_no_confidence_is_refused(confidences, correct, message):
    with pytest.raises(ValueError, match=message):
        _reliability(confidences, correct)


def test_bins_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="15 and 1 bins"):
        Reliability() + Reliability(num_bins=1)
    with pytest.raises(ValueError, match="at least one bin"):
        Reliability(num_bins=0)
    with pytest.raises(ValueError, match="three rows"):
        Reliability(torch.zeros(2, 15))
