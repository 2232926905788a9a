"""How far what is stored of a teacher is from what it says: whether a cache is of this teacher, and was made right."""

# T tokens of a batch, N with a label, n some of them, V vocabulary, K ids kept

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import RunError
from kd_recipes.evaluation.tokens import MAX_LOGITS, token_values
from kd_recipes.signals import DenseSignal, Signal, SparseSignal

# A teacher's last bits depend on the shape of its batch, which a test of enough tokens would tell from none.
_MOST_ERRORS, _MOST_DISTANCE = 8, 0.01


@dataclass(frozen=True)
class Distances:
    """Of tokens that have a label, in host memory.

    Args:
        nats_N: of likeliest ids the KL(stored || teacher); of ids that were drawn the mean difference of their
            log-probabilities, which says nothing of how they were drawn; of a teacher that tells a few ids the
            difference of its likeliest's log-probability.
        squared_N: of ids that were drawn from a distribution q, an estimate without bias of ``sum_i (q_i - p_i)^2``
            with the teacher's p; empty for likeliest ids.
        variances_N: of these estimates where q is p.
    """

    nats_N: Tensor
    squared_N: Tensor
    variances_N: Tensor

    @classmethod
    def of(cls, said: Signal, stored: SparseSignal, batch: Batch, *, num_ids: int) -> Distances:
        """Between two signals on the same batch.

        Args:
            said: by the teacher.
            stored: of it.
            batch: its labels say which tokens count.
            num_ids: that what is stored is over.
        """
        nothing = torch.empty(0, dtype=torch.float64)
        if isinstance(said, DenseSignal):
            nats_N = token_values(said, stored, batch, num_ids=num_ids).values["kl"]
            return cls(nats_N, *(_drawn(said, stored, batch, num_ids) if stored.is_drawn else (nothing, nothing)))
        assert isinstance(said, SparseSignal), "a mixture is not cached"
        assert said.unsoftened is not None
        assert stored.unsoftened is not None
        gap_T = said.unsoftened.log_p_likeliest_T - stored.unsoftened.log_p_likeliest_T
        return cls(gap_T[batch.labels_BS.flatten() != IGNORE_INDEX].abs().cpu(), nothing, nothing)

    @classmethod
    def join(cls, parts: Sequence[Distances]) -> Distances:
        """Those of several batches."""
        names = ("nats_N", "squared_N", "variances_N")
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def describe(self) -> str:
        """In words.

        Raises:
            RunError: they cannot be told, or the ids were not drawn from what the teacher says.
        """
        num_tokens = len(self.nats_N)
        if not num_tokens:
            return "no label in the batches that were looked at"
        if num_lost := int(self.nats_N.isnan().sum()):
            raise RunError(f"what is stored or what the teacher says is nan at {num_lost:,} of {num_tokens:,} tokens")
        said = (
            f"what is stored is {self.nats_N.mean():.1e} nats a token from what the teacher says "
            f"({num_tokens:,} tokens, at most {self.nats_N.abs().max():.1e})"
        )
        if not len(self.squared_N):
            return said
        mean, error = float(self.squared_N.mean()), math.sqrt(float(self.variances_N.sum())) / num_tokens
        drawn = f"a squared distance of {mean:.1e} +- {error:.1e} from the teacher's probabilities"
        if abs(mean) > _MOST_ERRORS * error + _MOST_DISTANCE:
            raise RunError(f"the ids were not drawn from what the teacher says, but from what is at {drawn}")
        return f"{said}; its ids were drawn from what is at {drawn}"


def _drawn(said: DenseSignal, stored: SparseSignal, batch: Batch, num_ids: int) -> tuple[Tensor, Tensor]:
    """Squared distances, and their variances, of all tokens that have a label; logits exist for some at a time."""
    positions_N = (batch.labels_BS.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    parts = []
    for positions_n in positions_N.split(max(1, MAX_LOGITS // num_ids)):
        logits_nV = said.logits.first(num_ids).compute(positions_n)
        p_nV = (logits_nV.double() / stored.temperature).softmax(-1)
        known = stored[positions_n.to(stored.ids_TK.device)].to(p_nV.device)
        assert known.weights_TK is not None
        parts.append(squared_distances(p_nV, known.ids_TK, known.weights_TK))
    squared, variances = zip(*parts, strict=True)
    return torch.cat(squared).cpu(), torch.cat(variances).cpu()


def squared_distances(p_nV: Tensor, ids_nK: Tensor, shares_nK: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of ``|q - p|^2`` from K ids a position that were drawn from q, and their variances where q is p.

    With w the shares of the draws, the estimate takes from ``|w|^2`` what is there for the draws being few:

        (K |w|^2 - 1) / (K - 1) - 2 w.p + |p|^2

    Args:
        p_nV: probabilities.
        ids_nK: distinct where their shares are not 0.
        shares_nK: sum to 1 in each row.
    """
    num_draws = ids_nK.shape[1]
    square_n, cube_n = p_nV.square().sum(-1), p_nV.pow(3).sum(-1)
    met_n = (shares_nK.double() * p_nV.gather(1, ids_nK)).sum(-1)
    if num_draws == 1:  # says nothing of |q|^2, which then is taken to be |p|^2
        return 2 * (square_n - met_n), (4 * (cube_n - square_n.square())).clamp_min(0)
    own_n = (num_draws * shares_nK.double().square().sum(-1) - 1) / (num_draws - 1)
    variances_n = 2 * (square_n + square_n.square() - 2 * cube_n) / (num_draws * (num_draws - 1))
    return own_n - 2 * met_n + square_n, variances_n.clamp_min(0)
