"""Intervals over documents: their coverage by simulation, a bootstrap, scipy, and sums written out in fractions."""

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_recipes.evaluation.uncertainty import (
    Estimate,
    accuracy_difference,
    flips,
    paired_difference,
    paired_p_value,
    percentiles,
    ratio_with_interval,
    t_quantile,
)

D, NUM_SIMULATIONS = 40, 2_000
_ANSWERS = st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60)


def _simulate(seed):
    """Nats and tokens of documents ``[simulation, D]``, and the ratio they are drawn around.

    A document has its own difficulty, which its tokens share and which falls with its length, as in real text.
    """
    rng = np.random.default_rng(seed)
    lengths = np.arange(20, 201)
    tokens = rng.choice(lengths, (NUM_SIMULATIONS, D))
    mean = 3 - 0.2 * np.log(tokens)
    nats = tokens * (mean + 0.5 * rng.standard_normal(tokens.shape)) + np.sqrt(tokens) * rng.standard_normal(
        tokens.shape
    )
    return nats, tokens, (lengths * (3 - 0.2 * np.log(lengths))).sum() / lengths.sum()


def _tensors(*arrays):
    return [torch.tensor(np.asarray(array), dtype=torch.float64) for array in arrays]


def _covered(estimates, truth):
    return float(np.mean([found.low <= truth <= found.high for found in estimates]))


def test_95_of_100_intervals_hold_the_true_ratio():
    nats, tokens, truth = _simulate(seed=1)
    found = [ratio_with_interval(*_tensors(n, m)) for n, m in zip(nats, tokens, strict=True)]
    assert 0.93 <= _covered(found, truth) <= 0.97
    # The simulation can tell: were tokens independent, with the spread that they have about the mean, it would be
    errors = np.sqrt((0.5**2 + 1) / tokens.sum(1))
    naive = [
        Estimate(e.mean, error, e.mean - 2 * error, e.mean + 2 * error) for e, error in zip(found, errors, strict=True)
    ]
    assert _covered(naive, truth) < 0.7


def test_intervals_of_few_documents_and_of_other_confidence():
    nats, tokens, truth = _simulate(seed=2)
    few = [ratio_with_interval(*_tensors(n[:8], m[:8])) for n, m in zip(nats, tokens, strict=True)]
    assert 0.92 <= _covered(few, truth) <= 0.97  # 0.88 with the normal's quantile
    half = [ratio_with_interval(*_tensors(n, m), confidence=0.5) for n, m in zip(nats, tokens, strict=True)]
    assert 0.47 <= _covered(half, truth) <= 0.53


def test_paired_differences_are_covered_and_narrower():
    nats, tokens, _ = _simulate(seed=3)
    rng = np.random.default_rng(4)
    other = nats + tokens * (0.1 + 0.05 * rng.standard_normal(tokens.shape))  # a worse model on the same text
    found = [paired_difference(*_tensors(*row)) for row in zip(other, nats, tokens, strict=True)]
    assert 0.93 <= _covered(found, 0.1) <= 0.97
    alone = ratio_with_interval(*_tensors(nats[0], tokens[0]))
    assert found[0].standard_error < alone.standard_error / 5


def test_p_values_are_uniform_where_two_models_are_as_good():
    nats, tokens, _ = _simulate(seed=5)
    rng = np.random.default_rng(6)
    other = nats + tokens * 0.05 * rng.standard_normal(tokens.shape)
    p_values = [paired_p_value(*_tensors(*row)) for row in zip(other, nats, tokens, strict=True)]
    for level in (0.05, 0.5, 0.9):
        assert np.mean(np.array(p_values) < level) == pytest.approx(level, abs=0.03)


def test_the_standard_error_is_that_of_a_bootstrap():
    nats, tokens, _ = (array[0] if np.ndim(array) else array for array in _simulate(seed=7))
    rng = np.random.default_rng(8)
    drawn = rng.integers(0, D, (20_000, D))
    ratios = nats[drawn].sum(1) / tokens[drawn].sum(1)
    found = ratio_with_interval(*_tensors(nats, tokens))
    assert found.mean == pytest.approx(nats.sum() / tokens.sum())
    assert found.standard_error == pytest.approx(ratios.std() * math.sqrt(D / (D - 1)), rel=0.05)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_with_documents_of_one_length_it_is_students_interval():
    values = [2.0, 3.5, 3.0, 1.0, 2.5]
    found = ratio_with_interval(torch.tensor(values) * 7, torch.full((5,), 7.0))
    error = statistics.stdev(values) / math.sqrt(5)
    assert (found.mean, found.standard_error) == (pytest.approx(2.4), pytest.approx(error))
    low, high = scipy.stats.t.interval(0.95, 4, 2.4, error)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_documents_without_tokens_do_not_count():
    nats, tokens = torch.tensor([5.0, 9.0, 2.0]), torch.tensor([2, 3, 2])
    padded = ratio_with_interval(torch.cat([nats, torch.zeros(4)]), torch.cat([tokens, torch.zeros(4)]))
    assert padded == ratio_with_interval(nats, tokens)


