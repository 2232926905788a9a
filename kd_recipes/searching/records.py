"""What is known of each trial in the end, and the table that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["complete", "pruned", "failed"]
METRICS = ("perplexity", "kl", "cross_entropy", "objective")
_NEED_TEACHER = ("kl", "objective")


@dataclass(frozen=True)
class Metric:
    """What trials are compared by: the less, the better.

    Args:
        name: one of ``METRICS``.
        kd_ratio: of the mixture that ``objective`` is, as at the end of a run.
    """

    name: str
    kd_ratio: float = 0.0

    @property
    def needs_teacher(self) -> bool:
        """Whether a model without a teacher has none."""
        return self.name in _NEED_TEACHER

    def of(self, held_out: Mapping[str, Any]) -> float | None:
        """Of a held-out evaluation; None where it is not finite."""
        if self.name != "objective":
            return held_out.get(self.name)
        kl, cross_entropy = held_out.get("kl"), held_out.get("cross_entropy")
        return None if kl is None or cross_entropy is None else self.kd_ratio * kl + (1 - self.kd_ratio) * cross_entropy


@dataclass(frozen=True)
class Record:
    """One trial.

    Args:
        name: of its directory in ``trials/``.
        status: ``pruned`` where it was ended because it was worse than others at the same step.
        is_baseline: whether it has the config's own values.
        values: of the settings searched, by key; of a section that was chosen, its name.
        metric: the least of its held-out evaluations after the first step; None where there is none.
        step: of that evaluation.
        num_steps: that it made.
        seconds: that it took.
        held_out: all of that evaluation.
        message: why it failed; empty where it did not.
    """

    name: str
    status: Status
    is_baseline: bool
    values: Mapping[str, Any]
    metric: float | None
    step: int | None
    num_steps: int
    seconds: float
    held_out: Mapping[str, Any]
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain objects."""
        return asdict(self)


def best_first(records: Sequence[Record]) -> list[Record]:
    """Those that were run to their end by their metric, then those that were pruned, then those that failed."""
    order = ("complete", "pruned", "failed")
    return sorted(records, key=lambda r: (order.index(r.status), r.metric is None, r.metric or 0.0, r.name))


def best(records: Sequence[Record]) -> Record | None:
    """The best of those that were run to their end; None where none was."""
    return next((record for record in best_first(records) if record.status == "complete"), None)


def shown(value: Any) -> str:
    """A value for a table, as YAML has it."""
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def rows(records: Sequence[Record], metric: str) -> list[list[str]]:
    """A table, best first, its head in the first row."""
    keys = list(dict.fromkeys(key for record in records for key in record.values))
    lines = [["trial", "status", *keys, metric, "at step", "steps", "minutes"]]
    for record in best_first(records):
        cells = [record.name + " (baseline)" * record.is_baseline, record.status]
        cells += [shown(record.values.get(key, "")) for key in keys]
        at = ["", ""] if record.metric is None else [shown(record.metric), str(record.step)]
        lines.append([*cells, *at, str(record.num_steps), f"{record.seconds / 60:.1f}"])
    return lines


def markdown(records: Sequence[Record], metric: str) -> str:
    """:func:`rows`, and below them why trials failed."""
    head, *body = [[cell.replace("|", "\\|") for cell in row] for row in rows(records, metric)]
    num_texts = len(head) - 4
    rule = ["---"] * num_texts + ["---:"] * 4
    lines = [f"| {' | '.join(row)} |" for row in (head, rule, *body)]
    if failed := [f"- {record.name} failed: {record.message}" for record in records if record.message]:
        lines += ["", *failed]
    return "\n".join(lines)
