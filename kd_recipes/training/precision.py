"""In which numbers a run computes and in which it keeps its weights.

Adam's update of a weight is about the learning rate in size, and bfloat16 has 8 bits: at a learning rate of 1e-4
most updates of a weight of 0.1 round to nothing. So the optimizer works on float32 copies by default.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
from torch import nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def is_dtype_name(value: str) -> bool:
    """Whether :func:`resolve_dtype` knows the name."""
    return value == "auto" or value in DTYPES


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``fp32``, ``bf16``, or ``auto``: bf16 where the device multiplies it faster than float32.

    CPUs differ by a factor of ten either way, and no flag that torch exposes tells all of them apart, so on a CPU
    ``auto`` times one product of each kind (some 50 ms).
    """
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    seconds = {dtype: _product_seconds(dtype, device) for dtype in DTYPES.values()}
    return min(seconds, key=seconds.__getitem__)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that configs use."""
    return {value: name for name, value in DTYPES.items()}[dtype]


def _product_seconds(dtype: torch.dtype, device: torch.device) -> float:
    a = torch.ones(256, 1024, dtype=dtype, device=device)
    b = torch.ones(1024, 1024, dtype=dtype, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return min(times)


class MasterWeights:
    """Float32 copies of the trainable weights, for the optimizer, and the traffic between the two.

    With ``enabled=False``, or where the weights are float32 already, the optimizer works on the weights themselves.

    Args:
        parameters: the model's trainable parameters.
        enabled: whether to keep copies of those that are not float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, enabled: bool) -> None:
        self._weights = list(parameters)
        self.parameters = [
            nn.Parameter(weight.detach().float()) if enabled and weight.dtype is not torch.float32 else weight
            for weight in self._weights
        ]
        self._pairs = [(w, m) for w, m in zip(self._weights, self.parameters, strict=True) if w is not m]
        for weight, _ in self._pairs:
            weight.grad_dtype = torch.float32  # autograd adds up micro-batches, and the loss its chunks, unrounded

    def collect_grads(self) -> None:
        """Hand the model's gradients to the copies; before each update."""
        for weight, master in self._pairs:
            master.grad, weight.grad = weight.grad, None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the copies back into the model; whenever they have changed."""
        for weight, master in self._pairs:
            weight.copy_(master)
