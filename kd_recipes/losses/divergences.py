"""How far a student's distribution is from its teacher's: pure functions with their gradients in closed form.

A divergence D(p, q) of the teacher p and the student q has for the student's logits z at temperature T

    dD/dz_j = (a_j - q_j * sum_i a_i) / T    with    a_i = q_i * dD/dq_i

so a divergence returns its value and ``a``, and whoever calls it finishes the gradient; ``a`` may be shifted by any
multiple of q. Each is zero, with zero gradient, when student and teacher agree, and each is written in operations
that overwrite what they are handed: over 150,000 ids the time goes where the memory traffic goes.
"""

# n tokens, V vocabulary (or the buckets of a sparse teacher)

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

# What stands for the logarithm of 0, so that 0 * log 0 is 0: a probability times it overflows only for a divergence
# that is infinite, where a model gives nothing to an id that the other one needs.
LOG_ZERO = -1e30
_BISECTIONS = 20  # of some 13 nats: the head's threshold to five digits


@dataclass(frozen=True)
class Distributions:
    """Teacher and student at some tokens, each at its temperature, in float32 or float64.

    Args:
        p_nV: the teacher's probabilities; may be overwritten.
        log_p_nV: their logarithms, ``LOG_ZERO`` for that of 0; may be overwritten.
        q_nV: the student's probabilities; not to be overwritten.
        log_q_nV: their logarithms; may be overwritten.
        forward_kl_n: KL(p || q) in nats.
        reverse_kl_n: KL(q || p) in nats.
        teacher_entropy_n: H(p) in nats.
        student_entropy_n: H(q) in nats.
    """

    p_nV: Tensor
    log_p_nV: Tensor
    q_nV: Tensor
    log_q_nV: Tensor
    forward_kl_n: Tensor
    reverse_kl_n: Tensor
    teacher_entropy_n: Tensor
    student_entropy_n: Tensor

    @classmethod
    def compare(cls, p_nV: Tensor, log_p_nV: Tensor, q_nV: Tensor, log_q_nV: Tensor) -> Distributions:
        """Both distributions, whose logarithms are replaced by ``LOG_ZERO`` where they are -inf, and their moments."""
        log_p_nV, log_q_nV = log_p_nV.clamp_min_(LOG_ZERO), log_q_nV.clamp_min_(LOG_ZERO)
        dot = torch.linalg.vecdot
        p_log_p_n, q_log_q_n = dot(p_nV, log_p_nV), dot(q_nV, log_q_nV)
        forward_n, reverse_n = p_log_p_n - dot(p_nV, log_q_nV), q_log_q_n - dot(q_nV, log_p_nV)
        return cls(p_nV, log_p_nV, q_nV, log_q_nV, forward_n, reverse_n, -p_log_p_n, -q_log_q_n)


class Divergence(ABC):
    """A distance from teacher to student, with its settings."""

    # whether it can be estimated from ids that were drawn from the teacher: an expectation of log p - log q under p
    is_estimable: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Value ``[n]`` in nats, unless said otherwise, and ``a`` ``[n, V]`` of the module's docstring."""


class ForwardKL(Divergence):
    """KL(p || q) = sum_i p_i (log p_i - log q_i), the divergence of Hinton et al. (arXiv 1503.02531).

    Covers all that the teacher finds possible. torchtune's class of a similar name is the cross entropy of the two,
    which is not zero where they agree.
    """

    is_estimable = True

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the KL divergence and ``a = -p``."""
        return at.forward_kl_n, at.p_nV.neg_()


class ReverseKL(Divergence):
    """KL(q || p) = sum_i q_i (log q_i - log p_i), of MiniLLM (arXiv 2306.08543); keeps to what the teacher favours."""

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the KL divergence and ``a = q (log q - log p)``."""
        return at.reverse_kl_n, at.log_q_nV.sub_(at.log_p_nV).mul_(at.q_nV)


