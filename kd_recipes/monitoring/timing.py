"""What a step costs: the time of each of its phases, and memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch.profiler import record_function

T = TypeVar("T")
PHASES = ("data", "teacher", "student", "loss", "backward", "optimizer")
_GIB = 2**30


class StepTimer:
    """Splits the time of a step into phases, which may come in any order, again and again, and inside each other.

    They are named in the traces of torch's profiler, too.

    A moment belongs to the innermost phase that it is in, so that the phases add up to the step. On a CUDA device it
    is the device's time, between events in its stream: nothing waits for it until :meth:`finish`. Heads are applied
    in the loss, and what another device does for the step is seen where this one waits for it.

    Args:
        device: that the student is on.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._device = device
        self._marks: list[tuple[str, Any]] = []  # a phase and when it began, or went on
        self._outer = "other"

    def steps(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of which begins a step; getting it is its phase ``data``."""
        iterator = iter(items)
        while True:
            self._marks.clear()
            try:
                with self.phase("data"):
                    item = next(iterator)
            except StopIteration:
                return
            yield item

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as this phase."""
        outer, self._outer = self._outer, name
        self._mark(name)
        try:
            with record_function(name):
                yield
        finally:
            self._outer = outer
            self._mark(outer)

    def finish(self, num_tokens: int) -> dict[str, float]:
        """End the step.

        Args:
            num_tokens: that the step was about, for the throughput.

        Returns:
            Seconds, ``time/data`` and so on, ``time/other`` and all of it, ``time/step``; and
            ``throughput/tokens_per_second``. Empty where no phase has begun.
        """
        if not self._marks:
            return {}
        self._mark("")
        if self._is_cuda:
            self._marks[-1][1].synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in pairwise(self._marks):
            seconds[name] += start.elapsed_time(end) / 1000 if self._is_cuda else end - start
        total = sum(seconds.values())
        self._marks.clear()
        times = {f"time/{name}": value for name, value in seconds.items()}
        return {**times, "time/step": total, "throughput/tokens_per_second": num_tokens / total}

    def _mark(self, name: str) -> None:
        if not self._is_cuda:
            self._marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append((name, event))


def memory_stats(device: torch.device) -> dict[str, float]:
    """GiB of memory: of the process; on a CUDA device what is allocated, reserved, and was allocated at most."""
    import psutil

    stats = {"memory/process_gib": psutil.Process().memory_info().rss / _GIB}
    if device.type == "cuda":
        stats["memory/allocated_gib"] = torch.cuda.memory_allocated(device) / _GIB
        stats["memory/reserved_gib"] = torch.cuda.memory_reserved(device) / _GIB
        stats["memory/peak_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return stats
