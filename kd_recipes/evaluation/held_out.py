"""How good a student is on text that it was not trained on, in the terms that compare across runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from kd_recipes.batch import Batch
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.evaluation.calibration import Reliability
from kd_recipes.evaluation.tokens import teacher_names, token_values
from kd_recipes.signals import DenseSignal, Signal


@dataclass(frozen=True)
class HeldOut:
    """Means over the tokens of held-out text, at temperature 1.

    Args:
        num_tokens: how many tokens the means are over.
        cross_entropy: of the model with the text, in nats a token.
        accuracy: share of tokens at which the model's likeliest id is the text's.
        student_entropy: of the model's predictions, in nats.
        calibration_error: expected calibration error of the model's confidence.
        kl: KL(teacher || model), in nats a token; nan without a teacher, as all that follows.
        reverse_kl: KL(model || teacher), in nats a token.
        agreement: share of tokens at which teacher and model have the same likeliest id.
        teacher_cross_entropy: of the teacher with the text.
        teacher_accuracy: its own.
        teacher_entropy: of its predictions.
        teacher_calibration_error: of its confidence.
        teachers: of each teacher of a mixture ``teacher_<name>/cross_entropy``, ``…/kl`` to the model, ``…/weight``.
    """

    num_tokens: int
    cross_entropy: float
    accuracy: float
    student_entropy: float
    calibration_error: float
    kl: float = math.nan
    reverse_kl: float = math.nan
    agreement: float = math.nan
    teacher_cross_entropy: float = math.nan
    teacher_accuracy: float = math.nan
    teacher_entropy: float = math.nan
    teacher_calibration_error: float = math.nan
    teachers: Mapping[str, float] = field(default_factory=dict)

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
        del means["num_tokens"], means["teachers"]
        return {"perplexity": self.perplexity, **means, **self.teachers}


def evaluate_held_out(
    model: Callable[[Batch], DenseSignal],
    signal: Callable[[Batch], Signal] | None,
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
    sums = dict.fromkeys(_ALONE if signal is None else (*_ALONE, *_BESIDE), 0.0)
    of_teachers: dict[str, float] = {}
    num_tokens = 0
    reliabilities = {"": Reliability(), "reference_": Reliability()}
    with torch.no_grad():
        for batch in batches:
            reference = signal(batch) if signal else None
            of_teachers = of_teachers or dict.fromkeys(teacher_names(reference), 0.0)
            tokens = token_values(model(batch), reference, batch, num_ids=num_ids)
            if not tokens.values:  # every label of the batch is masked
                continue
            num_tokens += len(tokens.labels_N)
            for part in (sums, of_teachers):
                for name in part:
                    part[name] += float(tokens.values[name].double().sum())
            for prefix, reliability in reliabilities.items():
                if f"{prefix}confidence" in tokens.values:
                    reliability.add(tokens.values[f"{prefix}confidence"], tokens.values[f"{prefix}accuracy"])
    counted = [r.sums_3B.flatten() for r in reliabilities.values()]
    added = [num_tokens, *sums.values(), *of_teachers.values()]
    flat = reduce(torch.cat([torch.tensor(added, dtype=torch.float64), *counted]))
    total, means = flat[0], (flat[1 : len(added)] / flat[0]).tolist()
    if total == 0:
        remedy = "Raise max_eval_batches or look at the masking of the held-out data"
        raise ConfigError(Problem("eval_dataset", "0 tokens with a label", "at least one in its batches", remedy))
    mine, theirs = (Reliability(part) for part in flat[len(added) :].view(2, *counted[0].view(3, -1).shape))
    return HeldOut(
        num_tokens=int(total),
        calibration_error=mine.expected_calibration_error,
        teacher_calibration_error=theirs.expected_calibration_error,
        teachers=dict(zip(of_teachers, means[len(sums) :], strict=True)),
        **{_FIELDS.get(name, name): mean for name, mean in zip(sums, means[: len(sums)], strict=True)},
    )


_ALONE = ("cross_entropy", "accuracy", "entropy")
_BESIDE = ("kl", "reverse_kl", "agreement", *(f"reference_{name}" for name in _ALONE))
_FIELDS = {"entropy": "student_entropy", **{f"reference_{name}": f"teacher_{name}" for name in _ALONE}}