class SymmetricKL(Divergence):
    """``weight * KL(p || q) + (1 - weight) * KL(q || p)``.

    Args:
        weight: of the forward divergence, in [0, 1].
    """

    def __init__(self, weight: float = 0.5) -> None:
        self.weight = _in_unit_interval("weight", weight)

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum and ``a`` likewise."""
        return _mix_kl(at, self.weight)


class AdaptiveKL(Divergence):
    """Forward and reverse KL, weighted token by token by where the student is wrong (AKL, arXiv 2404.02657).

    The head is the fewest likeliest ids of the teacher that hold ``head_mass``; the forward divergence
    gets the head's share of ``sum |p - q|``, the reverse one the tail's. The weights are not differentiated.

    Args:
        head_mass: probability of the head, in (0, 1).
    """

    def __init__(self, head_mass: float = 0.5) -> None:
        if not 0 < head_mass < 1:
            raise ValueError(f"head_mass is {head_mass}, and has to be between 0 and 1")
        self.head_mass = head_mass

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the weighted sum and ``a`` likewise."""
        log_ratio_nV, free_nV = at.log_q_nV.sub_(at.log_p_nV), at.log_p_nV
        is_head_nV = torch.gt(at.p_nV, self._threshold(at.p_nV, free_nV), out=free_nV)
        gap_nV = torch.sub(at.p_nV, at.q_nV).abs_()
        # where the two agree there is no gap to share out, and any weight is right
        share_n = torch.linalg.vecdot(is_head_nV, gap_nV) / gap_nV.sum(-1).clamp_min_(torch.finfo(gap_nV.dtype).tiny)
        return _mix_kl(at, share_n, log_ratio_nV)

    def _threshold(self, p_nV: Tensor, free_nV: Tensor) -> Tensor:
        """A probability ``[n, 1]`` that the head's ids are above: found by bisection, since sorting costs far more.

        Below ``(1 - head_mass) / V`` it cannot be, since all ids below it hold no more than ``1 - head_mass``.
        """
        low_n1 = torch.full_like(p_nV[:, :1], math.log((1 - self.head_mass) / p_nV.shape[1]) - 1e-3)
        high_n1 = torch.zeros_like(low_n1)
        for _ in range(_BISECTIONS):
            middle_n1 = (low_n1 + high_n1) / 2
            is_above_nV = torch.gt(p_nV, middle_n1.exp(), out=free_nV)
            holds_n1 = torch.linalg.vecdot(p_nV, is_above_nV).unsqueeze(1) >= self.head_mass
            low_n1, high_n1 = torch.where(holds_n1, middle_n1, low_n1), torch.where(holds_n1, high_n1, middle_n1)
        return low_n1.exp()


class JensenShannon(Divergence):
    """The generalized Jensen-Shannon divergence of GKD (arXiv 2306.13649), with m = beta p + (1 - beta) q:

    ``beta * KL(p || m) + (1 - beta) * KL(q || m)``

    Args:
        beta: in [0, 1]. At the ends, where the formula is zero, the limits of GKD: 0 is KL(p || q), 1 is KL(q || p).
    """

    def __init__(self, beta: float = 0.5) -> None:
        self.beta = _in_unit_interval("beta", beta)

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the divergence and ``a = (1 - beta) q (log q - log m)``."""
        beta = self.beta
        if beta in (0.0, 1.0):
            return _mix_kl(at, 1.0 - beta)
        log_m_nV = _mixture(at, beta, out=at.log_p_nV).log_()
        cross_n = beta * torch.linalg.vecdot(at.p_nV, log_m_nV) + (1 - beta) * torch.linalg.vecdot(at.q_nV, log_m_nV)
        value_n = -beta * at.teacher_entropy_n - (1 - beta) * at.student_entropy_n - cross_n
        return value_n, at.log_q_nV.sub_(log_m_nV).mul_(at.q_nV).mul_(1 - beta)


class SkewForwardKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), of DistiLLM (arXiv 2402.03898): finite also where q is 0.

    Args:
        alpha: share of the teacher in the mixture, in [0, 1); 0 is the forward divergence.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = _in_unit_interval("alpha", alpha, open_above=True)

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the KL divergence and ``a = -(1 - alpha) q p / m``, with m the mixture."""
        m_nV = _mixture(at, self.alpha, out=at.log_p_nV)
        a_nV = torch.div(at.q_nV, m_nV, out=at.log_q_nV).mul_(at.p_nV).mul_(self.alpha - 1)
        return -at.teacher_entropy_n - torch.linalg.vecdot(at.p_nV, m_nV.log_()), a_nV


