"""How sure a figure is. Documents are drawn independently of each other, and the tokens of one are not."""

# D documents, N items

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

import torch
from torch import Tensor

_ROUNDING = 1e-15  # relative, at which the continued fraction has converged


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error and the interval that holds the true one, 95 times in 100 by default."""

    mean: float
    standard_error: float
    low: float
    high: float


def ratio_with_interval(numerators_D: Tensor, denominators_D: Tensor, confidence: float = 0.95) -> Estimate:
    """The ratio of two sums over documents, such as nats to tokens.

    The standard error is the linearised, cluster-robust one, ``sqrt(D / (D - 1) * sum_d (n_d - r m_d)^2) / sum_d m_d``
    (Cochran, Sampling Techniques, 1977, 6.19; for evaluations arXiv 2411.00640), the interval Student's with D - 1
    degrees of freedom. It needs some 30 documents, more where a few are much longer than the rest.

    Args:
        numerators_D: sums over the tokens of each document.
        denominators_D: what they are divided by. Documents with 0 in both are left out, as they say nothing.
        confidence: of the interval.

    Returns:
        nan for the error and the interval of a single document, and for all where the denominators are 0.

    Raises:
        ValueError: the shapes differ or are not ``[D]``, a denominator is negative, or the confidence not in (0, 1).
    """
    numerators_D, denominators_D = _documents(numerators_D, denominators_D)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: wanted one between 0 and 1, such as 0.95")
    num_documents, total = len(numerators_D), float(denominators_D.sum())
    if total == 0:
        return Estimate(*(math.nan,) * 4)
    ratio = float(numerators_D.sum()) / total
    if num_documents < 2:
        return Estimate(ratio, math.nan, math.nan, math.nan)
    residual_D = numerators_D - ratio * denominators_D
    error = math.sqrt(num_documents / (num_documents - 1) * float(residual_D.square().sum())) / total
    reach = error * t_quantile((1 + confidence) / 2, num_documents - 1)
    return Estimate(ratio, error, ratio - reach, ratio + reach)


def paired_difference(a_D: Tensor, b_D: Tensor, denominators_D: Tensor, confidence: float = 0.95) -> Estimate:
    """The ratio of ``a`` less that of ``b`` on the same documents, whose difficulty it does not depend on.

    Raises:
        ValueError: as :func:`ratio_with_interval`.
    """
    return ratio_with_interval(_difference(a_D, b_D), denominators_D, confidence)


def paired_p_value(a_D: Tensor, b_D: Tensor, denominators_D: Tensor) -> float:
    """How probable a :func:`paired_difference` as large as this one is by chance, in either direction.

    ``P(|t| >= |mean| / standard_error)``, D - 1 degrees of freedom; nan for fewer than 2 documents. It is below 0.05
    where, and only where, the 95% interval leaves out 0.

    Raises:
        ValueError: as :func:`ratio_with_interval`.
    """
    difference_D, denominators_D = _documents(_difference(a_D, b_D), denominators_D)
    found = ratio_with_interval(difference_D, denominators_D)
    if found.standard_error == 0:  # all documents agree on the difference
        return 1.0 if found.mean == 0 else 0.0
    return _two_tails(abs(found.mean) / found.standard_error, len(difference_D) - 1)


def flips(correct_a: Sequence[bool], correct_b: Sequence[bool]) -> tuple[tuple[int, int, int, int], float]:
    """How the answers of one model differ from another's on the same N items (arXiv 2407.09141).

    Returns:
        How many both have right, only the first, only the second, neither; and the probability that chance alone makes
        the second and third as different, by McNemar's exact test: ``min(1, 2 P(X <= smaller))``, X binomial of their
        sum and 1/2. It takes the items to be independent: questions are, tokens are not.

    Raises:
        ValueError: they are not of the same items.
    """
    counts = Counter((bool(a), bool(b)) for a, b in zip(correct_a, correct_b, strict=True))
    only_a, only_b = counts[True, False], counts[False, True]
    fewer, more = sorted((only_a, only_b))
    # A sum of binomial coefficients, without their thousands of digits (NIST DLMF 8.17.5).
    tail = _incomplete_beta(0.5, more, fewer + 1) if more else 1.0
    return (counts[True, True], only_a, only_b, counts[False, False]), min(1.0, 2 * tail)


def accuracy_difference(correct_a: Sequence[bool], correct_b: Sequence[bool], confidence: float = 0.95) -> Estimate:
    """The accuracy of ``a`` less that of ``b`` on the same N independent items.

    Raises:
        ValueError: as :func:`paired_difference`.
    """
    a_N, b_N = (torch.tensor([bool(is_right) for is_right in right]) for right in (correct_a, correct_b))
    return paired_difference(a_N, b_N, torch.ones(len(a_N)), confidence)


def percentiles(values_N: Tensor, shares: Sequence[float] = (0.5, 0.99)) -> list[float]:
    """The values that these shares of all are not above, interpolated as numpy does; nan of none, and of any nan."""
    ordered = values_N.double().sort().values  # torch.quantile ends at 16 million; nan sorts last
    if len(ordered) == 0 or ordered[-1].isnan():
        return [math.nan] * len(shares)
    places = [share * (len(ordered) - 1) for share in shares]
    pairs = [(float(ordered[math.floor(place)]), float(ordered[math.ceil(place)]), place % 1) for place in places]
    return [low if low == high else low + (high - low) * weight for low, high, weight in pairs]  # inf - inf is nan


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Of Student's distribution: the t that ``probability`` of it lies below, to 9 digits.

    Raises:
        ValueError: the probability is not between 0 and 1, or there are no degrees of freedom.
    """
    if not 0 < probability < 1 or degrees < 1:
        raise ValueError(f"probability {probability}, {degrees} degrees: wanted one in (0, 1), and at least 1")
    if probability == 0.5:
        return 0.0
    tails = 2 * min(probability, 1 - probability)
    low, high = 0.0, 1.0
    while _two_tails(high, degrees) > tails:
        low, high = high, 2 * high
    while high - low > 1e-13 * high and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _two_tails(middle, degrees) > tails else (low, middle)
    return math.copysign(high, probability - 0.5)


