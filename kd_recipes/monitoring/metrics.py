"""Per-step metrics, to any torchtune metric logger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes.batch import Batch
from kd_recipes.losses import QUALITIES, LossSum
from kd_recipes.monitoring.flops import Sizes, step_flops, utilization
from kd_recipes.monitoring.timing import StepTimer, memory_stats

Micros = list[Batch]


class StepMeter:
    """What each step was worth, and what it cost.

    Args:
        device: that the student is on.
        student: the student.
        teachers: those that each step asks.
    """

    def __init__(
        self, device: torch.device, student: TransformerDecoder, teachers: Sequence[TransformerDecoder] = ()
    ) -> None:
        self._device = device
        self._timer = StepTimer(device)
        self._sizes = Sizes.of(student), [Sizes.of(teacher) for teacher in teachers]
        self._clear()

    def _clear(self) -> None:
        self._names: list[str] = []
        self._sums = torch.zeros((), dtype=torch.float64)
        self._shapes: list[tuple[int, int]] = []
        self._num_labels = 0

    def steps(self, micros: Iterable[Micros]) -> Iterator[Micros]:
        """The micro-batches of a step after another; waiting for them is its phase ``data``."""
        return self._timer.steps(micros)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count what happens inside as this phase of the step."""
        return self._timer.phase(name)

    def add(self, loss: LossSum, batch: Batch) -> None:
        """One micro-batch."""
        self._names = list(loss.sums)
        self._sums = self._sums + torch.stack([loss.total.detach().double(), *loss.sums.values()]).cpu()
        self._shapes.append((batch.tokens_BS.shape[0], batch.tokens_BS.shape[1]))
        self._num_labels += loss.num_tokens

    def means(self, num_tokens: int, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the step's valid tokens.

        Args:
            num_tokens: valid tokens of the step, over all processes.
            reduce: adds up a tensor over all processes.
        """
        total, *sums = reduce(self._sums).tolist()
        named = zip(self._names, sums, strict=True)
        return {"loss/total": total, **{_tag(name): value / max(num_tokens, 1) for name, value in named}}

    def finish(self, num_tokens: int) -> dict[str, float]:
        """End the step: its time, speed and memory in this process, and its share of the device's peak where known."""
        costs = self._timer.finish(num_tokens) | memory_stats(self._device)
        flops = step_flops(*self._sizes, self._shapes, self._num_labels)
        share = utilization(flops, costs["time/step"], self._device)
        self._clear()
        return costs if share is None else costs | {"throughput/model_flops_utilization": share}


def _tag(name: str) -> str:
    """``loss/`` is what is trained on, ``kd/`` how student and teacher compare, ``quality/`` what the labels say."""
    is_of_teachers = name in QUALITIES or "/" in name
    group = "quality" if name == "accuracy" else "kd" if is_of_teachers else "loss"
    return f"{group}/{name}"


def log(logger: Any, prefix: str, metrics: Mapping[str, float], step: int) -> None:
    """Send what is a number to a torchtune metric logger, names prefixed."""
    logger.log_dict({f"{prefix}{name}": value for name, value in metrics.items() if value == value}, step=step)
