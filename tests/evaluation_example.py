"""An evaluation as a user has it: SmolLM2-135M, pruned, distilled, quantized, and trained on labels alone."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kd_recipes.evaluation.cost import Cost
from kd_recipes.evaluation.diversity import Diversity
from kd_recipes.evaluation.measure import change
from kd_recipes.evaluation.results import Evaluation, ModelResult, Sample, TaskFigures, TextFigures
from kd_recipes.evaluation.uncertainty import Estimate, ratio_with_interval

_NUM_SEQUENCES, _NUM_TOKENS, _NUM_BYTES = 60, 100, 460  # the last two of each sequence
UNKNOWN = Estimate(math.nan, math.nan, math.nan, math.nan)

_PROMPTS = ("The Amazon rainforest is", "In 1969, the first people", "A bicycle has\ntwo wheels,", "Photosynthesis")
_SAMPLES = {
    "teacher": "home to an incredible array of unique and diverse plant species, including trees, flowers, and other "
    "plants that are adapted to different environments. This diversity is reflected in",
    "pruned": "a vast, ancient, the world's deadliest. The world has been a place of the universe. The universe has "
    "been a place. The universe has",
    "distilled": "a vast, ancient, and ancient ecosystem that has been lost to the world. The Amazon rainforest is a "
    "vast, ancient, and ancient ecosystem that has been lost",
    "int4": "home to an incredible array of plants and animals, including jaguars, sloths and over 1,300 birds.\n\nIt "
    "is the largest tropical rainforest in the world, covering 5.5 million square kilometers",
    "labels_only": "a region of the Amazon Basin, and is a part of the Amazon Basin. It is the second largest in the "
    "Amazon Basin, and",
}
_ALERTS = (
    {
        "signal": "kl_gap",
        "step": 25,
        "value": 1.61,
        "limit": 1.5,
        "reference": 0.66,
        "since_step": 20,
        "message": "KL to the teacher is 1.06 nats a token on held-out text and 0.66 on the training text, 1.61 times "
        "as much (limit 1.5): the student learns its text by heart",
        "remedy": "train on more text, lower epochs or max_steps, or lower optimizer.lr",
    },
    {
        "signal": "repetition_4",
        "step": 30,
        "value": 0.21,
        "limit": 0.1,
        "reference": 0.011,
        "since_step": 25,
        "message": "21.0% of the sequences of four words in the student's texts repeat an earlier one, 1.1% in the "
        "teacher's (limit 10.0%): it goes round in circles",
        "remedy": "lower kd_ratio or raise temperature, train on more varied text or for fewer steps",
    },
)


@dataclass(frozen=True)
class Spec:
    """What a model of the example is.

    Args:
        description: of its architecture.
        cost: of running it.
        bits: a byte.
        accuracy: share of tokens.
        kl: to the teacher, nats a token.
        overconfidence: by which confidence is above accuracy at most.
        diversity: of what it says.
        tasks: share of right answers, only the teacher right, only this model; of two tasks, with McNemar's p.
    """

    description: str
    cost: Cost
    bits: float
    accuracy: float
    kl: float
    overconfidence: float
    diversity: Diversity
    tasks: Sequence[tuple[float, int, int, float]]


_WHOLE = "30 blocks, 576 wide, 1536 neurons, 9/3 heads"
_TWO_THIRDS = "20 blocks, 576 wide, 1536 neurons, 9/3 heads"
SPECS = {
    "teacher": Spec(
        _WHOLE,
        Cost(134_515_008, 269_030_016, 688_000_000, 412.0, 18.1),
        *(0.879, 0.436, 0.0, 0.02),
        Diversity(0.944, 0.011, 4.4, 0.0625, 91.0, 0.12, "The first thing"),
        [(0.551, 0, 0, 1.0), (0.431, 0, 0, 1.0)],
    ),
    "pruned": Spec(
        _TWO_THIRDS,
        Cost(99_117_504, 198_235_008, 521_000_000, 598.0, 26.4),
        *(1.440, 0.230, 1.946, 0.16),
        Diversity(0.870, 0.094, 7.9, 0.125, 96.0, 0.0, "The world is"),
        [(0.401, 437, 144, 1e-35), (0.312, 490, 222, 1e-24)],
    ),
    "distilled": Spec(
        _TWO_THIRDS,
        Cost(99_117_504, 198_235_008, 522_000_000, 601.0, 26.1),
        *(1.083, 0.350, 1.058, 0.05),
        Diversity(0.921, 0.031, 5.1, 0.125, 93.0, 0.06, "It is a"),
        [(0.498, 277, 173, 1.1e-6), (0.417, 270, 238, 0.168)],
    ),
    "int4": Spec(
        f"{_WHOLE}, int4_g32",
        Cost(134_515_008, 89_800_000, 301_000_000, 377.0, 22.6),
        *(0.860, 0.441, 0.071, 0.03),
        Diversity(0.941, 0.013, 4.6, 0.0625, 90.0, 0.12, "The first step"),
        [(0.546, 67, 57, 0.42), (0.428, 40, 33, 0.48)],
    ),
    "labels_only": Spec(
        _TWO_THIRDS,
        Cost(99_117_504, 198_235_008, 521_000_000, 597.0, 26.3),
        *(1.090, 0.345, 1.300, 0.09),
        Diversity(0.902, 0.044, 6.8, 0.1875, 95.0, 0.0, "The Amazon Basin"),
        [(0.489, 307, 185, 4e-8), (0.405, 290, 231, 0.011)],
    ),
}
_NUM_ITEMS = {"social_iqa": 1954, "step_inference": 2250}


def example() -> Evaluation:
    """Five models, two runs, two alerts."""
    teacher = text(SPECS["teacher"], "teacher")
    models = [_model(name, spec, teacher) for name, spec in SPECS.items()]
    runs = {
        "distilled": run(0.5, (4.6, 3.40), (1.95, 0.98), _ALERTS),
        "labels_only": run(0.0, (4.6, 3.43), (1.95, 1.25)),
    }
    made_by = {
        "date": "2026-11-24T22:35:00+00:00",
        "seed": 0,
        "data": {"held-out text, SHA-256 of its ids": "3f1c0b…"},
        "hardware": {"system": "Linux-6.1-x86_64", "cpu": "AMD EPYC", "cores": 2, "threads": 2},
        "versions": {"kd-recipes": "0.4.0", "torch": "2.13.0", "torchtune": "0.6.1"},
        "config": {"models": {model.name: model.directory for model in models}, "dataset": {"split": "train[60:]"}},
    }
    return Evaluation(models, "teacher", runs, made_by)


def many_models(number: int) -> Evaluation:
    """Of a sweep: a teacher, and students of many widths."""
    evaluation = example()
    teacher, student = evaluation.models[0], evaluation.models[2]
    drawn = random.Random(0)
    students = []
    for index in range(number - 1):
        share = 0.3 + 0.6 * index / number
        spec = replace(
            SPECS["distilled"],
            bits=0.879 + 0.5 * (1 - share) + 0.05 * drawn.random(),
            cost=replace(student.cost, num_bytes=int(269e6 * share), decode_tokens_per_second=18.1 / share),
            overconfidence=0.2 * drawn.random(),
        )
        name = f"width_{index:02d}_of_{number}"
        figures = text(spec, name)
        figures = replace(figures, change=change(figures, teacher.text))
        students.append(replace(student, name=name, cost=spec.cost, text=figures))
    return replace(evaluation, models=[teacher, *students], runs={})


def text(spec: Spec, name: str) -> TextFigures:
    """Figures of sequences whose difficulty is the same for all models, and a little of each model's own."""
    shared, own = random.Random("text"), random.Random(name)
    nats = [
        math.log(2) * _NUM_BYTES * spec.bits * (1 + 0.12 * shared.gauss(0, 1) + 0.010 * own.gauss(0, 1))
        for _ in range(_NUM_SEQUENCES)
    ]
    total = math.log(2) * _NUM_BYTES * _NUM_SEQUENCES * spec.bits
    sums = {
        "num_tokens": [float(_NUM_TOKENS)] * _NUM_SEQUENCES,
        "num_bytes": [float(_NUM_BYTES)] * _NUM_SEQUENCES,
        "cross_entropy": [value * total / sum(nats) for value in nats],
    }
    columns = {key: torch.tensor(column, dtype=torch.float64) for key, column in sums.items()}
    bins = _reliability(spec.overconfidence)
    num_tokens = _NUM_SEQUENCES * _NUM_TOKENS
    return TextFigures(
        num_tokens=num_tokens,
        num_bytes=_NUM_SEQUENCES * _NUM_BYTES,
        bits_per_byte=ratio_with_interval(columns["cross_entropy"] / math.log(2), columns["num_bytes"]),
        cross_entropy=ratio_with_interval(columns["cross_entropy"], columns["num_tokens"]),
        accuracy=estimate(spec.accuracy, 0.0062),
        kl=estimate(spec.kl, 0.01 * spec.kl),
        kl_median=0.62 * spec.kl,
        kl_p99=5.9 * spec.kl,
        agreement=estimate(math.exp(-0.62 * spec.kl), 0.006 * min(1.0, spec.kl)),
        entropy=2.7,
        calibration_error=sum(tokens * abs(said - right) for tokens, said, right in bins) / num_tokens,
        reliability=bins,
        by_sequence=sums,
    )


