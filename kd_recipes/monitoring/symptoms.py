"""What is measured of a student at an evaluation, and what of it is a symptom of too much distillation.

A symptom is a row of :data:`SYMPTOMS`: a value, a limit against the teacher's own value or against the best that the
student had, what a user is told, and what can be done. A new one is a new row, and its limit a setting of ``Health``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from kd_recipes.monitoring.health import Health


@dataclass(frozen=True)
class Vitals:
    """One evaluation; nan for what was not measured. Where the teacher has a value of its own, it stands beside.

    Args:
        held_out_kl: KL(teacher || student) on held-out text, nats a token.
        train_kl: on the training text, mean over the steps since the last evaluation, at temperature 1.
        cross_entropy: with held-out text that people wrote, nats a token.
        agreement: share of held-out tokens at which student and teacher have the same likeliest id.
        entropy: of the student's predictions on held-out text, nats.
        calibration_error: expected calibration error on held-out text.
        distinct_2: of the texts made from the prompts, the share of pairs of tokens that are distinct.
        repetition_4: share of sequences of four tokens that occurred in the same text before.
        self_bleu: likeness of each text to the others, of 100.
        commonest_opening: share of the texts that begin with the commonest opening.
        mean_length: tokens of a text, up to ``max_new_tokens``.
        ended_share: share of the texts that came to an end by themselves.
        exposure_short: ExAccErr at a short length, in percent.
        exposure_long: at a long one.
    """

    held_out_kl: float = math.nan
    train_kl: float = math.nan
    cross_entropy: float = math.nan
    agreement: float = math.nan
    entropy: float = math.nan
    teacher_entropy: float = math.nan
    calibration_error: float = math.nan
    teacher_calibration_error: float = math.nan
    distinct_2: float = math.nan
    teacher_distinct_2: float = math.nan
    repetition_4: float = math.nan
    teacher_repetition_4: float = math.nan
    self_bleu: float = math.nan
    teacher_self_bleu: float = math.nan
    commonest_opening: float = math.nan
    teacher_commonest_opening: float = math.nan
    mean_length: float = math.nan
    teacher_mean_length: float = math.nan
    ended_share: float = math.nan
    teacher_ended_share: float = math.nan
    exposure_short: float = math.nan
    exposure_long: float = math.nan

    @classmethod
    def of(cls, values: Mapping[str, Any], teacher: Mapping[str, Any] | None = None) -> Vitals:
        """From numbers by name; what has another name is left out, and what is not finite, or None, is nan.

        Args:
            values: the student's, and what is of both.
            teacher: its own, under the same names as the student's.
        """
        named = {**values, **{f"teacher_{name}": value for name, value in (teacher or {}).items()}}
        measured = {field.name: named.get(field.name) for field in fields(cls)}
        return cls(**{name: value for name, value in measured.items() if value is not None and math.isfinite(value)})


Past = Sequence[tuple[int, Vitals]]  # evaluations and their steps, the present one last
_NUM_ERRORS = 3.0  # standard errors: in 200 simulated runs of 12 evaluations 2 gave three false alarms, 3 none


@dataclass(frozen=True)
class Reading:
    """A symptom at an evaluation; nan is not measured.

    Args:
        value: of the student.
        limit: that it should not be beyond.
        reference: what the limit was made of: the teacher's value, or the best of the student's.
        step: that the reference is of.
        then: what was measured at that step.
    """

    value: float
    limit: float
    reference: float = math.nan
    step: int = 0
    then: Vitals = Vitals()


@dataclass(frozen=True)
class Symptom:
    """One row.

    Args:
        name: of its value.
        setting: of ``Health``: its limit.
        read: (settings, limit, evaluations) -> reading.
        seen: what a user is told; a format of the reading and ``now``.
        remedy: what to change in the config.
        is_above: whether it is a value above the limit that is one; else a value below.
    """

    name: str
    setting: str
    read: Callable[[Health, float, Past], Reading]
    seen: str
    remedy: str
    is_above: bool = True

    def at(self, health: Health, past: Past) -> Reading:
        """The reading at the last of these evaluations; its limit is nan where the setting is null."""
        limit = getattr(health, self.setting)
        return self.read(health, math.nan if limit is None else float(limit), past)

    def excess(self, value: float, limit: float) -> float:
        """How far a value is beyond a limit; nan where one of them is."""
        return value - limit if self.is_above else limit - value

    def describe(self, reading: Reading, now: Vitals) -> str:
        """What a user is told."""
        return self.seen.format(now=now, **vars(reading))


def _kl_gap(health: Health, limit: float, past: Past) -> Reading:
    now = past[-1][1]
    kls = now.held_out_kl, now.train_kl
    # a floor under both, and not a condition on both: text learnt by heart has a training KL of nearly nothing
    held_out, train = (math.nan if kl != kl else max(kl, health.kl_floor) for kl in kls)
    return Reading(held_out / train, limit, train)


def _teacher_hacking(_: Health, limit: float, past: Past) -> Reading:
    step, then = min(past, key=lambda at: _or_inf(at[1].cross_entropy))
    now = past[-1][1]
    rise = _ratio(now.cross_entropy, then.cross_entropy) - 1
    change = now.held_out_kl - then.held_out_kl  # which is nan where it is not known
    value = 0.0 if change >= 0 else rise if change < 0 else math.nan
    return Reading(value, limit, then.cross_entropy, step, then)


def _agreement(_: Health, limit: float, past: Past) -> Reading:
    step, then = min(past, key=lambda at: _or_inf(-at[1].agreement))
    return Reading(past[-1][1].agreement, then.agreement - limit, then.agreement, step, then)


def _entropy_ratio(_: Health, limit: float, past: Past) -> Reading:
    now = past[-1][1]
    return Reading(_ratio(now.entropy, now.teacher_entropy), limit, now.teacher_entropy)


def _calibration(_: Health, limit: float, past: Past) -> Reading:
    now = past[-1][1]
    return Reading(now.calibration_error, now.teacher_calibration_error + limit, now.teacher_calibration_error)


def _times_teacher(name: str, floor: str | None = None) -> Callable[[Health, float, Past], Reading]:
    """A value that is limited to a multiple of the teacher's, but not to less than the setting named ``floor``."""

    def read(health: Health, limit: float, past: Past) -> Reading:
        value, teacher = _both(past[-1][1], name)
        least = getattr(health, floor) if floor else -math.inf
        bound = limit * teacher
        return Reading(value, bound if not bound < least else least, teacher)

    return read


