"""All that can be known of a distillation before it runs, and how it is said."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, TypeVar

import psutil
import torch
from omegaconf import DictConfig

from kd_recipes import _torchtune
from kd_recipes.config import hide_environment, load_and_validate
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.estimation.compatibility import Comparison, compare
from kd_recipes.estimation.disk import Disk, estimate_disk
from kd_recipes.estimation.duration import Duration, estimate_duration
from kd_recipes.estimation.machine import Machine, find_machine
from kd_recipes.estimation.memory import Memory, Question, estimate_memory
from kd_recipes.estimation.remedies import Remedy, find_remedies
from kd_recipes.headers import file_bytes
from kd_recipes.monitoring.flops import Sizes
from kd_recipes.parts import CHECKPOINTERS, build, build_model
from kd_recipes.training.precision import dtype_name, resolve_dtype
from kd_recipes.training.preflight import check_models, loads_teacher_model, preflight

T = TypeVar("T")
EXIT_DOES_NOT_FIT, EXIT_PROBLEMS = 1, 2
_MARGIN = 0.15  # of the memory: how far docs/doctor.md's measurements are from the estimates, at most


@dataclass(frozen=True)
class Report:
    """What a config will need.

    Args:
        config: its name.
        machine: that it was asked for.
        length: tokens of a sequence.
        problems: what is wrong, a line each.
        comparisons: of student and teacher.
        memory: of one device.
        disk: of the run.
        duration: of the run.
        remedies: what saves memory, where it does not fit.
    """

    config: str
    machine: Machine
    length: int
    problems: list[str] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    memory: Memory | None = None
    disk: Disk | None = None
    duration: Duration | None = None
    remedies: list[Remedy] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice, as far as is known."""
        limit = self.machine.memory
        has_memory = self.memory is None or limit is None or self.memory.peak <= limit
        return has_memory and (self.disk is None or self.disk.fits)

    @property
    def exit_status(self) -> int:
        """0 where all is well; 1 where it does not fit; 2 where something is wrong."""
        return EXIT_PROBLEMS if self.problems else 0 if self.fits else EXIT_DOES_NOT_FIT

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        found = asdict(self)
        if self.memory is not None:
            found["memory"] |= {"peak": self.memory.peak, "phase": self.memory.phase}
        return found | {"fits": self.fits}


def examine(
    file: str,
    overrides: Sequence[str] = (),
    *,
    device: str | None = None,
    num_devices: int = 1,
    trusts_all: bool = False,
) -> Report:
    """Look at a distillation's config, and at what it names.

    Args:
        file: the config, as ``--config`` takes it.
        overrides: ``key=value``.
        device: a known GPU, or ``cpu``; what is here by default.
        num_devices: each with a process of its own.
        trusts_all: whether the config may name any code.

    Raises:
        ConfigError: the config is none, or an argument of this function is wrong: there is nothing to estimate.
    """
    cfg = _load(file, overrides, trusts_all=trusts_all)
    if num_devices < 1:
        raise ConfigError(Problem("--num-devices", num_devices, "a whole number above 0"))
    program = psutil.Process(os.getpid()).memory_info().rss
    problems: list[Problem] = []
    machine = _machine(cfg, device, num_devices, problems)
    cfg.dtype = _dtype(cfg, machine)
    _collect(problems, lambda: preflight(cfg))
    if device is not None:  # it need not be here
        problems = [problem for problem in problems if problem.key not in ("device", "teacher_device")]
    sizes = _collect(problems, lambda: _check(cfg)) or {}
    length = _length(cfg, sizes)
    question = Question(cfg, machine, length, program)
    memory = _collect(problems, lambda: estimate_memory(question))
    if memory is None:
        return Report(file, machine, length, _lines(cfg, problems))
    known = _known(question)
    duration = _duration(question)
    sizes_on_disk = {
        "checkpoint": memory.checkpoint,
        "student": question.dtype.itemsize * sum(parameter.numel() for parameter in question.student().parameters()),
        "num_ids": min(size.num_rows for size in known.values()),
    }
    report = Report(
        file,
        machine,
        length,
        comparisons=compare(cfg, known),
        memory=memory,
        disk=_collect(problems, partial(estimate_disk, cfg, num_tokens=duration.num_tokens, **sizes_on_disk)),
        duration=duration,
    )
    remedies = [] if report.fits else find_remedies(question, memory)
    return Report(**{**vars(report), "problems": _lines(cfg, problems), "remedies": remedies})


