"""What an evaluation found: the one thing that reports, comparisons and later evaluations read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kd_recipes.evaluation.cost import Cost
from kd_recipes.evaluation.diversity import Diversity
from kd_recipes.evaluation.uncertainty import Estimate


@dataclass(frozen=True)
class TextFigures:
    """A model on held-out text, at temperature 1; nan where it takes a reference and there is none.

    Args:
        num_tokens: that are predicted.
        num_bytes: of UTF-8 that they stand for.
        bits_per_byte: cross entropy with the text, over its bytes: comparable over tokenizers.
        cross_entropy: nats a token; its exponential is the perplexity.
        accuracy: share of tokens that are the model's likeliest.
        kl: KL(reference || model), nats a token.
        kl_median: over tokens.
        kl_p99: 99th percentile over tokens.
        agreement: share of tokens at which model and reference have the same likeliest id.
        entropy: of the model's predictions, nats.
        calibration_error: expected calibration error, over ``reliability``'s bins.
        reliability: of each bin of confidence: tokens, mean confidence, share that was right.
        change: bits a byte less the reference's on the same sequences; None for the reference itself.
        by_sequence: sums over each sequence's tokens, by name: ``num_tokens``, ``num_bytes``, ``cross_entropy``, …
    """

    num_tokens: int
    num_bytes: int
    bits_per_byte: Estimate
    cross_entropy: Estimate
    accuracy: Estimate
    kl: Estimate
    kl_median: float
    kl_p99: float
    agreement: Estimate
    entropy: float
    calibration_error: float
    reliability: Sequence[tuple[int, float, float]]
    change: Estimate | None = None
    by_sequence: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskFigures:
    """A model on one task.

    Args:
        num_items: questions, or documents.
        metrics: by name, such as ``acc``, ``acc_norm``.
        correct: of each item, whether it was right, by the task's first metric that says so; empty where none does.
        choices: of each item, the index of the choice taken; empty where there are none.
        changed: of two models, the reference first: both right, only the reference, only this one, neither.
        p_value: of the change in accuracy, exact McNemar; None for the reference.
    """

    num_items: int
    metrics: Mapping[str, Estimate]
    correct: Sequence[bool] = ()
    choices: Sequence[int] = ()
    changed: tuple[int, int, int, int] | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Sample:
    """What a model makes of a prompt; ``text`` is greedy, ``drawn`` at temperature 1."""

    prompt: str
    text: str
    drawn: str


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Args:
        name: as in the config.
        directory: of its checkpoint.
        description: its architecture and lineage in a line, such as ``20 blocks, 576 wide, int4_g32``.
        cost: what it takes to run it.
        text: on held-out text.
        tasks: by name.
        samples: a prompt each.
        diversity: of what it says, drawn at temperature 1; None without prompts.
    """

    name: str
    directory: str
    description: str
    cost: Cost
    text: TextFigures
    tasks: Mapping[str, TaskFigures] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    diversity: Diversity | None = None

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> ModelResult:
        """What :func:`dataclasses.asdict` made of one."""
        text, diversity = obj["text"], obj["diversity"]
        intervals = ("bits_per_byte", "cross_entropy", "accuracy", "kl", "agreement", "change")
        parts = {
            "cost": Cost(**obj["cost"]),
            "text": TextFigures(**{**text, **{name: _estimate(text[name]) for name in intervals}}),
            "tasks": {name: _task(task) for name, task in obj["tasks"].items()},
            "samples": [Sample(**sample) for sample in obj["samples"]],
            "diversity": diversity and Diversity(**diversity),
        }
        return cls(**{**obj, **parts})


@dataclass(frozen=True)
class Evaluation:
    """All of it.

    Args:
        models: in the order of the config.
        reference: name of the model that the others are measured against.
        runs: name of a model -> what the distillation that made it recorded (kd_recipes.history), where it did:
            ``{"train": [[step, {name: value}], …], "held_out": …, "alerts": [{…}], "config": {…}}``.
        made_by: config, versions, seed, hashes of the data, hardware, date: what it takes to do it again.
    """

    models: Sequence[ModelResult]
    reference: str
    runs: Mapping[str, Any] = field(default_factory=dict)
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain objects."""
        return asdict(self)


def _task(obj: Mapping[str, Any]) -> TaskFigures:
    return TaskFigures(**{**obj, "metrics": {name: _estimate(metric) for name, metric in obj["metrics"].items()}})


def _estimate(obj: Mapping[str, float] | None) -> Any:
    return obj and Estimate(**obj)
