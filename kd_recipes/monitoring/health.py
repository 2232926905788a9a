"""The settings of over-distillation being noticed: what is measured, the limits, and what is done about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from kd_recipes.errors import ConfigError, Problem

Action = Literal["warn", "stop", "restore_best", "anneal_kd_ratio", "raise_temperature"]

_COUNTS = (
    "persistence",
    "max_restores",
    "every_n_evaluations",
    "num_prompts",
    "prompt_length",
    "max_new_tokens",
    "min_ended_texts",
)
_SHARES = ("min_distinct_2", "max_agreement_drop", "max_length_change", "max_ended_change", "kd_ratio_factor")
_RANGES = {**dict.fromkeys(_SHARES, (0.0, 1.0)), "temperature_factor": (1.0, math.inf)}


@dataclass(frozen=True)
class Health:
    """The ``health:`` section. A limit that is null is not watched.

    Args:
        action: at an alert, besides the warning: ``stop``; ``restore_best``, go on from the best student;
            ``anneal_kd_ratio`` or ``raise_temperature``, by the factors below.
        max_restores: of ``restore_best``; the alert after the last of them stops the run.
        persistence: evaluations in a row beyond a limit before it is an alert.
        every_n_evaluations: how often texts are generated, which costs more than the rest.
        num_prompts: that teacher and student continue.
        prompt_length: tokens of each.
        max_new_tokens: of each continuation.
        max_kl_gap: held-out KL to the teacher, over that on the training text.
        kl_floor: nats a token below which a KL counts as this much, since there noise makes ratios.
        max_cross_entropy_rise: of the loss on human text above its best, while the KL to the teacher falls: teacher
            hacking (arXiv 2502.02671).
        max_agreement_drop: of the share of tokens with the teacher's likeliest id, below its best.
        min_entropy_ratio: of the student's predictions to the teacher's.
        max_entropy_ratio: likewise.
        max_calibration_excess: expected calibration error above the teacher's.
        min_distinct_2: share of distinct pairs of tokens, over the teacher's.
        max_repetition_4: share of four tokens that occurred before, over the teacher's,
        repetition_4_floor: and at least.
        max_self_bleu: likeness of the texts to each other, over the teacher's,
        self_bleu_floor: and at least; of 100.
        max_commonest_opening: share of the texts that begin alike, over the teacher's,
        commonest_opening_floor: and at least.
        max_length_change: of the mean length of a text, either way, as a share of the teacher's.
        min_ended_texts: of student or teacher that have to come to an end before their length means something.
        max_ended_change: of the share of texts that come to an end, likewise, where that is more than chance.
        max_exposure_growth: percentage points by which the excess of accumulated error (ExAccErr, arXiv 2204.01171)
            grows from short to long texts; the paper finds some 60 from the first to the 500th token of GPT-2.
        kd_ratio_factor: of ``anneal_kd_ratio``, at each alert.
        temperature_factor: of ``raise_temperature``, at each alert.

    Raises:
        ConfigError: values out of range, all of them together.
    """

    action: Action = "warn"
    max_restores: int = 3
    persistence: int = 2
    every_n_evaluations: int = 1
    num_prompts: int = 16
    prompt_length: int = 16
    max_new_tokens: int = 96
    max_kl_gap: float | None = 1.5
    kl_floor: float = 0.02
    max_cross_entropy_rise: float | None = 0.02
    max_agreement_drop: float | None = 0.03
    min_entropy_ratio: float | None = 0.7
    max_entropy_ratio: float | None = 1.5
    max_calibration_excess: float | None = 0.05
    min_distinct_2: float | None = 0.85
    max_repetition_4: float | None = 2.0
    repetition_4_floor: float = 0.1
    max_self_bleu: float | None = 1.5
    self_bleu_floor: float = 10.0
    max_commonest_opening: float | None = 2.0
    commonest_opening_floor: float = 0.2
    max_length_change: float | None = 0.5
    min_ended_texts: int = 8
    max_ended_change: float | None = 0.5
    max_exposure_growth: float | None = 50.0
    kd_ratio_factor: float = 0.5
    temperature_factor: float = 1.5

    def __post_init__(self) -> None:
        if problems := [*self._problems()]:
            raise ConfigError(*problems)

    def _problems(self) -> Iterator[Problem]:
        if self.action not in get_args(Action):
            yield Problem(".action", self.action, f"one of {', '.join(get_args(Action))}")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                yield Problem(f".{name}", value, "a whole number above 0")
        for name, value in vars(self).items():
            if name == "action" or name in _COUNTS or (value is None and name.startswith(("min_", "max_"))):
                continue
            least, most = _RANGES.get(name, (0.0, math.inf))
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not least < value < most:
                yield Problem(
                    f".{name}", value, f"a number above {least:g}" + f" and below {most:g}" * (most < math.inf)
                )
