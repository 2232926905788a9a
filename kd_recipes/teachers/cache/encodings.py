"""What is kept of a teacher's distribution: its likeliest ids, or ids that are drawn from it."""

# n positions, V vocabulary, K ids kept, D draws, M ids kept at all n positions together

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem

MAX_WIDTH = 4096  # ids a position, far beyond what pays


@dataclass(frozen=True)
class Named:
    """Ids of some positions, likeliest first.

    Args:
        ids_nK: distinct within a row.
        log_p_nK: over the whole vocabulary; -inf where a row has fewer than K ids.
        counts_nK: how often each was drawn; None for likeliest ids.
        log_tail_n: logarithm of the probability of all other ids; None for ids that were drawn.
    """

    ids_nK: Tensor
    log_p_nK: Tensor
    counts_nK: Tensor | None = None
    log_tail_n: Tensor | None = None


class Encoding(ABC):
    """What is kept of a distribution."""

    is_drawn: bool  # whether the ids are drawn
    width: int  # most ids of a position

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What two caches of the same encoding have in common."""

    @abstractmethod
    def name(self, log_p_nV: Tensor, uniform_nD: Tensor) -> Named:
        """The ids to be kept.

        Args:
            log_p_nV: log-probabilities in float32.
            uniform_nD: ``width`` random numbers in [0, 1) a position where the ids are drawn, in float64.
        """


class TopK(Encoding):
    """The k likeliest ids and, in one number, the probability of all others: nothing is renormalized.

    Divergences are then those of distributions over k + 1 outcomes, never larger than those over all ids.

    Args:
        k: ids a position.
    """

    is_drawn = False

    def __init__(self, k: int = 64) -> None:
        self.width = _in_range(".k", k)

    def settings(self) -> dict[str, Any]:
        """Kind and number."""
        return {"kind": "TopK", "k": self.width}

    def name(self, log_p_nV: Tensor, uniform_nD: Tensor) -> Named:
        """The k likeliest, or all where there are fewer."""
        log_p_nK, ids_nK = log_p_nV.topk(min(self.width, log_p_nV.shape[1]), -1)
        # not 1 - sum(p): that has no digits left where the k ids hold nearly everything
        return Named(ids_nK, log_p_nK, log_tail_n=log_p_nV.scatter(1, ids_nK, -torch.inf).logsumexp(-1))


class RandomSampling(Encoding):
    """Ids drawn from the distribution with replacement, and how often: random-sampling KD (arXiv 2503.16870).

    The forward KL divergence over all ids, and its gradient, are estimated without bias; likeliest ids alone would
    teach the student that the others do not exist. What is drawn for a document depends on its tokens alone.

    Args:
        num_draws: a position; 12 already train nearly as well as the whole distribution.
    """

    is_drawn = True

    def __init__(self, num_draws: int = 50) -> None:
        self.width = _in_range(".num_draws", num_draws)

    def settings(self) -> dict[str, Any]:
        """Kind and number."""
        return {"kind": "RandomSampling", "num_draws": self.width}

    def name(self, log_p_nV: Tensor, uniform_nD: Tensor) -> Named:
        """The ids at which the distribution function passes the random numbers."""
        # float64: a float32 sum over 150,000 ids is off by more than the probability of many of them
        mass_nV = log_p_nV.double().exp().cumsum(-1)
        ids_nD = torch.searchsorted(mass_nV, uniform_nD * mass_nV[:, -1:], right=True).clamp_max(log_p_nV.shape[1] - 1)
        log_p_nD = log_p_nV.gather(1, ids_nD)
        # by id, then stably by probability: the same ids stand together, likeliest first
        ids_nD, by_id = ids_nD.sort(-1)
        log_p_nD, by_mass = log_p_nD.gather(1, by_id).sort(stable=True, dim=-1, descending=True)
        ids_nD = ids_nD.gather(1, by_mass)
        is_first_nD = torch.ones_like(ids_nD, dtype=torch.bool)
        is_first_nD[:, 1:] = ids_nD[:, 1:] != ids_nD[:, :-1]
        rank_nD = is_first_nD.cumsum(-1) - 1
        counts_nD = torch.zeros_like(ids_nD).scatter_add_(1, rank_nD, torch.ones_like(ids_nD))
        packed_nD = torch.zeros_like(ids_nD).scatter_(1, rank_nD, ids_nD)
        log_p_nD = torch.full_like(log_p_nD, -torch.inf).scatter_(1, rank_nD, log_p_nD)
        return Named(packed_nD, log_p_nD, counts_nK=counts_nD)


def encoding_of(settings: Mapping[str, Any]) -> Encoding:
    """The inverse of :meth:`Encoding.settings`.

    Raises:
        KeyError, TypeError: there is no such encoding.
        ConfigError: its number is none.
    """
    kinds: dict[str, Callable[..., Encoding]] = {"TopK": TopK, "RandomSampling": RandomSampling}
    return kinds[settings["kind"]](**{name: value for name, value in settings.items() if name != "kind"})


def _in_range(key: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_WIDTH:
        raise ConfigError(Problem(key, value, f"a whole number from 1 to {MAX_WIDTH}"))
    return value
