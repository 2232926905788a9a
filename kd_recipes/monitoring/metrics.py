"""Per-step metrics, to any torchtune metric logger."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_recipes.losses import QUALITIES, LossSum


class StepMeter:
    """Adds up the micro-batches of a step."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._names: list[str] = []
        self._sums = torch.zeros((), dtype=torch.float64)

    def add(self, loss: LossSum) -> None:
        """One micro-batch."""
        self._names = list(loss.sums)
        self._sums = self._sums + torch.stack([loss.total.detach().double(), *loss.sums.values()]).cpu()

    def finish(self, num_tokens: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the step's valid tokens, and its speed.

        Args:
            num_tokens: valid tokens of the step, over all processes.
            reduce: adds up a tensor over all processes.
        """
        total, *sums = reduce(self._sums).tolist()
        seconds = time.perf_counter() - self._start
        return {
            "loss/total": total,
            **{_tag(name): value / max(num_tokens, 1) for name, value in zip(self._names, sums, strict=True)},
            "throughput/tokens_per_second": num_tokens / seconds,
            "time/step": seconds,
        }


def _tag(name: str) -> str:
    return f"{'quality' if name in QUALITIES else 'loss'}/{name}"


def log(logger: Any, prefix: str, metrics: Mapping[str, float], step: int) -> None:
    """Send what is a number to a torchtune metric logger, names prefixed."""
    logger.log_dict({f"{prefix}{name}": value for name, value in metrics.items() if value == value}, step=step)