def _mean_length(sign: int) -> Callable[[Health, float, Past], Reading]:
    """The mean length, which may be so much of the teacher's above (1) or below it (-1).

    Texts are cut at ``max_new_tokens``: where few come to an end, their length says nothing.
    """

    def read(health: Health, limit: float, past: Past) -> Reading:
        now = past[-1][1]
        share = now.teacher_ended_share if sign > 0 else max(now.ended_share, now.teacher_ended_share)
        is_enough = share * health.num_prompts >= health.min_ended_texts
        bound = (1 + sign * limit) * now.teacher_mean_length
        return Reading(now.mean_length if is_enough else math.nan, bound, now.teacher_mean_length)

    return read


def _ended_share(sign: int) -> Callable[[Health, float, Past], Reading]:
    """The share of texts that end, which may differ by so much of the teacher's, and by what chance makes of so few.

    The teacher's share is measured once: where chance has put it far off, it stays there, and two evaluations in a row
    are no protection.
    """

    def read(health: Health, limit: float, past: Past) -> Reading:
        value, teacher = _both(past[-1][1], "ended_share")
        mean = (value + teacher) / 2
        chance = _NUM_ERRORS * math.sqrt(2 * max(mean * (1 - mean), 0.0) / health.num_prompts)
        change = limit * teacher
        return Reading(value, teacher + sign * (chance if change < chance else change), teacher)

    return read


def _exposure_growth(_: Health, limit: float, past: Past) -> Reading:
    now = past[-1][1]
    return Reading(now.exposure_long - now.exposure_short, limit, now.exposure_short)


def _both(now: Vitals, name: str) -> tuple[float, float]:
    return getattr(now, name), getattr(now, f"teacher_{name}")


def _or_inf(value: float) -> float:
    return value if value == value else math.inf


def _ratio(value: float, reference: float) -> float:
    return value / reference if reference else math.nan


_DIVERSITY = "lower kd_ratio or raise temperature, train on more varied text or for fewer steps"
_ENDINGS = "look whether the training text has end-of-text tokens with a label, and at the data's mix of lengths"