class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q), of DistiLLM (arXiv 2402.03898): finite also where p is 0.

    Args:
        alpha: share of the student in the mixture, in [0, 1); 0 is the reverse divergence.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        self.alpha = _in_unit_interval("alpha", alpha, open_above=True)

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the KL divergence and ``a = q (log q - log m - alpha q / m)``, with m the mixture."""
        m_nV = _mixture(at, 1 - self.alpha, out=at.p_nV)
        log_m_nV = torch.log(m_nV, out=at.log_p_nV)
        value_n = -at.student_entropy_n - torch.linalg.vecdot(at.q_nV, log_m_nV)
        share_nV = torch.div(at.q_nV, m_nV, out=at.p_nV)
        return value_n, at.log_q_nV.sub_(log_m_nV).sub_(share_nV, alpha=self.alpha).mul_(at.q_nV)


class TotalVariation(Divergence):
    """``sum_i |p_i - q_i| / 2``, in [0, 1]; bounded, so that no token dominates (f-DISTILL, arXiv 2307.15190)."""

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the distance, no nats, and ``a = q sign(q - p) / 2``."""
        gap_nV = torch.sub(at.q_nV, at.p_nV, out=at.p_nV)
        value_n = torch.abs(gap_nV, out=at.log_p_nV).sum(-1) / 2
        return value_n, gap_nV.sign_().mul_(at.q_nV).div_(2)


