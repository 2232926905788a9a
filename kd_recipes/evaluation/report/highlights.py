"""The few figures of the best model that are read first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_recipes.evaluation.report.comparison import Tone, change_tone, leader_of, reference_of
from kd_recipes.evaluation.report.formats import count as count_of
from kd_recipes.evaluation.report.formats import (
    is_known,
    num_bytes,
    number,
    percent,
    ratio,
    share_interval,
    spread,
    times,
)
from kd_recipes.evaluation.results import Evaluation


@dataclass(frozen=True)
class Highlight:
    """One figure.

    Args:
        value: large, such as ``74%``.
        label: what it is of.
        note: what it was made of.
        tone: whether a difference shows, and which.
    """

    value: str
    label: str
    note: str
    tone: Tone = ""


def highlights(evaluation: Evaluation) -> Sequence[Highlight]:
    """Of the best model beside the reference: size, speed, quality, likeness; none where it is alone."""
    leader, reference = leader_of(evaluation), reference_of(evaluation)
    if leader is None:
        return []
    found = []
    size = ratio(leader.cost.num_bytes, reference.cost.num_bytes)
    if size is not None:
        note = f"{num_bytes(leader.cost.num_bytes)} of {num_bytes(reference.cost.num_bytes)}"
        found.append(Highlight(percent(size, 0), "of the size", note))
    speed = ratio(leader.cost.decode_tokens_per_second, reference.cost.decode_tokens_per_second)
    if speed is not None:
        note = f"{count_of(leader.cost.decode_tokens_per_second)} tokens a second"
        found.append(Highlight(times(speed), "as fast", note))
    kept = ratio(leader.text.accuracy.mean, reference.text.accuracy.mean)
    if kept is not None:
        note = f"{share_interval(leader.text.accuracy)} against {share_interval(reference.text.accuracy)}"
        found.append(Highlight(percent(kept, 0), "of the accuracy", note))
    change = leader.text.change
    if change is not None and is_known(change.mean):
        value = f"{number(change.mean, signed=True)}"
        found.append(Highlight(value, "bits per byte", f"{spread(change)}, paired", change_tone(change)))
    if is_known(leader.text.agreement.mean):
        note = "of tokens have the same first choice"
        found.append(Highlight(percent(leader.text.agreement.mean, 0), "agreement", note))
    return found
