"""What a teacher says of a batch: the one thing that a loss knows of teachers."""

# B sequences, S positions, n tokens of a chunk, D the teacher's hidden size, V ids shared with the student

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class DenseSignal:
    """The teacher's whole distribution at each position, as hidden states and the head that turns them into logits.

    Args:
        hidden_BSD: last hidden states.
        project: ``[..., D] -> [..., rows of the head]``, the logits.
    """

    hidden_BSD: Tensor
    project: Callable[[Tensor], Tensor]

    def logits(self, positions_n: Tensor, num_ids: int) -> Tensor:
        """Logits ``[n, V]`` at some positions of the flattened ``[B * S]``, over the first ``num_ids`` = V ids."""
        rows_nD = self.hidden_BSD.flatten(0, 1)[positions_n.to(self.hidden_BSD.device)]
        return self.project(rows_nD)[:, :num_ids]
