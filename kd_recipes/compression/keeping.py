"""How a teacher's weights are kept while it is asked: in what format, and where; and what rules that out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kd_recipes import _torchtune
from kd_recipes.compression.weight_only import WeightFormat, format_problems, linear_layers, packed_bytes, parse_format
from kd_recipes.errors import Problem


@dataclass(frozen=True)
class Keeping:
    """How a frozen model's weights are kept.

    Args:
        weights: the format of its blocks' linear weights; None for what its builder makes.
        cpu_offload: whether its blocks wait in host memory.
        quantization_key: the setting that says the former.
        offload_key: the setting that says the latter.
    """

    weights: WeightFormat | None
    cpu_offload: bool
    quantization_key: str
    offload_key: str

    @classmethod
    def of(cls, key: str, section: Mapping[str, Any], cfg: Mapping[str, Any]) -> Keeping:
        """What a model's section says in ``quantization`` and ``cpu_offload``, or else the config for its teacher.

        Args:
            key: of the section.
            section: the section.
            cfg: the config of a distillation.

        Raises:
            ConfigError: there is no such format.
        """
        keys = {
            name: (f"{key}.{name}", section[name]) if name in section else (f"teacher_{name}", cfg[f"teacher_{name}"])
            for name in ("quantization", "cpu_offload")
        }
        (quantization_key, quantization), (offload_key, cpu_offload) = keys.values()
        weights = None if quantization is None else parse_format(quantization, quantization_key)
        return cls(weights, bool(cpu_offload), quantization_key, offload_key)

    def is_plain(self, model: nn.Module) -> bool:
        """Whether a model, which may be on the meta device, is kept as any other is."""
        is_nf4 = any(_torchtune.is_nf4(parameter) for parameter in model.parameters())
        return self.weights is None and not self.cpu_offload and not is_nf4

    def packed_bytes(self, model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
        """How many bytes the weights take that are kept in the format, by name.

        Args:
            model: may be on the meta device.
            dtype: that it computes in.
        """
        if self.weights is None:
            return {}
        shapes = {
            f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in linear_layers(model).items()
        }
        sizes = {shape: packed_bytes(self.weights, shape, dtype) for shape in set(shapes.values())}
        return {name: sizes[shape] for name, shape in shapes.items()}

    def problems(
        self, model: nn.Module, *, dtype: torch.dtype, device: torch.device, is_split: bool
    ) -> Iterator[Problem]:
        """Why a model cannot be kept so.

        Args:
            model: may be on the meta device.
            dtype: that it computes in.
            device: that it computes on.
            is_split: whether several processes are to share it.
        """
        if is_split and not self.is_plain(model):
            what = f"{self.offload_key}, which keeps whole blocks" if self.cpu_offload else "a quantized teacher"
            remedy = "Each process then has all of it; fsdp_cpu_offload keeps what is split on the host"
            yield Problem("shard_teacher", True, f"False with {what}: it cannot be split", remedy)
        if self.cpu_offload and device.type == "cpu":
            yield Problem(self.offload_key, True, "False on cpu: weights are in its memory as it is")
        if self.weights is not None:
            yield from format_problems(self.weights, model, self.quantization_key, dtype=dtype, device=device)
