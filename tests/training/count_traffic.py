"""One of several processes: bytes that a step of a distillation gathers and reduces, printed by the first process.

For test_parallel.py.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

from toy import prepare

COUNTED = {"DefaultAllGather": 0, "DefaultReduceScatter": 0}


def count(name: str, position: int) -> None:
    """Add up the whole tensors of a kind of collective."""
    kind: Any = getattr(collectives, name)
    call = kind.__call__

    def counting(self: Any, output_tensor: Tensor, input_tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        COUNTED[name] += (output_tensor, input_tensor)[position].nbytes
        return call(self, output_tensor, input_tensor, *args, **kwargs)

    kind.__call__ = counting


def sizes(model: Any) -> dict[str, int]:
    """Numbers in a model's blocks, and in the rest of it."""

    def numel(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return {"blocks": numel(model.layers), "root": numel(model) - numel(model.layers)}


def main(config: str) -> None:
    """Run, and print what was counted."""
    count("DefaultAllGather", 0)
    count("DefaultReduceScatter", 1)
    recipe = prepare(config)  # type: ignore[arg-type]
    recipe.train()
    if recipe._parallel.is_main:
        counted = {"gathered": COUNTED["DefaultAllGather"], "reduced": COUNTED["DefaultReduceScatter"]}
        assert recipe._teacher is not None
        models = {"student": sizes(recipe.student.model), "teacher": sizes(recipe._teacher.model)}
        print(json.dumps({**counted, **models}))
    recipe.cleanup()


if __name__ == "__main__":
    main(sys.argv[1])