def _documents(numerators_D: Tensor, denominators_D: Tensor) -> tuple[Tensor, Tensor]:
    if numerators_D.ndim != 1 or numerators_D.shape != denominators_D.shape:
        shapes = f"{list(numerators_D.shape)} and {list(denominators_D.shape)}"
        raise ValueError(f"sums over documents are {shapes}: wanted a number a document in both")
    if (denominators_D < 0).any():
        raise ValueError(f"a denominator is {float(denominators_D.min())}: wanted counts, such as of tokens")
    kept_D = (numerators_D != 0) | (denominators_D != 0)
    return numerators_D[kept_D].double(), denominators_D[kept_D].double()


def _difference(a_D: Tensor, b_D: Tensor) -> Tensor:
    if a_D.shape != b_D.shape:
        raise ValueError(f"sums over documents are {list(a_D.shape)} and {list(b_D.shape)}: wanted the same documents")
    return a_D.double() - b_D.double()


def _two_tails(t: float, degrees: int) -> float:
    """P(|T| >= t) of Student's distribution (Abramowitz and Stegun, 26.5.27); nan of nan."""
    return _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised ``I_x(a, b)`` by its continued fraction (NIST DLMF 8.17.22), evaluated from its head (Lentz)."""
    if not 0 < x < 1:
        return x  # 0, 1 and nan
    if x > (a + 1) / (a + b + 2):  # where the fraction is slow, that of the other tail is fast
        return 1 - _incomplete_beta(1 - x, b, a)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    fraction = upper = 1.0
    lower = 0.0
    for k in count(1):
        m = k // 2
        numerator = -(a + m) * (a + b + m) if k % 2 else m * (b - m)
        term = numerator * x / ((a + k - 1) * (a + k))
        lower = 1 / (1 + term * lower)
        upper = 1 + term / upper
        fraction *= upper * lower
        if abs(upper * lower - 1) < _ROUNDING:
            break
    return math.exp(logarithm) / (a * fraction)
