"""One update of a student after another: from gradients to weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kd_recipes.errors import RunError
from kd_recipes.training.checkpoint import WEIGHTS, allocate_optimizer, load_optimizer, split_optimizer
from kd_recipes.training.parallel import Parallel
from kd_recipes.training.precision import MasterWeights
from kd_recipes.training.sharded import read_shapes, read_tensors

BuildOptimizer = Callable[[list[dict[str, Any]]], tuple[torch.optim.Optimizer, Any]]


class NonFiniteError(RunError):
    """The loss or the gradient is not a number; raised before the update, so the weights are still good."""


class Updates:
    """Everything that changes from step to step but the data: weights, optimizer, learning rate.

    Args:
        student: parameters that are trained, by name; split over the processes, if there are several.
        features: parameters of feature terms, by name; whole on each process.
        build: from groups of parameters to an optimizer, and a schedule of its learning rate or None.
        master_weights: whether the optimizer works on float32 copies.
        clip_grad_norm: largest norm of a step's gradient; None for any.
        parallel: the processes.
    """

    def __init__(
        self,
        student: Mapping[str, nn.Parameter],
        features: Mapping[str, nn.Parameter],
        build: BuildOptimizer,
        *,
        master_weights: bool,
        clip_grad_norm: float | None,
        parallel: Parallel,
    ) -> None:
        self._weights = MasterWeights([*student.values(), *features.values()], enabled=master_weights)
        self._features = list(features.values())
        self._clip_grad_norm = clip_grad_norm
        self._parallel = parallel
        parameters = self._weights.parameters
        self.parameters = dict(zip([*student, *features], parameters, strict=True))
        groups = [parameters[: len(student)], parameters[len(student) :]]
        self.optimizer, self.scheduler = build([{"params": group} for group in groups if group])
        self._norm = torch.zeros(())

    def collect(self) -> float:
        """Take the gradients of all micro-batches; returns their common 2-norm, over all processes."""
        self._weights.collect_grads()
        self._parallel.sum_grads(self._features)
        self._norm = grad_norm(self.parameters.values())
        return float(self._norm)

    def apply(self, around: AbstractContextManager[None] | None = None) -> None:
        """Clip the gradients, step, publish the weights, advance the learning rate, and drop the gradients.

        Args:
            around: what holds the weights to something, entered before they change and left after; nothing by default.
        """
        if self._clip_grad_norm is not None:
            for alike in _split_and_whole(self.parameters.values()):
                torch.nn.utils.clip_grads_with_norm_(alike, self._clip_grad_norm, self._norm)
        with around or nullcontext():
            self.optimizer.step()
        self._weights.publish()
        self.drop()
        if self.scheduler is not None:
            self.scheduler.step()

    def drop(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights, in the optimizer's precision, with what the optimizer has gathered; and what is no tensor."""
        schedule = self.scheduler.state_dict() if self.scheduler is not None else None
        tensors, rest = split_optimizer(self.optimizer, list(self.parameters))
        weights = {f"{WEIGHTS}{name}": parameter for name, parameter in self.parameters.items()}
        return {**weights, **tensors}, {"optimizer": self._parallel.gather(rest), "scheduler": schedule}

    def load_state_dict(self, directory: Path, state: Mapping[str, Any], parallel: Parallel) -> None:
        """Take :meth:`state_dict` back.

        Args:
            directory: where the tensors are.
            state: what is no tensor.
            parallel: the processes.

        Raises:
            KeyError: the weights are others.
            ValueError: they are of other shapes, or the optimizer is another.
        """
        shapes = read_shapes(directory)
        weights = {f"{WEIGHTS}{name}": parameter for name, parameter in self.parameters.items()}
        if others := {name for name in shapes if name.startswith(WEIGHTS)} ^ weights.keys():
            raise KeyError(f"saved and trainable parameters differ: {sorted(others)[:3]} …")
        tensors, optimizer = allocate_optimizer(shapes, self.parameters, state["optimizer"])
        read_tensors(directory, {**weights, **tensors}, parallel.group)
        self._weights.publish()
        load_optimizer(self.optimizer, self.scheduler, {**state, "optimizer": optimizer})

    def restore(self, directory: Path, state: Mapping[str, Any], parallel: Parallel) -> None:
        """:meth:`load_state_dict`, but for the schedule of the learning rate, which goes on."""
        schedule = self.scheduler.state_dict() if self.scheduler is not None else None
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.load_state_dict(directory, {**state, "scheduler": schedule}, parallel)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def require_finite(loss: float, grad_norm: float, step: int, batch: Callable[[], str]) -> None:
    """Stop before an update that would ruin the weights.

    Args:
        loss: of the step.
        grad_norm: of its gradient.
        step: its number.
        batch: says what it was computed from.

    Raises:
        NonFiniteError: with the step, its batch, and what usually helps.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; the weights are those of step {step - 1}. "
            f"Its batch: {batch()}. Lower optimizer.lr, set clip_grad_norm, or compute in fp32; if it is the data, "
            "max_skipped_steps lets such steps pass. The last checkpoint is untouched"
        )


def grad_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The gradients' common 2-norm, over all processes."""
    norms = []
    for alike in _split_and_whole(parameters):
        norm = torch.nn.utils.get_total_norm([p.grad for p in alike if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    together = torch.stack([norm.to(norms[0].device) for norm in norms])
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(together)


def _split_and_whole(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those that are split over the processes, and the others: torch does not compute with both at once."""
    kinds: dict[bool, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return list(kinds.values())
