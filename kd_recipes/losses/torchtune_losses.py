"""torchtune's own loss modules, so that an existing config keeps its losses.

They take logits and return means; the loop wants sums, so each mean is multiplied by the count that it was divided
by. They hold all logits of a micro-batch, and what torchtune calls forward KL is a cross entropy: not zero when
student and teacher agree. Both are why they are not the default.
"""

# B sequences, S positions

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_recipes.batch import Batch
from kd_recipes.losses.objective import LossSum
from kd_recipes.signals import DenseSignal, Signal


@dataclass(frozen=True)
class TorchtuneObjective:
    """``(1 - kd_ratio) * loss(...) + kd_ratio * T^2 * kd_loss(...)`` with modules of torchtune's signatures.

    Args:
        loss: ``(logits, labels) -> mean``.
        kd_loss: ``(student logits, teacher logits, labels) -> mean``.
        kd_ratio: as in :class:`~kd_recipes.losses.objective.Objective`.
        temperature: both models' logits are divided by it in the distillation loss.
        num_ids: ids that both heads have.
    """

    loss: nn.Module
    kd_loss: nn.Module
    kd_ratio: float
    temperature: float
    num_ids: int

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher changes the gradient."""
        return self.kd_ratio > 0

    def __call__(self, student: DenseSignal, signal: Signal | None, batch: Batch, num_tokens: int = 1) -> LossSum:
        """As :meth:`~kd_recipes.losses.objective.Objective.__call__`; only the two losses are computed.

        Raises:
            ValueError: the teacher gives no logits.
        """
        labels_BS, num_valid = batch.labels_BS, batch.num_valid_tokens
        zero = torch.zeros((), dtype=torch.float64, device=labels_BS.device)
        if num_valid == 0:  # the means would be 0 / 0
            return LossSum(student.logits.compute(slice(0, 0)).sum(), {"cross_entropy": zero, "divergence": zero}, 0)
        logits = self._logits(student, labels_BS)
        divergence = torch.zeros((), device=labels_BS.device)
        if self.needs_teacher:
            if not isinstance(signal, DenseSignal):
                raise ValueError("torchtune's kd_loss needs a teacher's logits; choose one of kd_recipes.losses")
            softened = (self._soften(logits), self._soften(self._logits(signal, labels_BS)))
            divergence = self._mean(self.kd_loss, labels_BS, *softened) * num_valid
        cross_entropy = self._mean(self.loss, labels_BS, logits) * num_valid
        total = self.kd_ratio * self.temperature**2 * divergence + (1 - self.kd_ratio) * cross_entropy
        sums = {"cross_entropy": cross_entropy.detach().double(), "divergence": divergence.detach().double()}
        return LossSum(total / num_tokens, sums, num_valid)

    @property
    def _num_chunks(self) -> int:
        return max(int(getattr(module, "num_output_chunks", 1)) for module in (self.loss, self.kd_loss))

    def _logits(self, model: DenseSignal, labels_BS: Tensor) -> list[Tensor]:
        positions_BS = torch.arange(labels_BS.numel()).view_as(labels_BS)
        return [
            model.logits.compute(part_BS.flatten())[:, : self.num_ids].unflatten(0, part_BS.shape).to(labels_BS.device)
            for part_BS in positions_BS.chunk(self._num_chunks, dim=1)
        ]

    def _soften(self, chunks: list[Tensor]) -> list[Tensor]:
        return chunks if self.temperature == 1.0 else [chunk / self.temperature for chunk in chunks]

    @staticmethod
    def _mean(module: nn.Module, labels_BS: Tensor, *chunked: list[Tensor]) -> Tensor:
        """Call a module in the form it takes: lists of chunks where it is a chunked one, flat tensors otherwise."""
        if hasattr(module, "num_output_chunks"):
            return module(*chunked, labels_BS)  # type: ignore[no-any-return]
        flat = [torch.cat(chunks, dim=1).flatten(0, 1) for chunks in chunked]
        return module(*flat, labels_BS.flatten())  # type: ignore[no-any-return]
