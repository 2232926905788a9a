"""GPUs whose speed and memory are known by name, from the makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownDevice:
    """A GPU.

    Args:
        name: for the command line and for reports.
        pattern: of the name that torch has for it, without its maker.
        peak_flops: dense operations a second with 16-bit inputs and 32-bit sums; the data sheets like to print twice
            as much, for matrices that are half zeros. bf16; V100, which has none: fp16.
        gib: memory that a program finds, in GiB; some of what the data sheet says is kept for error correction.
    """

    name: str
    pattern: str
    peak_flops: float
    gib: float


KNOWN_DEVICES = (
    KnownDevice("A100-40GB", r"A100(-SXM4|-PCIE)-40GB.*|A100 40GB.*", 312e12, 39.4),
    KnownDevice("A100", r"A100(-SXM4|-PCIE| 80GB).*", 312e12, 79.1),
    KnownDevice("H100", r"H100 (80GB HBM3|SXM).*", 989e12, 79.1),
    KnownDevice("H100-PCIe", r"H100 PCIe", 756e12, 79.1),
    KnownDevice("H200", r"H200( SXM.*| 141GB.*)?", 989e12, 139.8),
    KnownDevice("L40S", r"L40S", 362e12, 44.4),
    KnownDevice("L4", r"L4", 121e12, 22.0),
    KnownDevice("A10", r"A10", 125e12, 22.0),
    KnownDevice("RTX-4090", r"GeForce RTX 4090", 165e12, 23.6),
    KnownDevice("V100", r"V100-SXM.*", 125e12, 31.7),
    KnownDevice("MI300X", r"Instinct MI300X.*", 1307e12, 191.7),
)


def peak_flops(name: str) -> float | None:
    """Dense 16-bit operations a second of a device by the name that torch has for it; None where it is not known."""
    plain = re.sub(r"^(NVIDIA |AMD |Tesla )+", "", name)
    if " MIG " in name:  # a slice of it
        return None
    return next((known.peak_flops for known in KNOWN_DEVICES if re.fullmatch(known.pattern, plain)), None)


def find_known_device(name: str) -> KnownDevice | None:
    """The device that a user means: ``h100``, ``RTX 4090``, ``a100-40gb``."""
    wanted = _plain(name)
    return next((known for known in KNOWN_DEVICES if _plain(known.name) == wanted), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