class AlphaBeta(Divergence):
    """The alpha-beta divergence of ABKD (arXiv 2505.04560, after Cichocki et al. 2011):

    ``-1 / (alpha beta) * sum_i (p^alpha q^beta - alpha / (alpha + beta) p^(alpha + beta)
    - beta / (alpha + beta) q^(alpha + beta))``

    At alpha = 1, beta = 0 it is the forward, at alpha = 0, beta = 1 the reverse KL divergence, as limits. A larger
    alpha looks at where the teacher is sure, a larger beta at where the student is.

    Args:
        alpha: from 0.
        beta: from 0; not 0 together with alpha.
    """

    def __init__(self, alpha: float = 0.5, beta: float = 0.5) -> None:
        if not (alpha >= 0 and beta >= 0 and 0 < alpha + beta < math.inf):
            raise ValueError(f"alpha {alpha} and beta {beta} have to be 0 or above, and not 0 together")
        self.alpha, self.beta = alpha, beta

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the divergence, no nats, and ``a = (q^(alpha + beta) - p^alpha q^beta) / alpha``, or its limit."""
        alpha, beta, power = self.alpha, self.beta, self.alpha + self.beta
        if beta == 0:  # sum p^alpha (log p - log q) / alpha - (p^alpha - q^alpha) / alpha^2
            log_ratio_nV = torch.sub(at.log_p_nV, at.log_q_nV)
            p_power_nV, q_power_nV = at.log_p_nV.mul_(alpha).exp_(), at.log_q_nV.mul_(alpha).exp_()
            surplus_n = (p_power_nV.sum(-1) - q_power_nV.sum(-1)) / alpha**2
            value_n = torch.linalg.vecdot(p_power_nV, log_ratio_nV) / alpha - surplus_n
            return value_n, q_power_nV.sub_(p_power_nV).div_(alpha)
        if alpha == 0:  # sum q^beta (log q - log p) / beta - (q^beta - p^beta) / beta^2
            log_ratio_nV = torch.sub(at.log_q_nV, at.log_p_nV)
            p_power_nV, q_power_nV = at.log_p_nV.mul_(beta).exp_(), at.log_q_nV.mul_(beta).exp_()
            surplus_n = (q_power_nV.sum(-1) - p_power_nV.sum(-1)) / beta**2
            a_nV = q_power_nV.mul_(log_ratio_nV)
            return a_nV.sum(-1) / beta - surplus_n, a_nV
        p_power_n = at.log_p_nV.mul(power).exp_().sum(-1)
        cross_nV = at.log_p_nV.mul_(alpha).add_(at.log_q_nV, alpha=beta).exp_()
        q_power_nV = at.log_q_nV.mul_(power).exp_()
        powers_n = (alpha * p_power_n + beta * q_power_nV.sum(-1)) / power
        return (powers_n - cross_nV.sum(-1)) / (alpha * beta), q_power_nV.sub_(cross_nV).div_(alpha)


class Differentiated(Divergence):
    """Any function of two tensors of log-probabilities, whose gradient torch's autograd finds.

    Args:
        function: ``(log_p_nV, log_q_nV) -> value_n``, of the teacher and the student, in float32.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, at: Distributions) -> tuple[Tensor, Tensor]:
        """Returns the function's value and ``a``, its derivative by the student's log-probabilities.

        Raises:
            ValueError: the function returns no value a token, or none that depends on the student.
        """
        with torch.enable_grad():
            log_q_nV = at.log_q_nV.detach().requires_grad_()
            value_n = self.function(at.log_p_nV.detach(), log_q_nV)
            if value_n.shape != log_q_nV.shape[:1] or not value_n.requires_grad:
                got = f"{list(value_n.shape)} for log-probabilities {list(log_q_nV.shape)}"
                raise ValueError(f"kd_loss has to return one value a token that depends on the student, not {got}")
            (a_nV,) = torch.autograd.grad(value_n.sum(), log_q_nV)
        return value_n.detach(), a_nV


def _in_unit_interval(name: str, value: float, *, open_above: bool = False) -> float:
    if not 0 <= value <= 1 or (open_above and value == 1):
        raise ValueError(f"{name} is {value}, and has to be in [0, 1{')' if open_above else ']'}")
    return float(value)


def _mix_kl(at: Distributions, forward: float | Tensor, log_ratio_nV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``forward * KL(p || q) + (1 - forward) * KL(q || p)``, for one weight or one a token.

    Args:
        at: the distributions.
        forward: weight, or weights ``[n]``.
        log_ratio_nV: log q - log p, where the caller has it.
    """
    value_n = forward * at.forward_kl_n + (1 - forward) * at.reverse_kl_n
    weight = forward.unsqueeze(1) if isinstance(forward, Tensor) else forward
    log_ratio_nV = at.log_q_nV.sub_(at.log_p_nV) if log_ratio_nV is None else log_ratio_nV
    return value_n, log_ratio_nV.mul_(at.q_nV).mul_(1 - weight).sub_(at.p_nV.mul_(weight))


def _mixture(at: Distributions, teacher_share: float, *, out: Tensor) -> Tensor:
    """``teacher_share * p + (1 - teacher_share) * q``, never 0, so that it can be divided by and has a logarithm.

    What is raised are mixtures below the smallest normal number, 1e-38 in float32, of which both p and q are shares:
    their terms are 0 to any number of digits.
    """
    mixture_nV = torch.mul(at.p_nV, teacher_share, out=out).add_(at.q_nV, alpha=1 - teacher_share)
    return mixture_nV.clamp_min_(torch.finfo(mixture_nV.dtype).tiny)
