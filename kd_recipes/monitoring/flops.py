"""Model FLOPs of a distillation step, and what share of the device's peak they are (MFU, arXiv 2204.02311).

A multiplication with a weight is two operations, and the backward pass has one such product for the input of each
matrix and one for its weight. Hence 6 N a token for a student all of whose N weights are trained, 4 N where they are
frozen below an adapter, and 2 N for a teacher.
"""

# B sequences, S positions

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder

from kd_recipes.devices import peak_flops


@dataclass(frozen=True)
class Work:
    """What a step passes through a model.

    Args:
        num_positions: padding passes as text does, and is counted.
        num_pairs: of positions that attention compares; all of them, as the paper has it, although half are masked.
        num_labels: positions that have a label, the only ones that reach a head.
    """

    num_positions: int
    num_pairs: int
    num_labels: int


@dataclass(frozen=True)
class Sizes:
    """What of a decoder decides its FLOPs.

    Args:
        body: weights of the matrices in its blocks, adapters among them.
        head: of its output projection; the table that ids are looked up in is multiplied with nothing.
        trained_body: those of ``body`` that are trained.
        trained_head: those of ``head``.
        attention: blocks times heads times width of a head.
    """

    body: int
    head: int
    trained_body: int
    trained_head: int
    attention: int

    @classmethod
    def of(cls, model: TransformerDecoder) -> Sizes:
        """The sizes of a model, with or without its head taken off, split or whole."""
        output: Any = model.output
        head = output.tied_module if isinstance(output, TiedLinear) else output
        (body, trained_body), (head_size, trained_head) = _count(model.layers), _count(head)
        attention = len(model.layers) * model.num_heads * model.head_dim
        return cls(body, head_size, trained_body, trained_head, attention)

    def forward(self, work: Work) -> int:
        """Operations of a forward pass."""
        return 2 * (self.body * work.num_positions + self.head * work.num_labels) + 4 * self.attention * work.num_pairs

    def backward(self, work: Work) -> int:
        """Operations of a backward pass; what is recomputed to save memory is no work of the model's."""
        body, head = self.body + self.trained_body, self.head + self.trained_head
        return 2 * (body * work.num_positions + head * work.num_labels) + 8 * self.attention * work.num_pairs


def _count(module: nn.Module) -> tuple[int, int]:
    """Weights of all matrices, and of those that are trained."""
    matrices = [parameter for parameter in module.parameters() if parameter.ndim >= 2]
    return sum(p.numel() for p in matrices), sum(p.numel() for p in matrices if p.requires_grad)


def step_flops(student: Sizes, teachers: Sequence[Sizes], shapes: Sequence[tuple[int, int]], num_labels: int) -> int:
    """Operations of a step: the student forward and backward, the teachers forward.

    Args:
        student: its sizes.
        teachers: theirs; none where none is asked.
        shapes: ``[B, S]`` of each micro-batch.
        num_labels: of all of them.
    """
    work = Work(sum(b * s for b, s in shapes), sum(b * s * s for b, s in shapes), num_labels)
    return student.forward(work) + student.backward(work) + sum(teacher.forward(work) for teacher in teachers)


def utilization(flops: float, seconds: float, device: torch.device) -> float | None:
    """Share of the device's peak that a step's model FLOPs are; None where the peak is not known, as of CPUs."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return flops / seconds / peak if peak and seconds > 0 else None
