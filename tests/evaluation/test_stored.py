"""Whether ids were drawn from a distribution, against all that could have been drawn."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import RunError
from kd_recipes.evaluation.stored import Distances, squared_distances
from kd_recipes.signals import DenseSignal, LinearLogits, SparseSignal
from kd_recipes.teachers import RandomSampling


def _shares(drawn: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and shares of some draws, as a cache has them."""
    ids = sorted(set(drawn))
    rest = [0] * (len(drawn) - len(ids))
    shares = [drawn.count(i) / len(drawn) for i in ids]
    return torch.tensor([ids + rest]), torch.tensor([shares + [0.0] * len(rest)])


@pytest.mark.parametrize("num_draws", [1, 2, 3])
def test_mean_and_variance_are_those_of_all_draws(num_draws: int) -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    for q in (p, torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)):
        mean, square, predicted = 0.0, 0.0, 0.0
        for drawn in itertools.product(range(len(p)), repeat=num_draws):
            probability = math.prod(float(q[i]) for i in drawn)
            found, variance = squared_distances(p[None], *_shares(drawn))
            mean += probability * float(found)
            square += probability * float(found) ** 2
            predicted = float(variance)
        if q is p:
            assert mean == pytest.approx(0, abs=1e-7)
            assert square == pytest.approx(predicted, rel=1e-5)
        elif num_draws > 1:
            assert mean == pytest.approx(float((q - p).square().sum()), rel=1e-5)
        else:
            assert abs(mean) > 0.1


N, V, D = 2000, 50, 12


def _distances(drawn_from_NV: Tensor, logits_NV: Tensor, temperature: float = 1.0, label: int = 0) -> Distances:
    uniform_ND = torch.rand(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = RandomSampling(D).name(drawn_from_NV.log_softmax(-1), uniform_ND)
    assert found.counts_nK is not None
    log_p_NK = (logits_NV / temperature).log_softmax(-1).gather(1, found.ids_nK)  # right, whatever the ids are
    log_p_NK = log_p_NK.masked_fill(found.counts_nK == 0, -torch.inf)
    nothing_N = torch.full((N,), -torch.inf)
    stored = SparseSignal(found.ids_nK, log_p_NK, nothing_N, temperature, weights_TK=found.counts_nK / D)
    tokens = torch.zeros(1, N, dtype=torch.long)
    batch = Batch(tokens, torch.full_like(tokens, label))
    return Distances.of(DenseSignal(LinearLogits(given_TV=logits_NV)), stored, batch, num_ids=V)


def _logits() -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_ids_drawn_from_the_teacher_pass(temperature: float) -> None:
    found = _distances(_logits() / temperature, _logits(), temperature)
    error = math.sqrt(float(found.variances_N.sum())) / N
    assert abs(float(found.squared_N.mean())) < 3 * error < 0.01
    assert float(found.squared_N.std()) / math.sqrt(N) == pytest.approx(error, rel=0.1)
    assert "a squared distance of" in found.describe()


@pytest.mark.parametrize(
    "drawn_from",
    [
        pytest.param(lambda z: z.roll(1, 0), id="of another position"),
        pytest.param(lambda z: z / 2, id="at another temperature"),
        pytest.param(lambda z: 1e4 * z, id="the likeliest"),
        pytest.param(lambda z: 0 * z, id="all alike"),
        pytest.param(lambda z: z.flip(1), id="other ids"),
    ],
)
def test_ids_drawn_from_anything_else_do_not(drawn_from: object) -> None:
    found = _distances(drawn_from(_logits()), _logits())  # type: ignore[operator]
    assert float(found.nats_N.abs().max()) < 1e-4  # the distance of log-probabilities sees none of it
    with pytest.raises(RunError, match="not drawn from what the teacher says"):
        found.describe()


def test_nan_is_no_distance() -> None:
    logits_NV = _logits()
    found = _distances(logits_NV, logits_NV.index_fill(0, torch.tensor([3]), torch.nan))
    with pytest.raises(RunError, match="nan at 1 of 2,000 tokens"):
        found.describe()


def test_batches_without_a_label_are_said_to_have_none() -> None:
    assert "no label" in _distances(_logits(), _logits(), label=IGNORE_INDEX).describe()
