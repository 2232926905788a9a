"""Whether a model that is 80% sure is right 4 times out of 5."""

# N tokens, B bins

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_BINS = 15  # as in the paper
_ROUNDING = 1e-4  # of a float32 softmax, which may sum to a little more than 1


class Reliability:
    """Tokens by the confidence they were predicted with, in bins of equal width (arXiv 1706.04599).

    Bin b of B, from 1, holds the confidences in ``((b - 1) / B, b / B]``, and the first one 0 as well. Two of them can
    be added; over processes, add up ``sums_3B`` and make another one of it.

    Args:
        sums_3B: of another one: tokens, confidence, right predictions of each bin; float64.
        num_bins: B, for one without tokens.

    Raises:
        ValueError: the sums are not ``[3, B]``, or there are no bins.
    """

    def __init__(self, sums_3B: Tensor | None = None, *, num_bins: int = NUM_BINS) -> None:
        self.sums_3B = torch.zeros(3, num_bins, dtype=torch.float64) if sums_3B is None else sums_3B
        if self.sums_3B.ndim != 2 or self.sums_3B.shape[0] != 3 or self.sums_3B.shape[1] < 1:
            raise ValueError(f"sums are {list(self.sums_3B.shape)}: wanted three rows, and at least one bin")

    def add(self, confidence_N: Tensor, correct_N: Tensor) -> None:
        """Count tokens.

        Args:
            confidence_N: the probability of the likeliest id. nan makes the error nan.
            correct_N: 1 where that was right, 0 elsewhere.

        Raises:
            ValueError: the shapes differ, or a confidence is no probability, as a logit.
        """
        if confidence_N.ndim != 1 or confidence_N.shape != correct_N.shape:
            shapes = f"{list(confidence_N.shape)} and {list(correct_N.shape)}"
            raise ValueError(f"confidence and correctness are {shapes}: wanted one of each a token")
        confidence_N, correct_N = confidence_N.cpu().double(), correct_N.cpu().double()  # MPS has no float64
        if ((confidence_N < 0) | (confidence_N > 1 + _ROUNDING)).any():
            span = f"{float(confidence_N.min()):g} to {float(confidence_N.max()):g}"
            raise ValueError(f"confidences are {span}: wanted probabilities, which are 0 to 1")
        num_bins = self.sums_3B.shape[1]
        bins_N = torch.bucketize(confidence_N, torch.arange(1, num_bins, dtype=torch.float64) / num_bins)
        self.sums_3B.index_add_(1, bins_N, torch.stack([torch.ones_like(confidence_N), confidence_N, correct_N]))

    def __add__(self, other: Reliability) -> Reliability:
        if self.sums_3B.shape != other.sums_3B.shape:
            bins = f"{self.sums_3B.shape[1]} and {other.sums_3B.shape[1]}"
            raise ValueError(f"{bins} bins: wanted the same number, as tokens cannot be moved between them")
        return Reliability(self.sums_3B + other.sums_3B)

    @property
    def bins(self) -> list[tuple[int, float, float]]:
        """Of each bin that is not empty: tokens, mean confidence, share that was right."""
        return [
            (int(count), confidence / count, correct / count)
            for count, confidence, correct in self.sums_3B.T.tolist()
            if count
        ]

    @property
    def expected_calibration_error(self) -> float:
        """``sum_b n_b / N * |accuracy_b - confidence_b|``; nan for no tokens."""
        count_B, confidence_B, correct_B = self.sums_3B
        total = float(count_B.sum())
        return float((confidence_B - correct_B).abs().sum()) / total if total else math.nan
