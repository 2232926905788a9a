"""How good a student is on text that it was not trained on, in the terms that compare across runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kd_recipes.batch import Batch
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.losses import Objective
from kd_recipes.signals import DenseSignal


@dataclass(frozen=True)
class HeldOut:
    """Means over the tokens of held-out text, at temperature 1.

    Args:
        num_tokens: how many tokens the means are over.
        cross_entropy: of the model with the text, in nats a token.
        kl: KL(teacher || model), in nats a token; nan without a teacher.
        agreement: share of tokens at which teacher and model have the same likeliest id; nan without a teacher.
        accuracy: share of tokens at which the model's likeliest id is the text's.
        reverse_kl: KL(model || teacher), in nats a token; nan without a teacher, as all that follows.
        student_entropy: of the model's predictions, in nats.
        teacher_entropy: of the teacher's.
        teacher_label_mass: the teacher's mean probability of the text's token.
    """

    num_tokens: int
    cross_entropy: float
    kl: float
    agreement: float
    accuracy: float
    reverse_kl: float = math.nan
    student_entropy: float = math.nan
    teacher_entropy: float = math.nan
    teacher_label_mass: float = math.nan

    @property
    def perplexity(self) -> float:
        """e to the cross entropy."""
        try:
            return math.exp(self.cross_entropy)
        except OverflowError:  # above e^709, where a float ends
            return math.inf

    def score(self, name: str, kd_ratio: float) -> float:
        """What the best student has least of: ``perplexity``, ``kl``, or ``objective``, the mixture that is trained."""
        if name == "objective":
            return (kd_ratio * self.kl if kd_ratio > 0 else 0.0) + (1 - kd_ratio) * self.cross_entropy
        return self.metrics()[name]

    def metrics(self) -> dict[str, float]:
        """By name, for tables and loggers."""
        means = asdict(self)
        del means["num_tokens"]
        return {"perplexity": self.perplexity, **means}


@torch.no_grad()
def evaluate_held_out(
    model: Callable[[Batch], DenseSignal],
    signal: Callable[[Batch], DenseSignal] | None,
    batches: Iterable[Batch],
    num_ids: int,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> HeldOut:
    """Run a model over held-out batches.

    Args:
        model: batch -> its distribution at each position.
        signal: batch -> the teacher's; None leaves out what needs a teacher.
        batches: the text.
        num_ids: ids that model and teacher share.
        reduce: adds up a tensor over all processes, each of which has a part of the text.

    Raises:
        ConfigError: no token has a label.
    """
    objective = Objective(kd_ratio=0.0, num_ids=num_ids)  # what is known of each token does not depend on the mixture
    names: list[str] = []
    sums = torch.zeros(())
    for batch in batches:
        loss = objective(model(batch), signal(batch) if signal else None, batch)
        names = list(loss.sums)
        num_tokens = torch.tensor(float(loss.num_tokens), dtype=torch.float64)
        sums = sums + torch.stack([*(value.cpu() for value in loss.sums.values()), num_tokens])
    sums = reduce(sums)
    if not names or sums[-1] == 0:
        remedy = "Raise max_eval_batches or look at the masking of the held-out data"
        raise ConfigError(Problem("eval_dataset", "0 tokens with a label", "at least one in its batches", remedy))
    means = dict(zip(names, (sums[:-1] / sums[-1]).tolist(), strict=True))
    means["kl"] = means.pop("forward_kl", math.nan)
    means.pop("divergence", None)
    return HeldOut(num_tokens=int(sums[-1]), agreement=means.pop("agreement", math.nan), **means)
