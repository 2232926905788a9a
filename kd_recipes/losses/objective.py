"""The objective of a distillation, as sums over valid tokens.

    total = sum over tokens of  kd_ratio * T^2 * D(teacher_T, student_T) + (1 - kd_ratio) * CE(student, label)

Sums, because the one division by the global token count belongs to the loop, which alone knows all micro-batches
and ranks. The student's head is applied to a chunk of tokens at a time and the gradient is taken there and then,
so that logits never exist for more than a chunk.
"""

# B sequences, S positions, T = B * S, N valid tokens, n tokens of a chunk, D hidden size, V ids shared

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.losses.divergences import Distributions, Divergence, ForwardKL
from kd_recipes.signals import DenseSignal

# Logits of a chunk of tokens, whose gradient takes their place: large enough to keep the matrix units busy.
_CHUNK_ELEMENTS = 1 << 26
# The float32 arithmetic on them goes block by block. On a CPU a block's buffers stay in cache, and below the size from
# which a C library maps fresh pages for every allocation; elsewhere a block is what keeps a device busy.
_BLOCK_ELEMENTS_CPU = 1 << 20
_BLOCK_ELEMENTS = 1 << 24


class OutputHead(Protocol):
    """What the objective needs of a student's head; see ``_torchtune.Head``."""

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]: ...
    @property
    def num_rows(self) -> int: ...
    def project(self, hidden: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class LossSum:
    """Sums over ``num_tokens`` valid tokens; all but ``total`` are detached float64 scalars on the tokens' device.

    Args:
        total: what is differentiated.
        cross_entropy: of the student with the labels, in nats.
        divergence: of the student from the teacher at temperature T, in nats, without the factor T^2.
        num_correct: tokens where the student's likeliest id is the label.
        num_agreeing: tokens where student and teacher have the same likeliest id.
        num_tokens: valid tokens.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor
    num_correct: Tensor
    num_agreeing: Tensor
    num_tokens: int


@dataclass(frozen=True)
class Objective:
    """Settings of the objective; calling it computes the sums and, through ``total``, the gradients.

    Args:
        kd_ratio: weight of the divergence, in [0, 1]; 1 takes no gradient from the labels, 0 needs no teacher.
        temperature: T > 0, of student and teacher in the divergence.
        divergence: how far the student is from the teacher.
        num_ids: how many ids student and teacher share; heads with more rows are padded, and compared over these.
        chunk_size: tokens whose logits exist at a time; chosen from the vocabulary if None.
    """

    kd_ratio: float = 0.5
    temperature: float = 1.0
    divergence: Divergence = field(default_factory=ForwardKL)
    num_ids: int | None = None
    chunk_size: int | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a signal changes the gradient."""
        return self.kd_ratio > 0

    def __call__(self, hidden_BSD: Tensor, head: OutputHead, signal: DenseSignal | None, batch: Batch) -> LossSum:
        """Sums over the N tokens whose label is not masked; the others never reach a matrix product.

        Args:
            hidden_BSD: the student's last hidden states.
            head: the student's output head.
            signal: the teacher on the same batch; None where ``kd_ratio`` is 0.
            batch: its labels.

        Returns:
            The sums. ``total.backward()`` reaches ``hidden_BSD`` and the head's parameters.

        Raises:
            ValueError: no signal although ``kd_ratio`` is above 0.
        """
        if signal is None and self.needs_teacher:
            raise ValueError(f"kd_ratio is {self.kd_ratio}, which needs a teacher, and there is no signal")
        labels_T = batch.labels_BS.flatten()
        positions_N = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
        inputs = (self, head, signal, positions_N, labels_T[positions_N])
        # under no_grad autograd still reports what requires gradients, so the inner function has to be told
        wants_grad = torch.is_grad_enabled()
        total, sums = _ChunkedObjective.apply(hidden_BSD, wants_grad, *inputs, *head.parameters)
        return LossSum(total, sums[0], sums[1], sums[2], sums[3], len(positions_N))

    def replace_by_gradient(self, logits_nV: Tensor, teacher_nV: Tensor | None, labels_n: Tensor) -> Tensor:
        """Overwrite the student's logits with the gradient of the objective.

        Args:
            logits_nV: the student's; after the call, the gradient.
            teacher_nV: the teacher's, or None.
            labels_n: ids.

        Returns:
            Sums over the tokens ``[5]``, in the order of :meth:`rows`, in float64.
        """
        sums = torch.zeros(5, dtype=torch.float64, device=logits_nV.device)
        num_elements = _BLOCK_ELEMENTS_CPU if logits_nV.device.type == "cpu" else _BLOCK_ELEMENTS
        num_rows = max(1, num_elements // logits_nV.shape[1])
        for start in range(0, len(labels_n), num_rows):
            block = slice(start, start + num_rows)
            teacher = teacher_nV[block] if teacher_nV is not None else None
            values_5n, gradient = self.rows(logits_nV[block], teacher, labels_n[block])
            logits_nV[block] = gradient
            sums += values_5n.sum(-1, dtype=torch.float64)
        return sums

    def rows(self, student_nV: Tensor, teacher_nV: Tensor | None, labels_n: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of some tokens and its gradient.

        Args:
            student_nV: logits, any float dtype.
            teacher_nV: logits, or None.
            labels_n: ids.

        Returns:
            Per token ``[5, n]``: total, cross entropy, divergence, is correct, agrees; and total's gradient ``[n, V]``.
        """
        # float32 from here: a bf16 sum over 150,000 probabilities is off in its second digit
        student_nV = student_nV.float()
        log_q1_nV, q1_nV = torch.log_softmax(student_nV, -1), torch.softmax(student_nV, -1)
        cross_entropy_n = -log_q1_nV.gather(1, labels_n.unsqueeze(1)).squeeze(1)
        top_n = student_nV.argmax(-1)
        divergence_n = agrees_n = torch.zeros_like(cross_entropy_n)
        grad_nV = torch.zeros_like(student_nV)
        if teacher_nV is not None:
            teacher_nV = teacher_nV.float()
            agrees_n = (teacher_nV.argmax(-1) == top_n).float()
            softened = self._soften(student_nV, teacher_nV, q1_nV, log_q1_nV)
            divergence_n, a_nV = self.divergence(softened)
            # T^2 keeps the gradient's size whatever T; one T goes against the 1/T of the chain rule
            grad_nV = a_nV.addcmul_(softened.q_nV, a_nV.sum(-1, keepdim=True), value=-1.0)
            grad_nV.mul_(self.kd_ratio * self.temperature)
        if self.kd_ratio < 1:
            weight = 1 - self.kd_ratio
            grad_nV.add_(q1_nV, alpha=weight)
            grad_nV.scatter_add_(1, labels_n.unsqueeze(1), grad_nV.new_full((len(labels_n), 1), -weight))
        total_n = self.kd_ratio * self.temperature**2 * divergence_n + (1 - self.kd_ratio) * cross_entropy_n
        correct_n = (top_n == labels_n).float()
        return torch.stack((total_n, cross_entropy_n, divergence_n, correct_n, agrees_n)), grad_nV

    def _soften(self, student_nV: Tensor, teacher_nV: Tensor, q1_nV: Tensor, log_q1_nV: Tensor) -> Distributions:
        """Both distributions at temperature T, from logits and from the student's distribution at 1."""
        if self.temperature == 1.0:
            q_nV, log_q_nV = q1_nV, log_q1_nV
        else:
            student_nV, teacher_nV = student_nV / self.temperature, teacher_nV / self.temperature
            q_nV, log_q_nV = torch.softmax(student_nV, -1), torch.log_softmax(student_nV, -1)
        return Distributions(torch.softmax(teacher_nV, -1), torch.log_softmax(teacher_nV, -1), q_nV, log_q_nV)


class _ChunkedObjective(torch.autograd.Function):
    """Value and gradients in one pass over chunks; equals, without the memory,

    values_5N, _ = objective.rows(head.project(hidden_BSD.flatten(0, 1)[positions_N]), teacher_NV, labels_N)
    total = values_5N[0].sum()
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_BSD: Tensor,
        wants_grad: bool,
        objective: Objective,
        head: OutputHead,
        signal: DenseSignal | None,
        positions_N: Tensor,
        labels_N: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        hidden_TD = hidden_BSD.detach().flatten(0, 1)
        num_ids = objective.num_ids or head.num_rows
        hidden_grad_TD = torch.zeros_like(hidden_TD) if wants_grad else None
        head_grads: list[Tensor] = []
        chunk_size = objective.chunk_size or max(64, _CHUNK_ELEMENTS // num_ids)
        sums = torch.zeros(5, dtype=torch.float64, device=hidden_TD.device)
        for positions_n, labels_n in zip(positions_N.split(chunk_size), labels_N.split(chunk_size), strict=True):
            teacher_nV = signal.logits(positions_n, num_ids) if signal is not None else None
            hidden_nD = hidden_TD[positions_n].requires_grad_(wants_grad)
            with torch.set_grad_enabled(wants_grad):
                student_nV = head.project(hidden_nD)
            grad_nV = student_nV.detach()  # the same memory: a projection's gradient needs its input, not its output
            sums += objective.replace_by_gradient(grad_nV[:, :num_ids], teacher_nV, labels_n)
            if hidden_grad_TD is not None:
                grad_nV[:, num_ids:] = 0  # rows of the head that stand for no id
                found = torch.autograd.grad(student_nV, (hidden_nD, *parameters), grad_nV)
                hidden_grad_TD[positions_n] = found[0]
                # the first chunk's are kept as they are: most batches are one chunk, and a head's gradient is large
                parts = zip(head_grads, found[1:], strict=True) if head_grads else ()
                head_grads = [total.add_(part) for total, part in parts] or list(found[1:])
        if hidden_grad_TD is not None:
            ctx.grads = [hidden_grad_TD.view_as(hidden_BSD), *(head_grads or map(torch.zeros_like, parameters))]
        ctx.mark_non_differentiable(sums)
        return sums[0].to(torch.float32), sums[1:]

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [tensor.mul_(grad_total.to(tensor.dtype)) for tensor in ctx.grads]
        ctx.grads = []  # freed as soon as they are handed on; a second backward through it is an error
        return (grads[0], None, None, None, None, None, None, *grads[1:])
