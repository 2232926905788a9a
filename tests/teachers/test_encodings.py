"""What is kept of a distribution, against the distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import ConfigError, RunError
from kd_recipes.losses import ForwardKL, LossSum, Objective, ReverseKL
from kd_recipes.signals import DenseSignal, Exact, LinearLogits, SparseSignal
from kd_recipes.teachers import RandomSampling, TopK
from kd_recipes.teachers.cache.content import documents
from kd_recipes.teachers.cache.encodings import Encoding, encoding_of
from kd_recipes.teachers.cache.fill import Scribe
from kd_recipes.teachers.cache.record import Layout

V = 23


def _log_p(num_rows: int = 1, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_rows, V, generator=generator)).log_softmax(-1)


@pytest.mark.parametrize("k", [1, 5, V, 40])
def test_top_k_names_the_likeliest_and_the_mass_of_the_rest(k: int) -> None:
    log_p_nV = _log_p(9)
    found = TopK(k).name(log_p_nV, torch.empty(9, 0))
    for row, log_p_V in enumerate(log_p_nV.tolist()):
        order = sorted(range(V), key=lambda i: -log_p_V[i])
        assert found.ids_nK[row].tolist() == order[:k]
        rest = sum(math.exp(log_p_V[i]) for i in order[k:])
        assert found.log_tail_n is not None
        assert math.exp(found.log_tail_n[row]) == pytest.approx(rest, rel=1e-5)


def test_random_sampling_inverts_the_distribution_function() -> None:
    log_p_nV = _log_p(6)
    uniform_nD = torch.rand(6, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = RandomSampling(40).name(log_p_nV, uniform_nD)
    assert found.counts_nK is not None
    for row in range(6):
        p = log_p_nV[row].double().exp().tolist()
        drawn = [next(i for i in range(V) if sum(p[: i + 1]) > u * sum(p)) for u in uniform_nD[row].tolist()]
        named = found.log_p_nK[row] > -math.inf
        counts = dict(zip(found.ids_nK[row][named].tolist(), found.counts_nK[row][named].tolist(), strict=True))
        assert counts == {i: drawn.count(i) for i in set(drawn)}
        log_p = found.log_p_nK[row][named]
        assert torch.equal(log_p, log_p_nV[row, found.ids_nK[row][named]])
        assert torch.equal(log_p, log_p.sort(descending=True).values)
        assert found.counts_nK[row][~named].sum() == 0


def _drawn(log_p_V: Tensor, num_draws: int, num_rows: int) -> SparseSignal:
    """The same distribution at many positions, drawn from anew at each."""
    uniform = torch.rand(num_rows, num_draws, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = RandomSampling(num_draws).name(log_p_V.expand(num_rows, V), uniform)
    assert found.counts_nK is not None
    nothing = torch.full((num_rows,), -torch.inf)
    return SparseSignal(found.ids_nK, found.log_p_nK, nothing, weights_TK=found.counts_nK / num_draws)


def _loss(z_TV: Tensor, signal: DenseSignal | SparseSignal, *, divergence: object = None) -> tuple[LossSum, Tensor]:
    z_TV = z_TV.clone().requires_grad_()
    labels = torch.zeros(1, len(z_TV), dtype=torch.long)
    objective = Objective(kd_ratio=1.0, divergence=divergence or ForwardKL())  # type: ignore[arg-type]
    loss = objective(DenseSignal(LinearLogits(given_TV=z_TV)), signal, Batch(labels, labels))
    (gradient,) = torch.autograd.grad(loss.total, z_TV)
    return loss, gradient


def test_the_gradient_from_draws_has_no_bias() -> None:
    num_rows, log_p_V = 20_000, _log_p()[0]
    z_TV = _log_p(seed=1).expand(num_rows, V)
    estimate, gradient_TV = _loss(z_TV, _drawn(log_p_V, 3, num_rows))
    exact, expected_TV = _loss(z_TV[:1], DenseSignal(LinearLogits(given_TV=log_p_V[None])))
    error_V = gradient_TV.std(0) / num_rows**0.5
    assert ((gradient_TV.mean(0) - expected_TV[0]).abs() < 4 * error_V + 1e-7).all()
    for name in ("divergence", "forward_kl", "teacher_entropy"):
        assert float(estimate.sums[name]) / num_rows == pytest.approx(float(exact.sums[name]), rel=0.03), name
    assert float(estimate.sums["reverse_kl"]) / num_rows == pytest.approx(float(exact.sums["reverse_kl"]), rel=0.2)


def test_the_gradient_from_draws_is_the_student_less_the_shares() -> None:
    signal = _drawn(_log_p()[0], 7, 4)
    z_TV = _log_p(4, seed=1)
    _, gradient_TV = _loss(z_TV, signal)
    assert signal.weights_TK is not None
    expected_TV = z_TV.softmax(-1).scatter_add(1, signal.ids_TK, -signal.weights_TK)
    torch.testing.assert_close(gradient_TV, expected_TV)


def test_where_more_is_known_it_is_reported() -> None:
    log_p_TV, labels_T = _log_p(4), torch.tensor([3, 1, 4, 1])
    exact = Exact.of(log_p_TV, labels_T)
    objective = Objective(kd_ratio=1.0)
    student = DenseSignal(LinearLogits(given_TV=_log_p(4, seed=1)))
    batch = Batch(labels_T[None], labels_T[None])
    expected = objective(student, DenseSignal(LinearLogits(given_TV=log_p_TV)), batch).sums
    likeliest = TopK(2).name(log_p_TV, torch.empty(4, 0))
    assert likeliest.log_tail_n is not None
    drawn = _drawn(log_p_TV[0], 2, 4)
    for signal in (
        SparseSignal(likeliest.ids_nK, likeliest.log_p_nK, likeliest.log_tail_n, exact=exact),
        SparseSignal(drawn.ids_TK, drawn.log_p_TK, drawn.log_tail_T, weights_TK=drawn.weights_TK, exact=exact),
    ):
        found = objective(student, signal, batch).sums
        for name in ("agreement", "teacher_entropy", "student_entropy", "teacher_label_mass"):
            torch.testing.assert_close(found[name], expected[name], msg=name)


def test_a_divergence_that_draws_do_not_estimate_is_an_error() -> None:
    with pytest.raises(ValueError, match="ReverseKL cannot be estimated"):
        _loss(_log_p(4), _drawn(_log_p()[0], 3, 4), divergence=ReverseKL())


def test_settings_make_the_encoding_again() -> None:
    for encoding in (TopK(3), RandomSampling(4)):
        again = encoding_of(encoding.settings())
        assert (type(again), again.settings()) == (type(encoding), encoding.settings())
    with pytest.raises(ConfigError, match=r"\.k: got 0"):
        TopK(0)


@pytest.mark.parametrize("logit", [torch.nan, torch.inf])
@pytest.mark.parametrize("encoding", [TopK(3), RandomSampling(3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_what_is_no_distribution_is_not_kept(encoding: Encoding, temperature: float, logit: float) -> None:
    z_TV = _log_p(4)
    z_TV[2, 1] = logit
    labels = torch.tensor([[3, 1, 4, 1]])
    batch = Batch(torch.zeros_like(labels), labels)
    wanted = {document.key: document.positions_n for document in documents(batch)}
    scribe = Scribe(encoding, Layout(V, 3, encoding.is_drawn, 1 if temperature == 1 else 2), temperature)
    with pytest.raises(RunError, match="nan or inf at 1 of 4 tokens"):
        list(scribe.records(DenseSignal(LinearLogits(given_TV=z_TV)), batch, wanted))
    labels[0, 2] = IGNORE_INDEX  # of a token without a label nothing is kept
    wanted = {document.key: document.positions_n for document in documents(batch)}
    assert len(list(scribe.records(DenseSignal(LinearLogits(given_TV=z_TV)), batch, wanted))) == 1


@pytest.mark.parametrize("number", [8.7, True, "8", None])
def test_a_number_of_ids_is_a_whole_number(number: Any) -> None:
    for encoding in (TopK, RandomSampling):
        with pytest.raises(ConfigError, match="a whole number"):
            encoding(number)
