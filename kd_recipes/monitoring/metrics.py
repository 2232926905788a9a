"""Per-step metrics, to any torchtune metric logger."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_recipes.losses import LossSum


class StepMeter:
    """Adds up the micro-batches of a step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin a step: its clock runs from here."""
        self._start = time.perf_counter()
        self._sums = torch.zeros(5, dtype=torch.float64)

    def add(self, loss: LossSum) -> None:
        """One micro-batch."""
        parts = (loss.total.detach().double(), loss.cross_entropy, loss.divergence, loss.num_correct, loss.num_agreeing)
        self._sums += torch.stack(parts).cpu()

    def finish(self, num_tokens: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the step's valid tokens, and its speed.

        Args:
            num_tokens: valid tokens of the step, over all processes.
            reduce: adds up a tensor over all processes.
        """
        total, cross_entropy, divergence, correct, agreeing = (reduce(self._sums) / num_tokens).tolist()
        seconds = time.perf_counter() - self._start
        return {
            "loss/total": total,
            "loss/cross_entropy": cross_entropy,
            "loss/divergence": divergence,
            "quality/accuracy": correct,
            "quality/agreement": agreeing,
            "throughput/tokens_per_second": num_tokens / seconds,
            "time/step": seconds,
        }


def log(logger: Any, prefix: str, metrics: Mapping[str, float], step: int) -> None:
    """Send what is a number to a torchtune metric logger, names prefixed."""
    logger.log_dict({f"{prefix}{name}": value for name, value in metrics.items() if value == value}, step=step)
