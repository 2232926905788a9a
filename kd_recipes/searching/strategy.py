"""How a search chooses values, and which trials it does not run to their end: Optuna's ways, by their names here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "halving", "none")


@dataclass(frozen=True)
class Strategy:
    """The settings of a search.

    Args:
        sampler: one of ``SAMPLERS``: tree-structured Parzen estimator (arXiv 2304.11127), at random, or everything.
        pruner: one of ``PRUNERS``: a trial ends where it is worse than the median of others at its step, or is not
            among the best quarter at the steps of successive halving (arXiv 1810.05934).
        num_startup_trials: before the sampler learns from trials, and there is a median.
        num_warmup_steps: of a trial that are not judged.
        seed: of the values.
    """

    sampler: str
    pruner: str
    num_startup_trials: int
    num_warmup_steps: int
    seed: int

    def build_sampler(self, num_trials: int) -> BaseSampler:
        """Optuna's, for a study that has some trials already: of the same seed it would draw them again."""
        from optuna.samplers import RandomSampler, TPESampler

        seed = self.seed + num_trials
        if self.sampler == "tpe":
            return TPESampler(seed=seed, n_startup_trials=self.num_startup_trials)
        return RandomSampler(seed=seed)  # the points of a grid are enqueued, and nothing is drawn

    def build_pruner(self) -> BasePruner:
        """Optuna's."""
        from optuna.pruners import MedianPruner, NopPruner, SuccessiveHalvingPruner

        if self.pruner == "median":
            return MedianPruner(self.num_startup_trials, self.num_warmup_steps)
        if self.pruner == "halving":
            return SuccessiveHalvingPruner(min_resource=self.num_warmup_steps or "auto")
        return NopPruner()