def _load(file: str, overrides: Sequence[str], *, trusts_all: bool) -> DictConfig:
    try:
        return load_and_validate(file, overrides, "distill", trusts_all=trusts_all)
    except ConfigError as error:
        others = [problem.got for problem in error.problems if problem.key == "recipe"]
        if others:
            remedy = "A pipeline leaves the config of each of its steps in configs/ of its output_dir"
            wanted = "distill: other recipes are not estimated"
            raise ConfigError(Problem("recipe", others[0], wanted, remedy)) from error
        raise


def _collect(problems: list[Problem], check: Callable[[], T]) -> T | None:
    """The result of a check, or None and its problems, each once."""
    try:
        return check()
    except ConfigError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        return None


def _lines(cfg: DictConfig, problems: Sequence[Problem]) -> list[str]:
    return [hide_environment(cfg, str(problem)) for problem in problems]


def _machine(cfg: DictConfig, device: str | None, num_devices: int, problems: list[Problem]) -> Machine:
    if device is not None:
        return find_machine(device, cfg.device, num_devices, cfg.dtype)
    try:
        kind = torch.device(cfg.device).type
    except RuntimeError:  # preflight says so
        kind = "cpu"
    found = _collect(
        problems, lambda: find_machine(None, cfg.device if kind == "cuda" else "cpu", num_devices, cfg.dtype)
    )
    return found or Machine("a GPU that is not here", "cuda", num_devices, None, None)


def _dtype(cfg: DictConfig, machine: Machine) -> str:
    if cfg.dtype == "auto" and machine.kind == "cuda" and not torch.cuda.is_available():
        return "bf16"
    return dtype_name(resolve_dtype(cfg.dtype, machine.device))


def _keys(cfg: DictConfig) -> list[str]:
    return ["model", *(["teacher_model"] if loads_teacher_model(cfg) else [])]


def _check(cfg: DictConfig) -> dict[str, _torchtune.ModelSize]:
    sections = {key: cfg[CHECKPOINTERS[key]] for key in _keys(cfg)}
    keys = [
        key
        for key, section in sections.items()
        if section is not None and ("checkpoint_dir" not in section or file_bytes(cfg, CHECKPOINTERS[key]) is not None)
    ]
    return dict(zip(keys, check_models(cfg, build("tokenizer", cfg.tokenizer), keys), strict=True))


def _known(question: Question) -> dict[str, _torchtune.ModelSize]:
    """Sizes by the builders alone, since files may be missing."""
    models = {"model": question.student(), "teacher_model": question.named_teacher()}
    return {key: _torchtune.model_size(model) for key, model in models.items() if model is not None}


def _length(cfg: DictConfig, sizes: dict[str, _torchtune.ModelSize]) -> int:
    """Of the longest sequences that there can be."""
    if (wanted := cfg.tokenizer.get("max_seq_len")) is not None:
        return int(wanted)
    if sizes:
        return min(size.max_seq_len for size in sizes.values())
    meta = torch.device("meta")
    return int(build_model("model", cfg.model, dtype=torch.bfloat16, device=meta).max_seq_len)


def _duration(question: Question) -> Duration:
    teacher = question.teacher()
    return estimate_duration(
        question.cfg,
        question.machine,
        question.shape,
        Sizes.of(question.student()),
        Sizes.of(teacher) if teacher is not None else None,
    )


