"""How far a student's distribution is from its teacher's: pure functions with their gradients in closed form.

A divergence D(p, q) of the teacher p and the student q, both at temperature T, has for the student's logits z

    dD/dz_j = (a_j - q_j * sum_i a_i) / T    with    a_i = q_i * dD/dq_i

so a divergence returns its value and ``a``, and whoever calls it finishes the gradient.
"""

# n tokens, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Distributions:
    """Teacher and student at some tokens, at temperature T, in float32; what a divergence may overwrite.

    Args:
        p_nV: the teacher's probabilities.
        log_p_nV: their logarithms; -inf where the teacher masks an id.
        q_nV: the student's probabilities; not to be overwritten.
        log_q_nV: their logarithms; not to be overwritten.
    """

    p_nV: Tensor
    log_p_nV: Tensor
    q_nV: Tensor
    log_q_nV: Tensor


class Divergence(Protocol):
    """``Distributions -> (value_n, a_nV)``: nats a token, and ``a`` of the module docstring."""

    def __call__(self, at: Distributions, /) -> tuple[Tensor, Tensor]: ...


class ForwardKL:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), the divergence of Hinton et al. (arXiv 1503.02531).

    Zero, with zero gradient, when student and teacher agree; torchtune's class of a similar name is the cross
    entropy of the two, which is not.
    """

    def __call__(self, at: Distributions, /) -> tuple[Tensor, Tensor]:
        """Returns the KL divergence ``[n]`` in nats and ``a = -p`` ``[n, V]``."""
        # where p = 0 the term is 0, also where its logarithm is -inf
        terms_nV = at.log_p_nV.sub_(at.log_q_nV).mul_(at.p_nV).masked_fill_(at.p_nV == 0, 0.0)
        return terms_nV.sum(-1), at.p_nV.neg_()
