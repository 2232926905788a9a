"""The divergences written from their formulas, in plain torch, without a line of the package."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_recipes import losses


def kl(a: Tensor, b: Tensor) -> Tensor:
    """sum a log(a / b), where a term with a = 0 is 0."""
    return torch.where(a > 0, a * (a.log() - b.log()), torch.zeros_like(a)).sum(-1)


def adaptive_kl(p: Tensor, q: Tensor, head_mass: float = 0.5) -> Tensor:
    """Row by row: sort, find the head, weigh."""
    rows = []
    for p_V, q_V in zip(p, q, strict=True):
        order = p_V.argsort(descending=True)
        head = order[: int((p_V[order].cumsum(0) < head_mass).sum()) + 1]
        gap = (p_V - q_V).abs().detach()
        share = gap[head].sum() / gap.sum()
        rows.append(share * kl(p_V, q_V) + (1 - share) * kl(q_V, p_V))
    return torch.stack(rows)


def alpha_beta(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """ABKD, equation by equation."""
    if b == 0:
        return (p**a * torch.log(p**a / q**a) - p**a + q**a).sum(-1) / a**2
    if a == 0:
        return (q**b * torch.log(q**b / p**b) - q**b + p**b).sum(-1) / b**2
    return -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum(-1) / (a * b)


def jensen_shannon(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """GKD, with its limits."""
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name -> (ours, the formula as a function of p and q)
DIVERGENCES = {
    "forward_kl": (losses.ForwardKL(), kl),
    "reverse_kl": (losses.ReverseKL(), lambda p, q: kl(q, p)),
    "symmetric_kl": (losses.SymmetricKL(0.3), lambda p, q: 0.3 * kl(p, q) + 0.7 * kl(q, p)),
    "adaptive_kl": (losses.AdaptiveKL(), adaptive_kl),
    "jensen_shannon": (losses.JensenShannon(0.3), lambda p, q: jensen_shannon(p, q, 0.3)),
    "jensen_shannon_0": (losses.JensenShannon(0.0), lambda p, q: jensen_shannon(p, q, 0)),
    "jensen_shannon_1": (losses.JensenShannon(1.0), lambda p, q: jensen_shannon(p, q, 1)),
    "skew_forward_kl": (losses.SkewForwardKL(0.1), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    "skew_reverse_kl": (losses.SkewReverseKL(0.1), lambda p, q: kl(q, 0.9 * p + 0.1 * q)),
    "total_variation": (losses.TotalVariation(), lambda p, q: (p - q).abs().sum(-1) / 2),
    "alpha_beta": (losses.AlphaBeta(0.5, 0.7), lambda p, q: alpha_beta(p, q, 0.5, 0.7)),
    "alpha_beta_0": (losses.AlphaBeta(0.0, 0.7), lambda p, q: alpha_beta(p, q, 0, 0.7)),
    "alpha_beta_1": (losses.AlphaBeta(0.6, 0.0), lambda p, q: alpha_beta(p, q, 0.6, 0)),
    "differentiated": (
        losses.Differentiated(lambda log_p, log_q: (log_p.exp() * (log_p - log_q) ** 2).sum(-1)),
        lambda p, q: (p * (p.log() - q.log()) ** 2).sum(-1),
    ),
}
