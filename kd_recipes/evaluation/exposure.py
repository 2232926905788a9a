"""Exposure bias: how much more a student errs in text that it has begun itself than in its teacher's.

Arora et al. 2022, "Why Exposure Bias Matters" (arXiv 2204.01171), with the teacher as the oracle.
"""

# N texts, L positions after the prompt

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Exposure:
    """Accumulated error at each length l = 1 … L; nan from the first position on that too few texts reach.

    Args:
        regret_L: R(l), the student's error in its own texts, summed over their first l positions, in nats.
        expected_L: l ε(l), what it would be if each of them were as the teacher's are.
        excess_L: ExAccErr(l), percent by which R(l) is above l ε(l): 0 without exposure bias.
    """

    regret_L: Tensor
    expected_L: Tensor
    excess_L: Tensor

    def at(self, length: int) -> float:
        """ExAccErr at a length, in percent; nan where texts are shorter."""
        return float(self.excess_L[length - 1]) if 0 < length <= len(self.excess_L) else float("nan")


def measure_exposure(student_kl_NL: Tensor, teacher_kl_NL: Tensor, *, min_texts: int = 1) -> Exposure:
    """Excess accumulated error of a student.

        R(l)        = sum over t <= l of the mean KL(teacher || student) at position t of the student's texts
        l ε(l)      = the same sum over the teacher's texts
        ExAccErr(l) = 100% (R(l) - l ε(l)) / (l ε(l))

    Args:
        student_kl_NL: KL(teacher || student) in nats at the positions of texts drawn from the student; nan after a
            text's end.
        teacher_kl_NL: of texts drawn from the teacher, of as many prompts or others.
        min_texts: that have to reach a position for their mean to stand for it.
    """
    length = min(student_kl_NL.shape[1], teacher_kl_NL.shape[1])
    regret_L, expected_L = (
        _accumulate(kl_NL[:, :length].double(), min_texts) for kl_NL in (student_kl_NL, teacher_kl_NL)
    )
    excess_L = 100 * (regret_L - expected_L) / expected_L.masked_fill(expected_L <= 0, torch.nan)
    return Exposure(regret_L, expected_L, excess_L)


def _accumulate(kl_NL: Tensor, min_texts: int) -> Tensor:
    num_texts_L = kl_NL.isfinite().sum(0)
    mean_L = kl_NL.nan_to_num(0.0, 0.0, 0.0).sum(0) / num_texts_L
    return mean_L.masked_fill(num_texts_L < min_texts, torch.nan).cumsum(0)
