"""Where a pipeline is, as one line for a terminal or a log: printed before each step that is really run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RUNNING = "running"


def overview(names: Sequence[str], states: Mapping[str, str], seconds: Mapping[str, float]) -> str:
    """Of each step what has become of it, with the minutes that it took, earlier attempts included.

    Args:
        names: of all steps, in order.
        states: ``done``, ``unchanged`` or :data:`RUNNING`, by name; the others are to come.
        seconds: that steps took, by name.
    """
    begun = [f"{name} {states[name]}{_minutes(seconds.get(name, 0.0))}" for name in names if name in states]
    to_come = [name for name in names if name not in states]
    num_over = sum(state != RUNNING for state in states.values())
    whole = f"pipeline: {num_over} of {len(names)} steps{_minutes(sum(seconds.values()))}"
    return " | ".join([whole, *begun, *([f"to come: {', '.join(to_come)}"] if to_come else [])])


def _minutes(seconds: float) -> str:
    return f" {seconds / 60:.1f} min" if seconds else ""