def _reliability(overconfidence: float) -> list[tuple[int, float, float]]:
    counts = [2050, 1050, 710, 510, 390, 320, 280, 230, 220, 240]
    middles = [(index + 0.5) / len(counts) for index in range(len(counts))]
    return [
        (tokens, middle, middle - overconfidence * math.sin(math.pi * middle))
        for tokens, middle in zip(counts, middles, strict=True)
    ]


def estimate(mean: float, error: float) -> Estimate:
    """With a 95% interval."""
    return Estimate(mean, error, mean - 1.96 * error, mean + 1.96 * error)


def run(
    kd_ratio: float,
    losses: tuple[float, float],
    kls: tuple[float, float],
    alerts: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """30 steps from the first to the second figure, evaluated at every fifth."""
    noise = random.Random(kd_ratio)

    def at(step: int, ends: tuple[float, float]) -> float:
        return ends[1] + (ends[0] - ends[1]) * math.exp(-step / 7)

    train, held_out = [], []
    for step in range(1, 31):
        loss, kl = (at(step, ends) * (1 + 0.03 * noise.gauss(0, 1)) for ends in (losses, kls))
        tags = {"loss/total": loss, "loss/cross_entropy": loss, "kd/forward_kl": kl, "time/step": 4.1}
        if kd_ratio > 0:  # labels alone ask no teacher in a step
            tags["kd/teacher_cross_entropy"] = 2.9
        train.append([step, tags])
    for step in range(0, 31, 5):
        held_out.append(
            [
                step,
                {
                    "cross_entropy": 1.02 * at(step, losses),
                    "kl": 1.04 * at(step, kls),
                    "agreement": None,
                    "teacher_cross_entropy": 3.0,
                },
            ]
        )
    config = {"kd_ratio": kd_ratio, "temperature": 1.0, "max_steps": 30, "optimizer": {"lr": 2e-3}}
    return {"train": train, "held_out": held_out, "health": [], "alerts": list(alerts), "config": config}


def _model(name: str, spec: Spec, teacher: TextFigures) -> ModelResult:
    figures = text(spec, name)
    is_teacher = name == "teacher"
    words = _SAMPLES[name].split(" ")
    samples = [
        Sample(prompt, " " + " ".join(words[index:]), " " + " ".join(reversed(words)))
        for index, prompt in enumerate(_PROMPTS)
    ]
    return ModelResult(
        name,
        f"runs/quickstart/{name}",
        spec.description,
        spec.cost,
        figures if is_teacher else replace(figures, change=change(figures, teacher)),
        {
            task: _task(num_items, *found, is_reference=is_teacher)
            for (task, num_items), found in zip(_NUM_ITEMS.items(), spec.tasks, strict=True)
        },
        samples,
        spec.diversity,
    )


def _task(num_items: int, share: float, lost: int, won: int, p: float, *, is_reference: bool) -> TaskFigures:
    error = math.sqrt(share * (1 - share) / num_items)
    both = round(share * num_items) - won
    return TaskFigures(
        num_items,
        {"acc_norm": estimate(share, error), "acc": estimate(share - 0.02, error)},
        changed=None if is_reference else (both, lost, won, num_items - both - lost - won),
        p_value=None if is_reference else p,
    )
