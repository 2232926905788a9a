"""Write a Hugging Face checkpoint without some of its neurons, heads and channels, from file to file."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from kd_recipes.compression.checkpoint import Edit, HFCheckpoint, rewrite_checkpoint
from kd_recipes.compression.width import Kept, of_groups
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.storage import TensorSpec

_TENSOR = re.compile(r"(?:model\.layers\.(\d+)\.)?(?:model\.)?([\w.]+?)\.(weight|bias)")
_NORMS = ("input_layernorm", "post_attention_layernorm")


def prune_width_checkpoint(
    source: HFCheckpoint, destination_dir: Path, kept: Kept, *, record: Mapping[str, object]
) -> HFCheckpoint:
    """Write what stays of a Llama or Qwen2.

    Args:
        source: the checkpoint that ``kept`` was chosen from.
        destination_dir: the directory to make; see :func:`~kd_recipes.compression.rewrite_checkpoint`.
        kept: what stays.
        record: what ``pruning.json`` should say.

    Raises:
        ConfigError: the checkpoint has a tensor that is not known, or the disk is full.
    """
    heads = int(source.config["num_attention_heads"])
    kv_heads = int(source.config.get("num_key_value_heads") or heads)
    head_dim = int(source.config.get("head_dim") or source.config["hidden_size"] // heads)
    num_kept = len(kept.groups_LK[0])
    config = {
        **source.config,
        "hidden_size": len(kept.channels_K),
        "intermediate_size": len(kept.neurons_LK[0]),
        "num_attention_heads": num_kept * (heads // kv_heads),
        "num_key_value_heads": num_kept,
        "head_dim": head_dim,
    }
    edit = _Editor(kept, head_dim, heads // kv_heads)
    return rewrite_checkpoint(source, destination_dir, config, edit, record=record)


class _Editor:
    def __init__(self, kept: Kept, head_dim: int, heads_per_group: int) -> None:
        self._kept, self._head_dim, self._heads_per_group = kept, head_dim, heads_per_group

    def __call__(self, spec: TensorSpec) -> Edit:
        match = _TENSOR.fullmatch(spec.name)
        cut = self._cut(None if match[1] is None else int(match[1]), match[2].rpartition(".")[2]) if match else None
        if cut is None:
            wanted = "the tensors of a Llama or Qwen2"
            raise ConfigError(Problem("checkpointer.checkpoint_dir", spec.name, wanted))
        shape = tuple(cut(torch.empty(spec.shape, device="meta")).shape)
        return Edit(replace(spec, shape=shape), cut)

    def _cut(self, block: int | None, name: str) -> Callable[[Tensor], Tensor] | None:
        channels = self._kept.channels_K
        if block is None:
            if name == "norm":
                return lambda weight: weight[channels] * self._kept.norm_factors[-1]
            return (lambda weight: weight[:, channels]) if name in ("embed_tokens", "lm_head") else None
        if name in _NORMS:
            factor = self._kept.norm_factors[2 * block + _NORMS.index(name)]
            return lambda weight: weight[channels] * factor
        neurons, groups = self._kept.neurons_LK[block], self._kept.groups_LK[block]
        rows = {
            "gate_proj": neurons,
            "up_proj": neurons,
            "q_proj": of_groups(groups, self._heads_per_group * self._head_dim),
            "k_proj": of_groups(groups, self._head_dim),
            "v_proj": of_groups(groups, self._head_dim),
        }
        fitted = {"down_proj": self._kept.down_LDK[block], "o_proj": self._kept.output_LDK[block]}
        if name in rows:
            return lambda weight: weight[rows[name]][:, channels] if weight.ndim == 2 else weight[rows[name]]
        if name in fitted:
            new = fitted[name]
            return lambda weight: (weight if new is None else new.to(weight.device))[channels]
        return None
