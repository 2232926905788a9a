"""What ends a run before its last step, and what its user is told: signals, processes that are lost, memory."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import nn
from torch.distributed.tensor import DTensor

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.errors import RunError, TeacherAwayError
from kd_recipes.training.parallel import Parallel

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SECONDS_TO_REPEAT = 3.0


class RunInterrupted(RunError):
    """The run was asked to end, and has saved itself.

    Args:
        number: of the signal.
        step: after which it ended.
    """

    def __init__(self, number: int, step: int) -> None:
        where = f"after step {step}, which is saved; resume_from_checkpoint=True goes on from there"
        super().__init__(f"{signal.Signals(number).name} {where if step else 'before the first step'}")
        self.exit_status = 128 + number  # as a shell says it


@contextmanager
def saved_at_end(parallel: Parallel, save: Callable[[], None]) -> Iterator[None]:
    """Save the last step of a run that is asked to end, or that its teacher has left alone.

    Args:
        parallel: the processes. The teacher leaves them one by one, and saving takes all of them: several do not save.
        save: the last step.
    """
    try:
        yield
    except RunInterrupted:
        save()
        raise
    except TeacherAwayError:
        if parallel.world_size == 1:
            save()
        raise


class Interruption:
    """While it is entered, a SIGTERM or SIGINT is remembered instead of ending the process.

    A step takes as long as it takes: who asks between two batches loses nothing. A second signal some seconds later
    ends the process at once; one that comes sooner is the same again, sent by both a scheduler and torchrun.

    Args:
        parallel: the processes, of which any may get the signal.
    """

    def __init__(self, parallel: Parallel) -> None:
        self._parallel = parallel
        self._number, self._since = 0, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self._number and time.monotonic() - self._since > _SECONDS_TO_REPEAT:
            self._restore()
            os.kill(os.getpid(), number)
        elif not self._number:
            self._number, self._since = number, time.monotonic()

    def check(self, step: int) -> None:
        """End on every process where one of them has got a signal.

        Raises:
            RunInterrupted: one has.
        """
        if number := max(self._parallel.each(self._number)):
            raise RunInterrupted(number, step)

    def until(self, batches: Iterable[Batch], step: int) -> Iterator[Batch]:
        """The batches, as long as no process has got a signal."""
        for batch in batches:
            self.check(step)
            yield batch

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


_LOST = ("gloo", "NCCL", "Timed out", "Connection", "Broken pipe")


@contextmanager
def name_late_processes(parallel: Parallel, timeout: float) -> Iterator[None]:
    """Say which process did not answer, where an operation of all of them fails for want of one.

    Raises:
        RunError: instead of the operation's error.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistError) or any(text in str(error) for text in _LOST)
        if not is_lost or not (late := parallel.late()):
            raise
        raise RunError(
            f"process {', '.join(map(str, late))} did not answer for {timeout:.0f} s (distributed_timeout): it hangs, "
            "or is gone; its own output says why"
        ) from error


def num_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Of all of them, on this process."""
    local = (p.to_local() if isinstance(p, DTensor) else p.detach() for p in parameters)
    return sum(part.nbytes for tensor in local for part in _torchtune.plain_tensors(tensor))


_ALLOCATORS = ("DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory")


@contextmanager
def explain_memory(cfg: DictConfig, sizes: Mapping[str, int] | None = None) -> Iterator[None]:
    """Turn an allocation that failed into an error that says what takes the memory, and which settings take less.

    Args:
        cfg: of a distillation.
        sizes: bytes of what is known to be in memory, by name.

    Raises:
        RunError: instead of the allocator's.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if isinstance(error, RunError) or not (is_memory or any(text in str(error) for text in _ALLOCATORS)):
            raise
        parts = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in (sizes or {}).items())
        known = f"besides activations and gradients it holds: {parts}" if sizes else "the models are being loaded"
        raise RunError(f"out of memory; {known}. {' '.join(_savings(cfg))}") from error


def _savings(cfg: DictConfig) -> Iterator[str]:
    """What needs less, the cheapest first."""
    if cfg.batch_size % 2 == 0:
        half, twice = cfg.batch_size // 2, cfg.gradient_accumulation_steps * 2
        yield f"batch_size={half} gradient_accumulation_steps={twice} is the same update with smaller activations."
    if not cfg.enable_activation_checkpointing:
        yield "enable_activation_checkpointing=True keeps one block's activations at a time."
    if cfg.dtype == "fp32":
        yield "dtype=bf16 halves weights and activations."
    if cfg.teacher_model is not None and cfg.teacher_quantization is None:
        yield "teacher_quantization=int8 halves a bf16 teacher; teacher_cpu_offload=True keeps it in host memory."
    if "lora_rank" not in cfg.model:
        yield "A lora_ builder in `model` trains, and keeps moments for, a hundredth of the weights."
    yield "More processes (--nproc_per_node) share the models; a lower tokenizer.max_seq_len shortens the activations."
