"""Settings of the objective that change from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_KEYS = {"shape", "start", "end", "num_steps"}
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: done,
    "cosine": lambda done: (1 - math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """A value that goes from ``start`` to ``end`` over ``num_steps`` steps and stays there.

    Args:
        start: at the first step.
        end: at the last.
        shape: ``linear``, or ``cosine``, which begins and ends slowly.
        num_steps: of the way; the whole run if None.
    """

    start: float
    end: float
    shape: str = "linear"
    num_steps: int | None = None

    @classmethod
    def of(cls, value: Any) -> Schedule:
        """From a config: a number is constant, a mapping has the arguments above."""
        return cls(**value) if isinstance(value, Mapping) else cls(float(value), float(value))

    def at(self, step: int, num_steps: int) -> float:
        """The value at a step, counted from 0, of a run of ``num_steps``."""
        done = min(step / max((self.num_steps or num_steps) - 1, 1), 1.0)
        return self.start + (self.end - self.start) * _SHAPES[self.shape](done)

    @property
    def largest(self) -> float:
        """Of all its values."""
        return max(self.start, self.end)


def is_schedule(value: Any, is_valid: Callable[[float], bool]) -> bool:
    """Whether :meth:`Schedule.of` takes it, and each of its values is valid if both ends are."""
    if not isinstance(value, Mapping):
        return is_valid(value)
    ends, num_steps = [value.get("start"), value.get("end")], value.get("num_steps")
    has_ends = all(isinstance(end, (int, float)) and not isinstance(end, bool) and is_valid(end) for end in ends)
    has_steps = num_steps is None or (isinstance(num_steps, int) and num_steps > 0)
    return has_ends and has_steps and value.keys() <= _KEYS and value.get("shape", "linear") in _SHAPES
