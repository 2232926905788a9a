"""What the reference says of a text, computed once for all the models that are compared with it, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from kd_recipes.batch import Batch
from kd_recipes.signals import DenseSignal


class StoredReference:
    """Hidden states in files, one a batch; logits are computed from them with the reference's head.

    Args:
        compute: batch -> the reference's distribution. Asked once for each batch, and once more of those found on disk.
        directory: of the files; those of an evaluation that was cut off are used.
    """

    def __init__(self, compute: Callable[[Batch], DenseSignal], directory: Path) -> None:
        self._compute = compute
        self._directory = directory
        self._head: DenseSignal | None = None

    def signal(self, index: int, batch: Batch) -> DenseSignal:
        """The reference's distribution at each position of the batch of this number."""
        file = self._directory / f"{index:06d}.safetensors"
        if self._head is None or not file.is_file():
            found = self._compute(batch)
            self._head = replace(found, logits=replace(found.logits, inputs=()))
            self._directory.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            save_file({str(place): states for place, states in enumerate(found.logits.inputs)}, part)
            part.replace(file)
            return found
        stored = load_file(file, device=str(self._head.logits.weights[0].device))
        inputs = tuple(stored[str(place)] for place in range(len(stored)))
        return replace(self._head, logits=replace(self._head.logits, inputs=inputs))
