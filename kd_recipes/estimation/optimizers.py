"""What an optimizer keeps of each weight, seen in a step that it takes on a small matrix."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from kd_recipes.parts import build
from kd_recipes.tally import Tally

_SIZE = 256  # of the matrix: quantized moments want blocks of 256 numbers, and at least 4,096 in all


@dataclass(frozen=True)
class OptimizerCost:
    """Of a weight.

    Args:
        state_bytes: that it keeps.
        temporary_bytes: that an update takes and gives back.
        all_at_once: whether it updates all weights together, and not one matrix after the other.
    """

    state_bytes: float
    temporary_bytes: float
    all_at_once: bool


def optimizer_cost(section: DictConfig, dtype: torch.dtype, *, is_cuda: bool) -> OptimizerCost:
    """What a config's optimizer costs.

    Args:
        section: ``optimizer:``.
        dtype: of the weights that it works on.
        is_cuda: whether it will run on a GPU, where torch's optimizers take all weights at once.

    Raises:
        ConfigError: it cannot be built.
    """
    name = str(section._component_)
    all_at_once = is_cuda and name.startswith("torch.optim.") and not section.get("fused")
    if all_at_once and section.get("foreach", True):
        section = DictConfig({**section, "foreach": True})
    weight = nn.Parameter(torch.zeros(_SIZE, _SIZE, dtype=dtype))
    optimizer = build("optimizer", section, [{"params": [weight]}])
    weight.grad = torch.zeros_like(weight)
    tally = Tally()
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), tally:
        warnings.simplefilter("ignore")
        optimizer.step()
    state = sum(map(_num_bytes, optimizer.state[weight].values()))
    # torchao's compile an update into one kernel, which needs none
    temporary = 0 if name.startswith("torchao.") else max(0, tally.peak - state)
    return OptimizerCost(state / weight.numel(), temporary / weight.numel(), all_at_once)


def _num_bytes(value: Any) -> int:
    """Of a tensor, also of one that is made of others."""
    if not isinstance(value, Tensor):
        return 0
    if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
        return sum(_num_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.nbytes
