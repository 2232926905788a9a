"""All that differs between one device and many. At one device each operation is the identity.

No recipe asks whether it is distributed; it asks for a sum, and on one device the sum is the number itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from kd_recipes.errors import ConfigError, Problem


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
        """What torchrun says, or one process.

        Raises:
            ConfigError: more than one process: sharding over devices is not built yet.
        """
        parallel = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if parallel.world_size > 1:
            wanted = "1: sharding a distillation over several processes comes with a later release"
            raise ConfigError(
                Problem("--nproc_per_node", parallel.world_size, wanted, "Leave the torchrun options out")
            )
        return parallel

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws progress."""
        return self.rank == 0

    def sum(self, number: int) -> int:
        """The number, added up over all processes."""
        return number
