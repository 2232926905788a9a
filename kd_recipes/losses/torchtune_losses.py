"""torchtune's own loss modules, so that an existing config keeps its losses.

They take logits and return means; the loop wants sums, so each mean is multiplied by the count that it was divided
by. They hold all logits of a micro-batch, and what torchtune calls forward KL is a cross entropy: not zero when
student and teacher agree. Both are why they are not the default.
"""

# B sequences, S positions, D hidden size, V ids shared

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.modules.loss import CEWithChunkedOutputLoss

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.losses.divergences import Divergence, ForwardKL
from kd_recipes.losses.objective import LossSum, Objective, OutputHead
from kd_recipes.signals import DenseSignal


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

    def __call__(self, hidden_BSD: Tensor, head: OutputHead, signal: DenseSignal | None, batch: Batch) -> LossSum:
        """As :meth:`Objective.__call__`; counts of correct and agreeing tokens are not computed and stay 0."""
        labels_BS, num_tokens = batch.labels_BS, batch.num_valid_tokens
        zero = torch.zeros((), dtype=torch.float64, device=hidden_BSD.device)
        if num_tokens == 0:  # the means would be 0 / 0
            return LossSum(hidden_BSD.sum() * 0.0, zero, zero, zero, zero, 0)
        student = self._logits(hidden_BSD, head.project)
        divergence = hidden_BSD.new_zeros((), dtype=torch.float32)
        if self.needs_teacher:
            assert signal is not None
            teacher = self._logits(signal.hidden_BSD, signal.project)
            divergence = self._mean(self.kd_loss, labels_BS, self._soften(student), self._soften(teacher)) * num_tokens
        cross_entropy = self._mean(self.loss, labels_BS, student) * num_tokens
        total = self.kd_ratio * self.temperature**2 * divergence + (1 - self.kd_ratio) * cross_entropy
        return LossSum(total, cross_entropy.detach().double(), divergence.detach().double(), zero, zero, num_tokens)

    @property
    def _num_chunks(self) -> int:
        return max(int(getattr(module, "num_output_chunks", 1)) for module in (self.loss, self.kd_loss))

    def _logits(self, hidden_BSD: Tensor, project: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [project(part)[..., : self.num_ids] for part in hidden_BSD.chunk(self._num_chunks, dim=1)]

    def _soften(self, chunks: list[Tensor]) -> list[Tensor]:
        return chunks if self.temperature == 1.0 else [chunk / self.temperature for chunk in chunks]

    @staticmethod
    def _mean(module: nn.Module, labels_BS: Tensor, *chunked: list[Tensor]) -> Tensor:
        """Call a module in the form it takes: lists of chunks where it is a chunked one, flat tensors otherwise."""
        if hasattr(module, "num_output_chunks"):
            return module(*chunked, labels_BS)  # type: ignore[no-any-return]
        flat = [torch.cat(chunks, dim=1).flatten(0, 1) for chunks in chunked]
        return module(*flat, labels_BS.flatten())  # type: ignore[no-any-return]


def choose_objective(
    loss: nn.Module | None, kd_loss: nn.Module | Divergence | None, **settings: Any
) -> Objective | TorchtuneObjective:
    """The objective that a config's ``loss`` and ``kd_loss`` describe.

    Args:
        loss: a cross entropy of torchtune's signature; None for ours.
        kd_loss: a divergence of ours, or a module of torchtune's signature; None for forward KL.
        settings: the fields of :class:`Objective` but the divergence.

    Raises:
        ConfigError: a part that is no such loss, or two chunked modules that do not chunk alike.
    """
    _require_signature("loss", loss, "logits, labels")
    is_torchtune = isinstance(kd_loss, nn.Module)
    names = "student logits, teacher logits, labels" if is_torchtune else "distributions"
    _require_signature("kd_loss", kd_loss, names)
    if not isinstance(kd_loss, nn.Module):
        if loss is not None and not isinstance(loss, CEWithChunkedOutputLoss):  # which is the cross entropy of ours
            wanted = "no loss beside a divergence of ours, which brings its own cross entropy"
            raise ConfigError(Problem("loss", type(loss).__name__, wanted, "Leave it out, or set torchtune's kd_loss"))
        return Objective(divergence=kd_loss or ForwardKL(), **settings)
    loss = loss if loss is not None else nn.CrossEntropyLoss(ignore_index=IGNORE_INDEX)
    chunks = {part.num_output_chunks for part in (loss, kd_loss) if hasattr(part, "num_output_chunks")}
    if len(chunks) > 1:
        raise ConfigError(Problem("loss.num_output_chunks", chunks, "the same number as kd_loss.num_output_chunks"))
    settings.pop("chunk_size")
    return TorchtuneObjective(loss, kd_loss, **settings)


def _require_signature(key: str, part: Any, names: str) -> None:
    if part is None:
        return
    try:
        inspect.signature(part.forward if isinstance(part, nn.Module) else part).bind(*names.split(", "))
    except TypeError as error:
        raise ConfigError(Problem(key, type(part).__name__, f"a loss that is called with ({names})")) from error
