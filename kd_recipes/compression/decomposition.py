"""Matrices, and stacks of them, as products of smaller factors; and which ranks a budget of parameters pays for."""

# L matrices of a stack, O outputs, I inputs, R rank, N = min(O, I) singular values

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem

_Ranks = tuple[int, ...]
# Of the mean squared input, added to each: channels that were never active must not make the gram singular. Small,
# because a few channels of a language model are a thousand times as active as the others and carry the mean.
_RIDGE = 1e-6
_ROUNDING = 1e-9  # of products with a ratio such as 0.29, which is a little less than 0.29


@dataclass(frozen=True)
class Factors:
    """A matrix as a product.

    Args:
        u_OR: its left factor.
        v_RI: its right factor.
        s_RR: the singular values on a diagonal between the two; None where they are split over both.
    """

    u_OR: Tensor
    v_RI: Tensor
    s_RR: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The product, ``[O, I]``."""
        return self.u_OR @ self.v_RI if self.s_RR is None else self.u_OR @ (self.s_RR @ self.v_RI)


@torch.no_grad()
def truncated_svd(
    weight_OI: Tensor, rank: int, gram_II: Tensor | None = None, *, three_factors: bool = False
) -> Factors:
    """The factors of a rank that change a layer's outputs least.

    Without a gram they minimise ``||W - u v||``. With one they minimise ``||(W - u v) S||``, where ``S S^T`` is the
    gram, and that is the root of the summed squared differences of the outputs: ``W S = U Sigma V^T``, truncated, and
    ``v = V^T S^-1``. What is lost is exactly the discarded part of ``Sigma``
    (SVD-LLM, https://arxiv.org/abs/2403.07378).

    Args:
        weight_OI: of the layer.
        rank: to keep.
        gram_II: ``sum x x^T`` over the inputs of calibration text.
        three_factors: keep the singular values apart, ``u`` orthonormal and ``v`` too (before ``S^-1``); otherwise
            their roots go into both factors, so that one learning rate suits both.

    Returns:
        Factors in the weight's dtype, in float32 if that is narrower.

    Raises:
        ConfigError: a rank below 1 or above ``min(O, I)``, a gram of another size, numbers that are not finite.
    """
    most = min(weight_OI.shape)
    if not 1 <= rank <= most:
        raise ConfigError(Problem(".rank", rank, f"from 1 to {most}, the most that {_shape(weight_OI)} has"))
    whitened_OI, whitening_II = _whitened(weight_OI, gram_II)
    u_ON, sigma_N, v_NI = torch.linalg.svd(whitened_OI, full_matrices=False)
    u_OR, sigma_R, v_RI = u_ON[:, :rank], sigma_N[:rank], v_NI[:rank]
    if whitening_II is not None:
        v_RI = torch.linalg.solve_triangular(whitening_II, v_RI, upper=False, left=False)

    def finished(factor: Tensor) -> Tensor:
        return factor.to(weight_OI.device, torch.promote_types(weight_OI.dtype, torch.float32)).contiguous()

    if three_factors:
        return Factors(finished(u_OR), finished(v_RI), finished(sigma_R.diag()))
    return Factors(finished(u_OR * sigma_R.sqrt()), finished(sigma_R.sqrt()[:, None] * v_RI))


@torch.no_grad()
def singular_values(weight_OI: Tensor, gram_II: Tensor | None = None) -> Tensor:
    """Those that :func:`truncated_svd` truncates, ``[N]`` float64 on the CPU, in descending order.

    Raises:
        ConfigError: a gram of another size, numbers that are not finite.
    """
    values_N: Tensor = torch.linalg.svdvals(_whitened(weight_OI, gram_II)[0])
    return values_N.cpu()


def num_factor_parameters(rank: int, out_dim: int, in_dim: int, three_factors: bool = False) -> int:
    """Of U V, or of U S V with a square S."""
    return rank * (out_dim + in_dim) + rank * rank * three_factors


def rank_by_ratio(out_dim: int, in_dim: int, ratio: float, three_factors: bool = False) -> int:
    """The largest rank whose factors have at most this share of the matrix' parameters.

    Raises:
        ConfigError: a ratio that is not between 0 and 1, or that does not pay for rank 1.
    """
    _check_ratio(ratio)
    total, sides = out_dim * in_dim, out_dim + in_dim
    # three: the root of R^2 + R (O + I) = ratio O I
    divisor = (sides + math.sqrt(sides**2 + 4 * ratio * total)) / 2 if three_factors else sides
    rank = int(ratio * total / divisor + _ROUNDING)
    if rank < 1:
        least = _at_least(num_factor_parameters(1, out_dim, in_dim, three_factors) / total)
        raise ConfigError(Problem(".ratio", ratio, f"from {least}, rank 1 of a {out_dim} x {in_dim} matrix"))
    return rank


def rank_by_energy(singular_values_N: Tensor, energy: float) -> int:
    """The least rank that keeps this share of the sum of the squared singular values, at least 1.

    Raises:
        ConfigError: an energy that is not above 0 and at most 1.
    """
    if not 0 < energy <= 1:
        raise ConfigError(Problem(".energy", energy, "above 0, at most 1"))
    kept_N = singular_values_N.double().square().cumsum(0)
    return int((kept_N < energy * kept_N[-1]).sum()) + 1


def ranks_by_budget(
    values: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    ratio: float,
    multiple_of: int = 1,
    three_factors: bool = False,
) -> dict[str, int | None]:
    """Ranks that spread a common budget over matrices: what is gained most by a parameter comes first.

    The gain of a component is its squared singular value, divided by the sum of its matrix': that much of the relative
    squared error of the outputs goes away. It costs ``O + I`` parameters, and more with three factors. Each matrix
    keeps at least one group of ``multiple_of`` components; then groups follow in the order of their gain for each
    parameter until no next one fits.

    Args:
        values: singular values of each matrix, descending, whitened or not.
        shapes: ``(O, I)`` of each.
        ratio: parameters that may be left, as a share of all matrices' together.
        multiple_of: of every rank.
        three_factors: whether a square matrix stands between the two.

    Returns:
        The rank of each matrix, or None for one that stays dense since its factors would be no smaller.

    Raises:
        ConfigError: a ratio that is not between 0 and 1, or that does not pay for the least rank of each matrix.
    """
    assert values.keys() == shapes.keys(), "singular values and shapes are of the same matrices"
    left = left_by_budget(list(shapes.values()), ratio, multiple_of, three_factors=three_factors)

    def cost(name: str, num_groups: int) -> int:
        return _least_parameters(num_groups * multiple_of, shapes[name], three_factors)

    taken = dict.fromkeys(values, 1)
    gains: list[tuple[float, str]] = []
    for name, values_N in values.items():
        squares_N = values_N.double().square()
        groups = (squares_N / squares_N.sum().clamp(min=1e-300)).split(multiple_of)
        sides, square = multiple_of * sum(shapes[name]), multiple_of**2 * three_factors
        gains += [
            (float(group.sum()) / (sides + square * (2 * number + 1)), name)
            for number, group in enumerate(groups[1:], start=1)
        ]
    # the sort is stable, so equal gains come in the order of the matrices, and a matrix' own in theirs
    for _, name in sorted(gains, key=lambda gain: -gain[0]):
        added = cost(name, taken[name] + 1) - cost(name, taken[name])
        if added <= left:
            left -= added
            taken[name] += 1
    dense = {name for name in values if cost(name, taken[name]) == math.prod(shapes[name])}
    return {name: None if name in dense else number * multiple_of for name, number in taken.items()}


def left_by_budget(
    shapes: Sequence[tuple[int, int]],
    ratio: float,
    multiple_of: int = 1,
    key: str = ".ratio",
    *,
    three_factors: bool = False,
) -> int:
    """Parameters that :func:`ranks_by_budget` can spread once each matrix has its least rank.

    Args:
        shapes: ``(O, I)`` of each matrix.
        ratio: parameters that may be left, as a share of all matrices' together.
        multiple_of: of every rank; a matrix whose factors would be no smaller stays whole.
        key: the setting that the ratio comes from, for the message.
        three_factors: whether a square matrix stands between the two.

    Raises:
        ConfigError: a ratio that is not between 0 and 1, or that does not pay for the least ranks.
    """
    _check_ratio(ratio)
    if multiple_of < 1:
        raise ConfigError(Problem(".multiple_of", multiple_of, "a whole number above 0"))
    total = sum(math.prod(shape) for shape in shapes)
    least = sum(_least_parameters(multiple_of, shape, three_factors) for shape in shapes)
    left = int(ratio * total + _ROUNDING) - least
    if left < 0:
        raise ConfigError(Problem(key, ratio, f"from {_at_least(least / total)}, rank {multiple_of} of each matrix"))
    return left


def _least_parameters(rank: int, shape: tuple[int, int], three_factors: bool) -> int:
    """As factors or, where that is less, as it is."""
    return min(num_factor_parameters(rank, *shape, three_factors), math.prod(shape))


@dataclass(frozen=True)
class TensorFactors:
    """A stack of matrices as a product of small tensors. Experimental.

    Args:
        ranks: of Tucker, one for each of L, O and I; of a tensor train, one between each two.
        num_parameters: of all the small tensors together.
        stack: what they give, ``[L, O, I]`` in float32.
    """

    ranks: tuple[int, ...]
    num_parameters: int
    stack: Tensor


def tucker(stack_LOI: Tensor, ratio: float) -> TensorFactors:
    """Tucker decomposition: a core ``[R1, R2, R3]`` and a matrix for each of L, O and I. Experimental.

    Each rank is about the same share of its side, the largest that the ratio pays for. The stack may be one projection
    of several layers, or the heads of one layer, ``[heads, head_dim, D]``.

    Raises:
        ConfigError: tensorly is missing, or a ratio that is not between 0 and 1 or does not pay for ranks of 1.
    """

    def decompose(tensorly: Any, stack: Tensor, ranks: _Ranks) -> tuple[list[Tensor], Tensor]:
        core, factors = tensorly.decomposition.tucker(stack, list(ranks))
        return [core, *factors], tensorly.tucker_to_tensor((core, factors))

    return _decomposed(stack_LOI, tucker_ranks(tuple(stack_LOI.shape), ratio), decompose)


def tucker_ranks(sizes: _Ranks, ratio: float) -> _Ranks:
    """The ranks that :func:`tucker` gives a stack of these sizes.

    Raises:
        ConfigError: a ratio that is not between 0 and 1 or does not pay for ranks of 1.
    """

    def ranks_of(share: float) -> _Ranks:
        ranks = [max(1, math.ceil(share * size)) for size in sizes]
        # an unfolding has no more rank than its other side gives it
        return tuple(min(rank, math.prod(ranks) // rank) for rank in ranks)

    def count(ranks: _Ranks) -> int:
        return math.prod(ranks) + sum(rank * size for rank, size in zip(ranks, sizes, strict=True))

    return _ranks_within(ratio, sizes, ranks_of, count)


def tensor_train(stack_LOI: Tensor, ratio: float) -> TensorFactors:
    """Tensor train: ``[1, L, R1]``, ``[R1, O, R2]`` and ``[R2, I, 1]``, multiplied in a row. Experimental.

    ``R1`` is about the same share of L as ``R2`` is of I, the largest that the ratio pays for.

    Raises:
        ConfigError: tensorly is missing, or a ratio that is not between 0 and 1 or does not pay for ranks of 1.
    """

    def decompose(tensorly: Any, stack: Tensor, ranks: _Ranks) -> tuple[list[Tensor], Tensor]:
        factors = list(tensorly.decomposition.tensor_train(stack, [1, *ranks, 1]))
        return factors, tensorly.tt_to_tensor(factors)

    return _decomposed(stack_LOI, tensor_train_ranks(tuple(stack_LOI.shape), ratio), decompose)


def tensor_train_ranks(sizes: _Ranks, ratio: float) -> _Ranks:
    """The ranks that :func:`tensor_train` gives a stack of these sizes.

    Raises:
        ConfigError: a ratio that is not between 0 and 1 or does not pay for ranks of 1.
    """
    layers, outputs, inputs = sizes

    def ranks_of(share: float) -> _Ranks:
        first = min(max(1, math.ceil(share * layers)), outputs * inputs)
        return first, min(max(1, math.ceil(share * inputs)), first * outputs)

    def count(ranks: _Ranks) -> int:
        first, second = ranks
        return layers * first + first * outputs * second + second * inputs

    return _ranks_within(ratio, sizes, ranks_of, count)


def _ranks_within(
    ratio: float, sizes: _Ranks, ranks_of: Callable[[float], _Ranks], count: Callable[[_Ranks], int]
) -> _Ranks:
    """The ranks of the largest share whose number of parameters is at most this ratio of the stack's."""
    _check_ratio(ratio)
    budget = ratio * math.prod(sizes) + _ROUNDING
    if (least := count(ranks_of(0))) > budget:
        share = _at_least(least / math.prod(sizes))
        raise ConfigError(Problem(".ratio", ratio, f"from {share}, ranks of 1 for a stack of {sizes}"))
    low, high = 0.0, 1.0
    for _ in range(50):  # until the shares differ by far less than a row of any side
        middle = (low + high) / 2
        low, high = (low, middle) if count(ranks_of(middle)) > budget else (middle, high)
    return ranks_of(low)


def require_tensorly() -> Any:
    """The package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import tensorly
    except ImportError as error:
        remedy = "pip install 'kd-recipes[tensor]'"
        raise ConfigError(Problem("tensorly", "not installed", "the package tensorly", remedy)) from error
    return tensorly


@torch.no_grad()
def _decomposed(
    stack_LOI: Tensor, ranks: _Ranks, decompose: Callable[[Any, Tensor, _Ranks], tuple[list[Tensor], Tensor]]
) -> TensorFactors:
    """What ``decompose`` makes of a stack with tensorly, which is set back to the backend that it had."""
    tensorly = require_tensorly()
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        factors, stack = decompose(tensorly, _float64(stack_LOI), ranks)
    return TensorFactors(ranks, sum(factor.numel() for factor in factors), stack.to(stack_LOI.device, torch.float32))


def _whitened(weight_OI: Tensor, gram_II: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``W S`` in float64, and the lower triangle ``S`` with ``S S^T`` the gram; the weight itself without a gram."""
    if not all(tensor.isfinite().all() for tensor in (weight_OI, gram_II) if tensor is not None):
        raise ConfigError(Problem("weights or activations", "inf or nan", "finite numbers"))
    weight_OI = _float64(weight_OI)
    if gram_II is None:
        return weight_OI, None
    if gram_II.shape != (weight_OI.shape[1],) * 2:
        raise ConfigError(Problem("gram_II", _shape(gram_II), f"one for the inputs of {_shape(weight_OI)}"))
    gram_II = _float64(gram_II).to(weight_OI.device)
    # a gram of zeros has seen nothing, and the plain decomposition is left
    mean_square = abs(float(gram_II.diagonal().mean())) or 1.0
    eye_II, ridge, failed = torch.eye(len(gram_II)).to(gram_II), _RIDGE, True
    while failed:
        whitening_II, info = torch.linalg.cholesky_ex(gram_II + ridge * mean_square * eye_II)
        failed, ridge = bool(info), 10 * ridge
    return weight_OI @ whitening_II, whitening_II


def _float64(tensor: Tensor) -> Tensor:
    """A matrix as precise as an inverse of what is nearly singular needs it; Apple's GPUs have no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).detach().double()


def _shape(tensor: Tensor) -> str:
    return f"a {' x '.join(map(str, tensor.shape))} matrix"


def _at_least(share: float) -> str:
    """Three digits of a share that must not be rounded down: who asks for as much as was named must be content."""
    digits = 2 - math.floor(math.log10(share))
    return f"{math.ceil(share * 10**digits) / 10**digits:.3g}"


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise ConfigError(Problem(".ratio", ratio, "above 0 and below 1"))
