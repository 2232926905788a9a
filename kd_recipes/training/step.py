"""One update of a student: from gradients to weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from kd_recipes.errors import RunError
from kd_recipes.training.precision import MasterWeights


class NonFiniteError(RunError):
    """The loss or the gradient is not a number; raised before the update, so the weights are still good."""


def require_finite(loss: float, grad_norm: float, step: int) -> None:
    """Stop before an update that would ruin the weights.

    Raises:
        NonFiniteError: with the step, and what usually helps.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights are those of step {step - 1}. "
            "Lower optimizer.lr, set clip_grad_norm, or compute in fp32; the last checkpoint is untouched"
        )


def apply_update(
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    clip_grad_norm: float | None,
    norm: Tensor,
) -> None:
    """Clip gradients of this norm, step, publish the weights, advance the learning rate, and drop the gradients."""
    if clip_grad_norm is not None:
        for alike in _split_and_whole(weights.parameters):
            torch.nn.utils.clip_grads_with_norm_(alike, clip_grad_norm, norm)
    optimizer.step()
    weights.publish()
    optimizer.zero_grad(set_to_none=True)
    if scheduler is not None:
        scheduler.step()


def grad_norm(parameters: Iterable[torch.nn.Parameter]) -> Tensor:
    """The gradients' common 2-norm, over all processes."""
    norms = []
    for alike in _split_and_whole(parameters):
        norm = torch.nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def _split_and_whole(parameters: Iterable[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    """Those that are split over the processes, and the others: torch does not compute with both at once."""
    kinds: dict[bool, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(kinds.values())
