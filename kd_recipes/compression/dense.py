"""Factors multiplied and codes looked up: the dense model that a compressed one stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from kd_recipes.compression.checkpoint import HFCheckpoint, block_of, write_checkpoint
from kd_recipes.compression.convert import as_tune, to_file
from kd_recipes.compression.form import Form
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import Text
from kd_recipes.tensor_files import FILE_DTYPES

_DTYPE_KEYS = ("dtype", "torch_dtype")
_FACTOR = re.compile(r"(.+)\.(u|s|v)")


@dataclass(frozen=True)
class ToDense(Step):
    """Fold a compressed model back into plain matrices, which transformers and torchtune load.

    Args:
        dtype: of the matrices; ``fp32`` holds every point of every lattice.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"

    def check(self, form: Form) -> Form:
        """See :class:`Step`."""
        return replace(form, rank_multiple=0, table_rank=0, schemes=frozenset())

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`."""
        dtype = FILE_DTYPES[self.dtype]

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for block in sorted(
                {block_of(spec.name) for spec in source.specs}, key=lambda index: -1 if index is None else index
            ):
                state = as_tune(source, source.names(block))
                yield from to_file({k: v.to(dtype) for k, v in _folded(state).items()}, source.config)

        # transformers casts weights to what config.json says; 4 and 5 have other keys for it
        dtypes = {key: str(dtype).removeprefix("torch.") for key in _DTYPE_KEYS if key in source.config}
        config = {**source.config, **dtypes}
        num_bytes = Form(config).num_parameters * dtype.itemsize
        record = self.describe()
        return write_checkpoint(source, destination_dir, tensors(), record=record, config=config, num_bytes=num_bytes)


def _folded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    factors: dict[str, dict[str, Tensor]] = {}
    folded: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _FACTOR.fullmatch(name):
            factors.setdefault(match[1], {})[match[2]] = tensor.float()
        else:
            folded[name] = tensor
    for layer, of in factors.items():
        folded[f"{layer}.weight"] = (of["u"] @ of["s"] if "s" in of else of["u"]) @ of["v"]
    return folded
