"""A torchtune checkpointer for what torchtune's own cannot read or write: factors, and codes on a lattice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torchtune import training

from kd_recipes.compression.checkpoint import read_checkpoint, write_checkpoint
from kd_recipes.compression.convert import as_tune, packed, to_file
from kd_recipes.lattices import Scheme, quantize

SCHEMES = "schemes"  # in what is saved: name of a parameter -> its scheme


class CompressedCheckpointer:
    """Reads and writes directories of the compress recipe, dense ones too; only safetensors, never a pickle.

    Args:
        checkpoint_dir: the directory.
        output_dir: where to write.
        checkpoint_files: as torchtune's checkpointers have them; the directory's index is what counts.
    """

    def __init__(
        self, checkpoint_dir: str, output_dir: str = ".", checkpoint_files: Sequence[str] | None = None
    ) -> None:
        self._source = read_checkpoint(Path(checkpoint_dir))
        self._output_dir = Path(output_dir)

    def load_checkpoint(self) -> dict[str, Any]:
        """The weights under torchtune's names; codes have become what they stand for, in float32."""
        return {training.MODEL_KEY: as_tune(self._source, [spec.name for spec in self._source.specs])}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What :meth:`load_checkpoint` loads, one at a time."""
        for spec in self._source.specs:
            if not spec.name.endswith(".scales"):
                yield from as_tune(self._source, [spec.name]).items()

    def save_checkpoint(
        self,
        state_dict: Mapping[str, Any],
        epoch: int,
        intermediate_checkpoint: bool = False,
        adapter_only: bool = False,
    ) -> None:
        """Write a model to ``output_dir/epoch_<n>``; what was done to it is for :func:`settle` to say.

        Args:
            state_dict: ``model``, the weights under torchtune's names, and ``schemes`` of those that become codes.
            epoch: its number.
            intermediate_checkpoint: torchtune's; of no meaning here.
            adapter_only: torchtune's; there are no adapters here.
        """
        schemes = state_dict.get(SCHEMES, {})
        write_checkpoint(
            self._source,
            self._output_dir / f"epoch_{epoch}",
            to_file(_coded(state_dict[training.MODEL_KEY], schemes), self._source.config),
            record=None,
            ranks=self._source.ranks,
            schemes=schemes,
        )


def _coded(weights: Mapping[str, Tensor], schemes: Mapping[str, str]) -> dict[str, Tensor]:
    """The weights, codes and scales in the place of some."""
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        state |= packed(name, quantize(weight, Scheme.parse(schemes[name]))) if name in schemes else {name: weight}
    return state
