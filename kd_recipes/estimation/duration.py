"""Time of a step and of a run: operations over what a device does in a second, times an assumed share of it."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig

from kd_recipes.estimation.machine import Machine
from kd_recipes.estimation.rehearsal import Shape
from kd_recipes.monitoring.flops import Sizes, Work, step_flops
from kd_recipes.training.preflight import needs_teacher

# Share of the peak that a step is assumed to reach. Of a GPU's data sheet: what well-filled steps of others do. Of a
# CPU's best product: what the steps of docs/doctor.md do.
_GPU = 0.4
_CPU = {"bf16": 0.5, "fp32": 0.8}


@dataclass(frozen=True)
class Duration:
    """Of a run.

    Args:
        step_flops: operations of a step on one device, blocks that are computed again among them.
        utilization: share of the device's peak that is assumed.
        step_seconds: None where the device's speed is not known.
        num_steps: None where they follow from the data, which nobody has looked at.
        num_tokens: of all steps and devices; None likewise.
        run_seconds: of all steps and evaluations; None where something of it is not known.
        tokens_per_second: of all devices.
    """

    step_flops: int
    utilization: float
    step_seconds: float | None
    num_steps: int | None
    num_tokens: int | None
    run_seconds: float | None
    tokens_per_second: float | None


def estimate_duration(
    cfg: DictConfig, machine: Machine, shape: Shape, student: Sizes, teacher: Sizes | None
) -> Duration:
    """How long a distillation takes, without loading, saving, and texts that are written to watch the student.

    Args:
        cfg: of the distillation.
        machine: that it runs on.
        shape: of its micro-batches.
        student: its sizes.
        teacher: None where none runs beside it.
    """
    micro = (shape.num_sequences, shape.length)
    asked = [teacher] if teacher and needs_teacher(cfg) else []
    count = shape.num_micro_batches
    flops = step_flops(student, asked, [micro] * count, shape.num_tokens * count)
    work = Work(shape.num_tokens, shape.num_tokens * shape.length, shape.num_tokens)
    if cfg.enable_activation_checkpointing:
        flops += count * student.forward(Work(work.num_positions, work.num_pairs, 0))
    share = _GPU if machine.kind == "cuda" else _CPU[cfg.dtype]
    num_steps, step_tokens = _num_steps(cfg), shape.num_tokens * count * machine.num_devices
    num_tokens = None if num_steps is None else num_steps * step_tokens
    if machine.flops is None:
        return Duration(flops, share, None, num_steps, num_tokens, None, None)
    speed = machine.flops * share
    seconds = flops / speed
    total = None
    if num_steps is not None:
        held_out = (student.forward(work) + (teacher.forward(work) if teacher else 0)) / speed
        total = num_steps * seconds + _num_held_out_batches(cfg, num_steps) * held_out
    return Duration(flops, share, seconds, num_steps, num_tokens, total, step_tokens / seconds)


def _num_steps(cfg: DictConfig) -> int | None:
    if cfg.max_steps is not None:
        return int(cfg.max_steps)
    return None if cfg.max_steps_per_epoch is None else int(cfg.max_steps_per_epoch) * int(cfg.epochs)


def _num_held_out_batches(cfg: DictConfig, num_steps: int) -> int:
    """Of all evaluations; none where their number follows from the data."""
    if cfg.eval_dataset is None or cfg.max_eval_batches is None:
        return 0
    times = 2 if cfg.eval_every_n_steps is None else 1 + num_steps // int(cfg.eval_every_n_steps)
    return times * int(cfg.max_eval_batches)