# --------------------------------------------------------------------------------------------------------- as a text
def render(report: Report) -> str:
    """The report for a terminal."""
    machine = report.machine
    many = f"{machine.num_devices} x " if machine.num_devices > 1 else ""
    blocks = [[f"{report.config} on {many}{machine.name}"]]
    if report.problems:
        blocks.append(["Problems", *(f"  - {line}" for line in report.problems)])
    if report.comparisons:
        blocks.append(["Student and teacher", *_comparison_lines(report.comparisons)])
    if report.memory is not None:
        blocks.append([*_memory_lines(report, report.memory)])
    if report.disk is not None:
        blocks.append([*_disk_lines(report.disk)])
    if report.duration is not None:
        blocks.append([*_duration_lines(report.duration, machine)])
    if not report.fits and report.memory is not None:
        blocks.append([*_remedy_lines(report.remedies)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _comparison_lines(comparisons: Sequence[Comparison]) -> Iterator[str]:
    rows = [(c.what, c.student, c.teacher or "", c.verdict) for c in comparisons]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield ("  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))).rstrip()


def _memory_lines(report: Report, memory: Memory) -> Iterator[str]:
    where = "a device" if report.machine.kind == "cuda" else "the process"
    yield f"Memory of {where}, in GiB (sequences of {report.length:,} tokens)"
    width = max(map(len, memory.parts))
    for name, size in memory.parts.items():
        yield f"  {name:{width}} {_gib(size):>8}"
    limit = report.machine.memory
    yield f"  {'at its peak':{width}} {_gib(memory.peak):>8}  in {memory.phase}"
    if limit is not None:
        verdict = "fits" if memory.peak <= limit else "does not fit"
        if limit / (1 + _MARGIN) < memory.peak <= limit:
            verdict = "may fit: the estimate is good to 15%"
        yield f"  {'there is':{width}} {_gib(limit):>8}  {verdict}"
    yield from (f"  not counted: {note}" for note in memory.notes)


def _disk_lines(disk: Disk) -> Iterator[str]:
    yield "Disk, in GiB"
    place = f"free in {disk.place}"
    width = max(map(len, [*disk.parts, place]))
    for name, size in disk.parts.items():
        yield f"  {name:{width}} {_gib(size):>8}"
    yield f"  {place:{width}} {_gib(disk.free):>8}  {'fits' if disk.fits else 'does not fit'}"
    if (cache := disk.cache) is not None:
        million = f"at most {_gib(round(cache.token_bytes * 1e6))} a million tokens"
        whole = "" if cache.num_bytes is None else f", {_gib(cache.num_bytes)} for all that the run sees"
        yield f"  the teacher's cache: {million}{whole}; free in {cache.place}: {_gib(cache.free)}"


def _duration_lines(duration: Duration, machine: Machine) -> Iterator[str]:
    yield "Time"
    work = f"{duration.step_flops / 1e12:,.2f} Tflop a step"
    if duration.step_seconds is None or machine.flops is None or duration.tokens_per_second is None:
        yield f"  {work} on each device; the device's speed is not known (--device NAME)"
        return
    origin = "measured now" if machine.is_measured else "its data sheet's"
    speed = f"{machine.flops / 1e12:,.2f} Tflop/s ({origin})"
    yield f"  {work}, {speed}, of which a step is assumed to reach {duration.utilization:.0%}"
    yield f"  {_time(duration.step_seconds)} a step, {duration.tokens_per_second:,.0f} tokens a second"
    if duration.run_seconds is not None:
        yield f"  {_time(duration.run_seconds)} for {duration.num_steps:,} steps"
    else:
        yield f"  {_time(1000 * duration.step_seconds)} for 1,000 steps; how many there are depends on the data"


def _remedy_lines(remedies: Sequence[Remedy]) -> Iterator[str]:
    yield "What to change (GiB saved, GiB left at the peak; each by itself)"
    for remedy in remedies:
        mark = "  fits" if remedy.fits else ""
        yield f"  {_gib(remedy.saved):>8} {_gib(remedy.peak):>8}{mark:6}  {remedy.what}"
        yield f"                             {remedy.settings}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f}"


def _time(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
