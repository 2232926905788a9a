"""A student: the one model that a step changes. Full, LoRA, DoRA and QLoRA differ only in their builder."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torchtune import training
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.signals import DenseSignal, Tap

_CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."  # in the names of blocks whose activations are recomputed
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original")  # a weight that something is computed from


class Student:
    """A trainable model without its head, and how it is saved.

    Args:
        model: with its weights.
        model_cfg: the section that built it; its LoRA settings say how to merge.
        checkpointer: the torchtune checkpointer that loaded it; it writes in the form that it read.
        export_dtype: of the weights that :meth:`export` writes.
        compute_dtype: of the weights in the forward pass, which is what those in ``schemes`` are rounded from.
        schemes: name of a parameter -> the lattice that it is trained on, and written as codes of.
        taps: places inside it whose features its signal carries.
        recompute_activations: trade a second forward pass of each block for its activations' memory.
        offload_activations: keep them in host memory (CUDA only).
        compile_blocks: compile each block.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        model_cfg: DictConfig,
        checkpointer: Any,
        *,
        export_dtype: torch.dtype,
        compute_dtype: torch.dtype | None = None,
        schemes: Mapping[str, str] | None = None,
        taps: Collection[Tap] = (),
        recompute_activations: bool = False,
        offload_activations: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        self.model = model.train()
        self.is_adapted = _torchtune.freeze_all_but_adapters(model)
        self._model_cfg = model_cfg
        self._checkpointer = checkpointer
        self._export_dtype, self._compute_dtype = export_dtype, compute_dtype or export_dtype
        self._schemes = schemes or {}
        self._headless = _torchtune.Headless(
            model,
            taps,
            compile_blocks=compile_blocks,
            recompute_activations=recompute_activations,
            offload_activations=offload_activations,
        )

    def __call__(self, batch: Batch) -> DenseSignal:
        """The student's distribution at each position."""
        return self._headless(batch)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that a step changes, by name."""
        named = ((_plain(name), p) for name, p in self.model.named_parameters())
        return {name: parameter for name, parameter in named if parameter.requires_grad}

    def export(self, weights: Mapping[str, Tensor], directory: Path, *, adapter_only: bool = False) -> None:
        """Write the student as its checkpointer does: for HF checkpoints a directory that transformers loads.

        An adapted student is written merged, its adapter in ``adapter/``; ``adapter_only`` leaves the rest out.

        Args:
            weights: the model's state, whole.
            directory: where the files go.
            adapter_only: write the adapter alone.
        """
        named = {_plain(name): weight for name, weight in weights.items()}
        contents = _torchtune.merged_student(named, self._model_cfg, self._export_dtype)
        model = contents[training.MODEL_KEY]
        model |= {name: named[name].detach().cpu().to(self._compute_dtype) for name in self._schemes}
        if self._schemes:
            contents["schemes"] = self._schemes
        _torchtune.save_checkpoint(self._checkpointer, contents, directory, adapter_only)


def _plain(name: str) -> str:
    """A parameter's name, whatever has been wrapped around its module or it."""
    return _PARAMETRIZED.sub(r"\1", name.replace(_CHECKPOINT_WRAPPER, ""))