@pytest.mark.parametrize(("nats", "tokens"), [([6.0], [2.0]), ([6.0, 0.0], [2.0, 0.0])])
def test_one_document_has_no_interval(nats, tokens):
    found = ratio_with_interval(torch.tensor(nats), torch.tensor(tokens))
    assert found.mean == 3.0
    assert all(math.isnan(value) for value in (found.standard_error, found.low, found.high))
    assert math.isnan(paired_p_value(torch.tensor(nats), torch.zeros(len(nats)), torch.tensor(tokens)))


def test_no_document_has_no_mean():
    found = ratio_with_interval(torch.empty(0), torch.empty(0))
    assert all(math.isnan(value) for value in (found.mean, found.standard_error, found.low, found.high))


@pytest.mark.parametrize(
    ("numerators", "denominators", "confidence", "message"),
    [
        ([1.0, 2.0], [3.0], 0.95, "a number a document"),
        ([[1.0]], [[3.0]], 0.95, "a number a document"),
        ([1.0], [-3.0], 0.95, "wanted counts"),
        ([1.0], [3.0], 95, "between 0 and 1"),
    ],
)
def test_wrong_sums_are_refused(numerators, denominators, confidence, message):
    with pytest.raises(ValueError, match=message):
        ratio_with_interval(torch.tensor(numerators), torch.tensor(denominators), confidence)


def test_pairs_of_other_documents_are_refused():
    with pytest.raises(ValueError, match="same documents"):
        paired_difference(torch.ones(3), torch.ones(1), torch.ones(3))


def test_a_p_value_is_scipys_and_agrees_with_the_interval():
    rng = np.random.default_rng(9)
    a, b = rng.normal(0.4, 1, (2, 12))
    ones = np.ones(12)
    assert paired_p_value(*_tensors(a, b, ones)) == pytest.approx(scipy.stats.ttest_rel(a, b).pvalue, rel=1e-9)
    p_value = paired_p_value(*_tensors(a, b, ones))
    touching = paired_difference(*_tensors(a, b, ones), confidence=1 - p_value)
    assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-9)


def test_models_that_agree_or_differ_by_a_constant():
    nats, tokens = torch.tensor([5.0, 9.0, 2.0]), torch.tensor([2.0, 3.0, 2.0])
    assert paired_p_value(nats, nats, tokens) == 1.0
    assert paired_p_value(nats + tokens, nats, tokens) == 0.0
    assert paired_difference(nats + tokens, nats, tokens) == Estimate(1.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 30, 1_000, 100_000])
@pytest.mark.parametrize("probability", [0.025, 0.5, 0.75, 0.975, 0.9995])
def test_t_quantiles_are_scipys(degrees, probability):
    expected = scipy.stats.t.ppf(probability, degrees)
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(1.0, 3), (0.0, 3), (0.9, 0)])
def test_there_is_no_such_quantile(probability, degrees):
    with pytest.raises(ValueError, match="wanted"):
        t_quantile(probability, degrees)


@given(_ANSWERS)
@settings(deadline=None)
def test_flips_are_counts_and_the_p_value_a_sum_of_binomials(answers):
    a, b = [pair[0] for pair in answers], [pair[1] for pair in answers]
    counts, p_value = flips(a, b)
    assert counts == tuple(answers.count(pair) for pair in [(True, True), (True, False), (False, True), (False, False)])
    changed, fewer = counts[1] + counts[2], min(counts[1:3])
    tail = sum(Fraction(math.comb(changed, i), 2**changed) for i in range(fewer + 1))
    assert p_value == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_flips_of_many_items_are_scipys():
    a, b = [True] * 6_000 + [False] * 6_300, [False] * 6_000 + [True] * 6_300  # more digits than a float has exponents
    assert flips(a, b)[1] == pytest.approx(scipy.stats.binomtest(6_000, 12_300).pvalue, rel=1e-8)


def test_flips_take_numpys_and_torchs_truth():
    a, b = np.array([True, False]), torch.tensor([False, False])
    assert flips(a, b) == ((0, 1, 0, 1), 1.0)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        flips([True], [True, False])


def test_the_difference_of_accuracies():
    a, b = [True, True, True, False, True, False], [True, False, False, False, True, True]
    found = accuracy_difference(a, b)
    differences = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    assert found.mean == pytest.approx(1 / 6)
    assert found.standard_error == pytest.approx(statistics.stdev(differences) / math.sqrt(6))
    assert math.isnan(accuracy_difference([True], [False]).standard_error)
    with pytest.raises(ValueError, match="same documents"):
        accuracy_difference([True], [True, False])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50))
@settings(deadline=None)
def test_percentiles_interpolate(values):
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    assert percentiles(torch.tensor(values, dtype=torch.float64)) == pytest.approx([cuts[49], cuts[98]], abs=1e-6)


def test_percentiles_of_none_one_nan_and_infinity():
    assert all(math.isnan(value) for value in percentiles(torch.empty(0)))
    assert percentiles(torch.tensor([2.5])) == [2.5, 2.5]
    assert all(math.isnan(value) for value in percentiles(torch.tensor([1.0, math.nan, 2.0])))
    assert percentiles(torch.tensor([1.0, math.inf, math.inf]), (0.0, 0.5, 1.0)) == [1.0, math.inf, math.inf]
