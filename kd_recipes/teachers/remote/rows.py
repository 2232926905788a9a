"""What a server has said of a document, position by position, and what it has left unsaid."""

# n positions, K ids that are named, V vocabulary

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kd_recipes.errors import RunError

Numbers = NDArray[np.float32]
Ids = NDArray[np.int64]
_LEAST_TAIL = 1e-6  # what is left of 1 by some hundred float32 probabilities is not known better
_MOST_SURPLUS = 1e-2  # of the sum of all probabilities over 1


@dataclass(frozen=True)
class Rows:
    """Of each position of a document, what may come next.

    Args:
        ids_nK: named, distinct within a row.
        log_p_nK: over the whole vocabulary, at temperature 1; -inf where a row names fewer than K.
        log_p_label_n: of the document's own next id; nan where that is not known.
    """

    ids_nK: Ids
    log_p_nK: Numbers
    log_p_label_n: Numbers

    @classmethod
    def of(cls, named: Sequence[Mapping[int, float]], labels: Iterable[int], width: int) -> Rows:
        """From id -> log-probability at each position.

        Args:
            named: of each position.
            labels: the document's own next ids.
            width: most ids that are kept, the likeliest.
        """
        ids_nK = np.zeros((len(named), width), np.int64)
        log_p_nK = np.full((len(named), width), -np.inf, np.float32)
        for row, known in enumerate(named):
            best = sorted(known.items(), key=lambda item: -item[1])[:width]
            ids_nK[row, : len(best)] = [index for index, _ in best]
            log_p_nK[row, : len(best)] = [log_p for _, log_p in best]
        log_p_label_n = [known.get(label, np.nan) for known, label in zip(named, labels, strict=True)]
        return cls(ids_nK, log_p_nK, np.array(log_p_label_n, np.float32))

    def first(self, num_ids: int) -> Rows:
        """Of the first ids alone: those beyond are padding of the vocabulary, and count with all others."""
        return Rows(self.ids_nK, np.where(self.ids_nK < num_ids, self.log_p_nK, -np.inf), self.log_p_label_n)


def with_tail(log_p_nK: Numbers, num_ids: int) -> tuple[Numbers, Numbers]:
    """Log-probabilities of what is named and of all others ``[n]``, which sum to 1.

    Args:
        log_p_nK: of what is named.
        num_ids: of the vocabulary: where all are named, nothing is left.

    Raises:
        RunError: they are no probabilities.
    """
    named_nK = log_p_nK.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of nan, which is refused
        sum_n = np.logaddexp.reduce(named_nK, axis=1)
    if len(sum_n) and not (sum_n.max() < np.log1p(_MOST_SURPLUS)):
        raise RunError(
            f"remote teacher: the probabilities of a position add up to {np.exp(sum_n.max()):.3g}: "
            "the server has to send log-probabilities over the whole vocabulary, at temperature 1"
        )
    # log(1 - sum) without the digits that the difference would lose
    tail_n = np.log(np.maximum(-np.expm1(np.minimum(sum_n, 0.0)), _LEAST_TAIL))
    tail_n = np.where((log_p_nK > -np.inf).sum(1) < num_ids, tail_n, -np.inf)
    total_n = np.logaddexp(sum_n, tail_n)
    return (named_nK - total_n[:, None]).astype(np.float32), (tail_n - total_n).astype(np.float32)
