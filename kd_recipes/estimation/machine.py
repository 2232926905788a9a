"""What a run is to be estimated for: a GPU known by its name, or what is here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from kd_recipes.devices import KNOWN_DEVICES, find_known_device, peak_flops
from kd_recipes.errors import ConfigError, Problem

# A context of CUDA with the kernels of torch and cuBLAS, and cuBLAS' workspace; the makers' numbers, not measured here.
CUDA_PROGRAM = 600 * 2**20
PROGRAM_GROWTH = 50 * 2**20  # of a process on a CPU: data set, logger, kernels' scratch, as a run of toys grows
_CGROUP = Path("/sys/fs/cgroup/memory.max")
_BENCHMARK_SECONDS = 0.5


@dataclass(frozen=True)
class Machine:
    """A kind of device, and how many of them.

    Args:
        name: for the report.
        kind: ``cpu`` or ``cuda``.
        num_devices: each with a process of its own.
        memory: bytes of one; for CPUs, of the machine. None where it is not known.
        flops: operations a second of one, at best; None where it is not known.
        is_measured: whether ``flops`` was measured here, and not read in a data sheet.
    """

    name: str
    kind: str
    num_devices: int
    memory: int | None
    flops: float | None
    is_measured: bool = False

    @property
    def device(self) -> torch.device:
        """Of that kind, which need not be here."""
        return torch.device(self.kind)


def find_machine(name: str | None, configured: str, num_devices: int, dtype: str) -> Machine:
    """The machine that a user names, or the one that the config's ``device`` means here.

    Args:
        name: of a known GPU, or ``cpu``; None for what is here.
        configured: ``device`` of the config.
        num_devices: of them.
        dtype: that the student computes in, for a CPU's speed.

    Raises:
        ConfigError: a name that is not known, or a device that is not here.
    """
    if name is None and torch.device(configured).type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(_nameless("device", configured))
        properties = torch.cuda.get_device_properties(torch.device(configured))
        return Machine(properties.name, "cuda", num_devices, properties.total_memory, peak_flops(properties.name))
    if name is None or name == "cpu":
        flops = _matmul_flops(torch.float32 if dtype == "fp32" else torch.bfloat16)
        threads = torch.get_num_threads()
        here = f"this machine's CPU, {threads} thread{'s' if threads > 1 else ''}"
        return Machine(here, "cpu", num_devices, _memory_here(), flops, is_measured=True)
    known = find_known_device(name)
    if known is None:
        raise ConfigError(_nameless("--device", name))
    return Machine(known.name, "cuda", num_devices, round(known.gib * 2**30), known.peak_flops)


def _nameless(key: str, got: str) -> Problem:
    known = ", ".join(device.name for device in KNOWN_DEVICES)
    return Problem(key, got, "a device that is here, or --device with the name of one", f"Known: cpu, {known}")


def _memory_here() -> int:
    """Of the machine, or as much as a container may use."""
    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int(_CGROUP.read_text()))
    except (OSError, ValueError):  # no such limit
        return total


def _matmul_flops(dtype: torch.dtype) -> float:
    """Operations a second of a large product, at best."""
    size = 1024
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + _BENCHMARK_SECONDS
    while (start := time.perf_counter()) < end or best == float("inf"):
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def program_bytes(machine: Machine, here: int) -> int:
    """What the program itself takes of a device's memory.

    Args:
        machine: of the run.
        here: bytes of this process, which has imported what a run imports.
    """
    return CUDA_PROGRAM if machine.kind == "cuda" else here + PROGRAM_GROWTH
