"""All that differs between one device and many. At one device each operation is the identity.

No recipe asks whether it is distributed; it asks for a sum, and on one device the sum is the number itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torchtune.modules import TransformerDecoder

Summable = TypeVar("Summable", int, Tensor)


@dataclass(frozen=True)
class Parallel:
    """Where this process stands among those of the run.

    Args:
        rank: of this process, from 0.
        world_size: how many processes there are.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls) -> Parallel:
        """What torchrun says, or one process."""
        return cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))

    def shard(self, model: TransformerDecoder) -> TransformerDecoder:
        """The model, or this process's part of it."""
        return model

    @property
    def is_main(self) -> bool:
        """Whether this process writes files, logs and draws progress."""
        return self.rank == 0

    def sum(self, value: Summable) -> Summable:
        """A number or a tensor of numbers, added up over all processes."""
        return value
