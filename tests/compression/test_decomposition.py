"""Decompositions against what theory says of them, and ranks against every other choice."""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Callable

import pytest
import tensorly
import torch
from torch import Tensor

from kd_recipes.compression.decomposition import (
    Factors,
    TensorFactors,
    rank_by_energy,
    rank_by_ratio,
    ranks_by_budget,
    singular_values,
    tensor_train,
    truncated_svd,
    tucker,
)
from kd_recipes.errors import ConfigError

FACTORS = pytest.mark.parametrize("three_factors", [False, True])
DECOMPOSE = pytest.mark.parametrize("decompose", [tucker, tensor_train])


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_generator(seed), dtype=torch.float64)


def _inputs(dim: int, num_tokens: int = 600, seed: int = 1) -> Tensor:
    """Inputs whose channels are correlated, and differ in scale by a factor of dim."""
    rotation: Tensor = torch.linalg.qr(_normal(dim, dim, seed=seed)).Q
    return _normal(num_tokens, dim, seed=seed + 1) / torch.arange(1, dim + 1) @ rotation.T


def _gram(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI


def _output_error(weight_OI: Tensor, factors: Factors, x_TI: Tensor) -> float:
    return float((x_TI @ (weight_OI - factors.weight).T).norm() / (x_TI @ weight_OI.T).norm())


# truncated SVD


@FACTORS
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_the_plain_error_is_the_least_of_its_rank(shape: tuple[int, int], rank: int, three_factors: bool) -> None:
    """Eckart-Young: what is discarded of the singular values, by a decomposition of W^T W, not of W."""
    weight_OI = _normal(*shape)
    factors = truncated_svd(weight_OI, rank, three_factors=three_factors)
    assert (factors.u_OR.shape, factors.v_RI.shape) == ((shape[0], rank), (rank, shape[1]))
    eigenvalues = torch.linalg.eigvalsh(weight_OI.T @ weight_OI).clamp(min=0).flip(0)
    least = float(eigenvalues[rank:].sum().sqrt())
    assert float((weight_OI - factors.weight).norm()) == pytest.approx(least, abs=1e-6)
    torch.testing.assert_close(singular_values(weight_OI), eigenvalues[: min(shape)].sqrt(), atol=1e-6, rtol=1e-6)


@FACTORS
def test_the_singular_values_lie_where_they_were_asked_for(three_factors: bool) -> None:
    weight_OI, sigma_R = _normal(9, 14), singular_values(_normal(9, 14))[:4]
    factors = truncated_svd(weight_OI, 4, three_factors=three_factors)
    eye = torch.eye(4, dtype=torch.float64)
    grams = (factors.u_OR.T @ factors.u_OR, factors.v_RI @ factors.v_RI.T)
    if three_factors:
        assert factors.s_RR is not None
        torch.testing.assert_close((*grams, factors.s_RR), (eye, eye, sigma_R.diag()))
    else:
        assert factors.s_RR is None
        torch.testing.assert_close(grams, (sigma_R.diag(), sigma_R.diag()))


@FACTORS
@pytest.mark.parametrize("shape", [(9, 14), (14, 9)])
def test_full_rank_gives_the_weight_back(shape: tuple[int, int], three_factors: bool) -> None:
    weight_OI, gram_II = _normal(*shape), _gram(_inputs(shape[1]))
    for gram in (None, gram_II):
        factors = truncated_svd(weight_OI, min(shape), gram, three_factors=three_factors)
        torch.testing.assert_close(factors.weight, weight_OI, atol=1e-8, rtol=1e-8)


@FACTORS
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_whitening_loses_less_of_the_outputs(share: float, three_factors: bool) -> None:
    """And of those of inputs that it has not seen; with an identity for a gram there is nothing to win."""
    dim, weight_OI = 48, _normal(64, 48)
    x_TI, rank = _inputs(dim), int(share * dim)
    seen_TI, unseen_TI = x_TI[:400], x_TI[400:]
    plain = truncated_svd(weight_OI, rank)
    whitened = truncated_svd(weight_OI, rank, _gram(seen_TI), three_factors=three_factors)
    assert _output_error(weight_OI, whitened, seen_TI) < 0.7 * _output_error(weight_OI, plain, seen_TI)
    assert _output_error(weight_OI, whitened, unseen_TI) < 0.8 * _output_error(weight_OI, plain, unseen_TI)
    same = truncated_svd(weight_OI, rank, 3 * torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(same.weight, plain.weight)


@FACTORS
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_what_the_outputs_lose_is_what_was_discarded(rank: int, three_factors: bool) -> None:
    """The theorem of SVD-LLM, up to the ridge; and no step away from the factors improves them."""
    weight_OI, x_TI = _normal(16, 12), _inputs(12)
    values_N = singular_values(weight_OI, _gram(x_TI))
    factors = truncated_svd(weight_OI, rank, _gram(x_TI), three_factors=three_factors)
    lost = float((x_TI @ (weight_OI - factors.weight).T).square().sum())
    assert lost == pytest.approx(float(values_N[rank:].square().sum()), rel=1e-3)
    total = float((x_TI @ weight_OI.T).square().sum())
    assert float(values_N.square().sum()) == pytest.approx(total, rel=1e-3)
    for seed in range(20):
        u_OR, v_RI = (f + 0.01 * f.std() * _normal(*f.shape, seed=seed) for f in (factors.u_OR, factors.v_RI))
        moved = Factors(u_OR, v_RI, factors.s_RR)
        assert float((x_TI @ (weight_OI - moved.weight).T).square().sum()) > lost


@FACTORS
def test_inputs_of_few_dimensions_need_only_their_rank(three_factors: bool) -> None:
    """Their outputs come back, though their gram is singular and has only the ridge to be inverted with."""
    weight_OI, x_TI = _normal(16, 12), _normal(40, 3) @ _normal(3, 12, seed=5)
    factors = truncated_svd(weight_OI, 3, _gram(x_TI), three_factors=three_factors)
    assert _output_error(weight_OI, factors, x_TI) < 1e-4
    assert _output_error(weight_OI, truncated_svd(weight_OI, 3), x_TI) > 0.3


def test_a_gram_that_is_no_gram_any_more_is_mended() -> None:
    """Rounding makes eigenvalues negative; dead channels make them zero; and a gram of zeros says nothing."""
    weight_OI = _normal(16, 12)
    x_TI, plain = _inputs(12), truncated_svd(weight_OI, 6)
    x_TI[:, 3] = 0
    gram_II = _gram(x_TI)
    spoiled_II = gram_II - 0.01 * gram_II.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.linalg.eigvalsh(spoiled_II).min() < 0
    for gram in (gram_II, spoiled_II):
        whitened = truncated_svd(weight_OI, 6, gram)
        assert _output_error(weight_OI, whitened, x_TI) < 0.5 * _output_error(weight_OI, plain, x_TI)
        torch.testing.assert_close(truncated_svd(weight_OI, 12, gram).weight, weight_OI, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(truncated_svd(weight_OI, 6, torch.zeros(12, 12)).weight, plain.weight)


def test_factors_have_the_weights_dtype_but_no_narrower_than_float32() -> None:
    weight_OI = _normal(9, 14)
    gram_II = _gram(_inputs(14))
    exact = truncated_svd(weight_OI, 4, gram_II).weight
    for dtype, expected, tolerance in ((torch.float32, torch.float32, 1e-4), (torch.bfloat16, torch.float32, 0.05)):
        leaf = weight_OI.to(dtype).requires_grad_()
        factors = truncated_svd(leaf, 4, gram_II.float(), three_factors=True)
        assert factors.s_RR is not None
        assert {f.dtype for f in (factors.u_OR, factors.v_RI, factors.s_RR)} == {expected}
        assert not factors.weight.requires_grad
        torch.testing.assert_close(factors.weight.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rank", [0, 10])
def test_a_rank_that_the_matrix_does_not_have_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"\.rank: got {rank}, wanted from 1 to 9.* 9 x 14 matrix"):
        truncated_svd(_normal(9, 14), rank)


def test_a_gram_of_other_inputs_and_numbers_that_are_none_are_refused() -> None:
    weight_OI, broken_OI = _normal(9, 14), _normal(9, 14)
    with pytest.raises(ConfigError, match=r"gram_II: got 'a 9 x 9 matrix'.* inputs of a 9 x 14 matrix"):
        truncated_svd(weight_OI, 4, torch.eye(9))
    broken_OI[2, 3] = math.nan
    with pytest.raises(ConfigError, match="inf or nan"):
        truncated_svd(broken_OI, 4)
    with pytest.raises(ConfigError, match="inf or nan"):
        singular_values(weight_OI, torch.full((14, 14), math.inf))


# ranks


@FACTORS
@pytest.mark.parametrize("ratio", [0.29, 0.3, 0.5, 0.58, 0.7, 0.999])
def test_a_ratio_gives_the_largest_rank_that_it_pays_for(ratio: float, three_factors: bool) -> None:
    for out_dim, in_dim in itertools.product((8, 10, 25, 100), repeat=2):
        budget = round(ratio * out_dim * in_dim, 6)
        costs = (rank * (out_dim + in_dim + rank * three_factors) for rank in range(min(out_dim, in_dim)))
        expected = max(rank for rank, cost in enumerate(costs) if cost <= budget)
        assert rank_by_ratio(out_dim, in_dim, ratio, three_factors) == expected


def test_a_ratio_that_leaves_nothing_says_what_would() -> None:
    with pytest.raises(ConfigError, match=r"\.ratio: got 0.1, wanted from 0.225, rank 1 of a 8 x 10 matrix"):
        rank_by_ratio(8, 10, 0.1)
    assert rank_by_ratio(8, 10, 0.225) == 1
    for ratio in (0, 1, 1.5, -0.5):
        with pytest.raises(ConfigError, match=r"\.ratio.* above 0 and below 1"):
            rank_by_ratio(8, 10, ratio)


def test_an_energy_gives_the_least_rank_that_keeps_it() -> None:
    values_N = singular_values(_normal(9, 14))
    squares = [float(value) ** 2 for value in values_N]
    for energy in (0.01, 0.3, 0.5, 0.9, 0.99):
        expected = next(r for r in range(1, 10) if sum(squares[:r]) >= energy * sum(squares))
        assert rank_by_energy(values_N, energy) == expected
    assert rank_by_energy(values_N, 1) == 9
    assert rank_by_energy(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0]), 1) == 3
    assert rank_by_energy(torch.tensor([2.0, 2.0, 2.0, 2.0]), 0.5) == 2
    assert rank_by_energy(torch.zeros(4), 0.5) == 1
    for energy in (0, 1.01):
        with pytest.raises(ConfigError, match=r"\.energy.* above 0, at most 1"):
            rank_by_energy(values_N, energy)


def _spectra(shapes: list[tuple[int, int]], seed: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
    """Spectra that fall at different speeds, at different scales."""
    values, decays = {}, torch.rand(len(shapes), generator=_generator(seed)) * 2
    for index, (shape, decay) in enumerate(zip(shapes, decays, strict=True)):
        steps = torch.arange(1, min(shape) + 1, dtype=torch.float64)
        noise = torch.rand(min(shape), generator=_generator(seed + index), dtype=torch.float64)
        values[f"m{index}"] = (10.0**index * steps**-decay * (0.5 + noise)).sort(descending=True).values
    return values, dict(zip(values, shapes, strict=True))


def _cost(rank: int | None, shape: tuple[int, int]) -> int:
    return math.prod(shape) if rank is None else rank * sum(shape)


def _lost(rank: int | None, values_N: Tensor) -> float:
    squares_N = values_N.square()
    return 0.0 if rank is None else float(squares_N[rank:].sum() / squares_N.sum())


def _total_lost(ranks: dict[str, int | None], values: dict[str, Tensor]) -> float:
    return sum(_lost(rank, values[name]) for name, rank in ranks.items())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("multiple_of", [1, 2])
def test_a_budget_over_matrices_of_one_shape_is_spent_better_than_any_other_way(seed: int, multiple_of: int) -> None:
    values, shapes = _spectra([(12, 16)] * 3, seed)
    ranks = ranks_by_budget(values, shapes, 0.4, multiple_of)
    budget, choices = 0.4 * 3 * 12 * 16, range(multiple_of, 7, multiple_of)
    least = min(
        _total_lost(dict(zip(values, choice, strict=True)), values)
        for choice in itertools.product(choices, repeat=3)
        if sum(choice) * 28 <= budget
    )
    assert all(rank is not None and rank % multiple_of == 0 for rank in ranks.values())
    assert _total_lost(ranks, values) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_a_budget_is_met_from_below_and_spent_better_than_uniformly(seed: int, ratio: float, multiple_of: int) -> None:
    values, shapes = _spectra([(64, 64), (64, 160), (160, 64), (16, 64), (64, 64)], seed)
    ranks = ranks_by_budget(values, shapes, ratio, multiple_of)
    assert ranks == ranks_by_budget(values, shapes, ratio, multiple_of)
    assert list(ranks) == list(values)
    budget = ratio * sum(math.prod(shape) for shape in shapes.values())
    left = budget - sum(_cost(rank, shapes[name]) for name, rank in ranks.items())
    assert left >= 0
    for name, rank in ranks.items():
        if rank is None:
            continue
        assert rank % multiple_of == 0
        assert rank > 0
        assert rank * sum(shapes[name]) < math.prod(shapes[name])
        # nothing more fits, neither a group nor the dense matrix that it would come to
        more = min((rank + multiple_of) * sum(shapes[name]), math.prod(shapes[name]))
        assert more - rank * sum(shapes[name]) > left
    uniform = {
        name: max(rank_by_ratio(*shape, ratio) // multiple_of * multiple_of, multiple_of)
        for name, shape in shapes.items()
    }
    assert _total_lost(ranks, values) < _total_lost(dict(uniform), values)


def test_components_are_kept_in_the_order_of_their_gain_for_each_parameter() -> None:
    """The wide matrix' second component gains more, but costs more; the scale of a matrix does not matter."""
    values = {"narrow": torch.tensor([80.0, 60.0]).double().sqrt(), "wide": torch.tensor([0.5, 0.45]).double().sqrt()}
    values = {name: torch.cat([v, torch.full((8,), 1e-6).double()]) for name, v in values.items()}
    shapes = {"narrow": (10, 20), "wide": (10, 70)}
    total = 900
    assert ranks_by_budget(values, shapes, 110 / total) == {"narrow": 1, "wide": 1}
    assert ranks_by_budget(values, shapes, 139 / total) == {"narrow": 1, "wide": 1}
    assert ranks_by_budget(values, shapes, 140 / total) == {"narrow": 2, "wide": 1}
    assert ranks_by_budget(values, shapes, 190 / total) == {"narrow": 3, "wide": 1}  # 110 for the first two, 80 left
    assert ranks_by_budget(values, shapes, 220 / total) == {"narrow": 2, "wide": 2}
    halves = {"narrow": values["narrow"], "wide": 1e6 * values["narrow"]}
    assert ranks_by_budget(halves, {"narrow": (10, 20), "wide": (10, 20)}, 90 / 400) == {"narrow": 2, "wide": 1}


def test_a_matrix_stays_dense_where_factors_would_not_be_smaller() -> None:
    values, shapes = _spectra([(8, 8), (64, 64)], seed=0)
    values["m0"] = torch.ones(8, dtype=torch.float64)  # needs all that it has
    values["m1"] = torch.logspace(0, -9, 64, dtype=torch.float64)
    ranks = ranks_by_budget(values, shapes, 0.5)
    assert ranks["m0"] is None
    assert ranks["m1"] == int((0.5 * (64 + 64 * 64) - 64) / 128)
    # four columns of 16 rows: rank 4 of 20 parameters each is already more than the 64 of the matrix
    tiny = ranks_by_budget({**values, "m2": torch.ones(4)}, {**shapes, "m2": (16, 4)}, 0.5, multiple_of=4)
    assert tiny["m2"] is None


def test_budgets_that_pay_for_nothing_are_refused() -> None:
    values, shapes = _spectra([(8, 8), (8, 8)], seed=0)
    with pytest.raises(ConfigError, match=r"\.ratio: got 0.2, wanted from 0.25, rank 1 of each"):
        ranks_by_budget(values, shapes, 0.2)
    assert ranks_by_budget(values, shapes, 0.25) == {"m0": 1, "m1": 1}
    with pytest.raises(ConfigError, match=r"\.ratio: got 0.25, wanted from 0.5, rank 2 of each"):
        ranks_by_budget(values, shapes, 0.25, multiple_of=2)
    with pytest.raises(ConfigError, match=r"\.ratio: got 1, wanted above 0 and below 1"):
        ranks_by_budget(values, shapes, 1)
    with pytest.raises(ConfigError, match=r"\.multiple_of: got 0"):
        ranks_by_budget(values, shapes, 0.5, multiple_of=0)


# stacks


def _tucker_stack() -> Tensor:
    factors = _normal(6, 2), _normal(20, 4, seed=1), _normal(16, 3, seed=2)
    return torch.einsum("abc,la,ob,ic->loi", _normal(2, 4, 3, seed=3), *factors)


def _train_stack() -> Tensor:
    return torch.einsum("la,aob,bi->loi", _normal(6, 2), _normal(2, 20, 4, seed=1), _normal(4, 16, seed=2))


@pytest.mark.parametrize(("decompose", "make"), [(tucker, _tucker_stack), (tensor_train, _train_stack)])
def test_a_stack_of_the_form_comes_back(
    decompose: Callable[[Tensor, float], TensorFactors], make: Callable[[], Tensor]
) -> None:
    stack_LOI = make()
    factors = decompose(stack_LOI, 0.4)
    assert factors.num_parameters <= 0.4 * stack_LOI.numel()
    assert factors.stack.dtype == torch.float32
    torch.testing.assert_close(factors.stack.double(), stack_LOI, atol=1e-4, rtol=1e-4)
    rough = decompose(_normal(6, 20, 16), 0.4)
    assert 0.1 < float((rough.stack - _normal(6, 20, 16)).norm() / _normal(6, 20, 16).norm()) < 1


@pytest.mark.parametrize("sizes", [(6, 20, 16), (2, 48, 32), (3, 4, 40), (40, 3, 4), (1, 12, 12)])
@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.75, 0.95])
def test_stacks_meet_the_budget_with_ranks_that_they_can_have(sizes: tuple[int, int, int], ratio: float) -> None:
    stack_LOI = _normal(*sizes).bfloat16().requires_grad_()
    (num_layers, num_outputs, num_inputs), budget = sizes, ratio * math.prod(sizes)
    by_tucker = tucker(stack_LOI, ratio)
    assert by_tucker.stack.shape == stack_LOI.shape
    assert not by_tucker.stack.requires_grad
    ranks = by_tucker.ranks
    assert by_tucker.num_parameters == math.prod(ranks) + sum(r * s for r, s in zip(ranks, sizes, strict=True))
    assert all(1 <= rank <= min(size, math.prod(ranks) // rank) for rank, size in zip(ranks, sizes, strict=True))
    train = tensor_train(stack_LOI, ratio)
    first, second = train.ranks
    assert train.num_parameters == num_layers * first + first * num_outputs * second + second * num_inputs
    assert 1 <= first <= num_layers
    assert 1 <= second <= min(num_inputs, first * num_outputs)
    for factors in (by_tucker, train):
        assert 0 < factors.num_parameters <= budget


@DECOMPOSE
def test_more_parameters_lose_less(decompose: Callable[[Tensor, float], TensorFactors]) -> None:
    stack_LOI = _tucker_stack() + 0.1 * _normal(6, 20, 16, seed=9)
    errors = [float((decompose(stack_LOI, ratio).stack - stack_LOI).norm()) for ratio in (0.1, 0.3, 0.6, 0.95)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


@DECOMPOSE
def test_tensorly_keeps_the_backend_that_it_had(decompose: Callable[[Tensor, float], TensorFactors]) -> None:
    seen: list[str] = []
    for backend in ("pytorch", "numpy"):
        tensorly.set_backend(backend)
        decompose(_tucker_stack(), 0.4)
        other = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
        other.start()
        other.join()
        seen.append(tensorly.get_backend())
    assert seen == ["pytorch", "pytorch", "numpy", "numpy"]


@DECOMPOSE
def test_what_stands_in_the_way_of_a_stack_is_said(
    decompose: Callable[[Tensor, float], TensorFactors], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"\.ratio: got 0.01, wanted from 0.0\d+, ranks of 1.*\(6, 20, 16\)"):
        decompose(_tucker_stack(), 0.01)
    with pytest.raises(ConfigError, match=r"\.ratio: got 1.2, wanted above 0 and below 1"):
        decompose(_tucker_stack(), 1.2)
    monkeypatch.setitem(sys.modules, "tensorly", None)
    with pytest.raises(ConfigError, match=r"tensorly: got 'not installed'.*pip install 'kd-recipes\[tensor\]'"):
        decompose(_tucker_stack(), 0.4)