SYMPTOMS = (
    Symptom(
        "kl_gap",
        "max_kl_gap",
        _kl_gap,
        "KL to the teacher is {now.held_out_kl:.3g} nats a token on held-out text and {reference:.3g} on the "
        "training text, {value:.2f} times as much (limit {limit:.3g}): the student learns its text by heart",
        "train on more text, lower epochs or max_steps, or lower optimizer.lr",
    ),
    Symptom(
        "teacher_hacking",
        "max_cross_entropy_rise",
        _teacher_hacking,
        "KL to the teacher falls ({then.held_out_kl:.3g} -> {now.held_out_kl:.3g}) while the loss on human text rose "
        "{value:.1%} above its best, {reference:.3g} at step {step} (limit {limit:.1%}): the student imitates the "
        "teacher's mistakes (arXiv 2502.02671)",
        "lower kd_ratio, so that the labels say more, or stop earlier; best_metric: perplexity keeps the student that "
        "was best on human text",
    ),
    Symptom(
        "agreement",
        "max_agreement_drop",
        _agreement,
        "student and teacher have the same likeliest token at {value:.1%} of held-out positions, down from "
        "{reference:.1%} at step {step} (limit {limit:.1%}): the student forgets what it had learnt of the teacher",
        "lower optimizer.lr or let lr_scheduler end lower, or stop earlier; raise kd_ratio if labels are the reason",
        is_above=False,
    ),
    Symptom(
        "entropy_ratio",
        "min_entropy_ratio",
        _entropy_ratio,
        "the student's predictions have {value:.2f} times the teacher's entropy (limit {limit:.3g}): it is surer than "
        "what it learns from, and will say the same again and again",
        "raise temperature, lower kd_ratio if kd_loss is a reverse divergence (or take ForwardKL), or train shorter",
        is_above=False,
    ),
    Symptom(
        "entropy_ratio",
        "max_entropy_ratio",
        _entropy_ratio,
        "the student's predictions have {value:.2f} times the teacher's entropy (limit {limit:.3g}): it spreads its "
        "probability over words that the teacher would not say",
        "lower temperature or label_smoothing, train longer, or take a reverse or skewed kd_loss",
    ),
    Symptom(
        "calibration_error",
        "max_calibration_excess",
        _calibration,
        "the student's confidence is off by {value:.3f} on average, the teacher's by {reference:.3f} (limit "
        "{limit:.3f})",
        "raise label_smoothing or temperature, raise kd_ratio if it is low, or train shorter",
    ),
    Symptom(
        "distinct_2",
        "min_distinct_2",
        _times_teacher("distinct_2"),
        "{value:.1%} of the pairs of tokens in the student's texts are distinct, {reference:.1%} in the teacher's "
        "(limit {limit:.1%})",
        _DIVERSITY,
        is_above=False,
    ),
    Symptom(
        "repetition_4",
        "max_repetition_4",
        _times_teacher("repetition_4", "repetition_4_floor"),
        "{value:.1%} of the sequences of four tokens in the student's texts repeat an earlier one, {reference:.1%} in "
        "the teacher's (limit {limit:.1%}): it goes round in circles",
        _DIVERSITY,
    ),
    Symptom(
        "self_bleu",
        "max_self_bleu",
        _times_teacher("self_bleu", "self_bleu_floor"),
        "the student's texts are alike: self-BLEU {value:.1f}, the teacher's {reference:.1f} (limit {limit:.1f})",
        _DIVERSITY,
    ),
    Symptom(
        "commonest_opening",
        "max_commonest_opening",
        _times_teacher("commonest_opening", "commonest_opening_floor"),
        "{value:.0%} of the student's texts begin with the same words, {reference:.0%} of the teacher's (limit "
        "{limit:.0%}): it answers in templates",
        f"{_DIVERSITY}; look for templates in the training text",
    ),
    Symptom(
        "mean_length",
        "max_length_change",
        _mean_length(1),
        "the student's texts have {value:.0f} tokens on average, the teacher's {reference:.0f} (limit {limit:.0f})",
        _ENDINGS,
    ),
    Symptom(
        "mean_length",
        "max_length_change",
        _mean_length(-1),
        "the student's texts have {value:.0f} tokens on average, the teacher's {reference:.0f} (limit {limit:.0f})",
        _ENDINGS,
        is_above=False,
    ),
    Symptom(
        "ended_share",
        "max_ended_change",
        _ended_share(1),
        "{value:.0%} of the student's texts come to an end, {reference:.0%} of the teacher's (limit {limit:.0%})",
        _ENDINGS,
    ),
    Symptom(
        "ended_share",
        "max_ended_change",
        _ended_share(-1),
        "{value:.0%} of the student's texts come to an end, {reference:.0%} of the teacher's (limit {limit:.0%})",
        _ENDINGS,
        is_above=False,
    ),
    Symptom(
        "exposure_growth",
        "max_exposure_growth",
        _exposure_growth,
        "errors add up in the student's own text: at the end they are {now.exposure_long:.0f}% more than on the "
        "teacher's, {now.exposure_short:.0f}% at first (ExAccErr; limit {limit:.0f} points more)",
        "distil on text that the student makes itself, take a reverse or skewed kd_loss, or train shorter",
    ),
)
