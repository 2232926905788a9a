"""Formats that a frozen model's linear weights can be kept in: smaller in memory, whole again only where they are used.

What is named here is a function from a weight to a tensor of torchao's that stands in its place. Embeddings, heads,
norms and biases stay as they are: the loss multiplies by the head itself, and a tied one is the embedding.
"""

# O outputs, I inputs

from __future__ import annotations

import enum
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from kd_recipes import _torchtune
from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.lattices import Scheme, quantize

FORMATS = (
    "int8, int4, nf4, float8, nvfp4; int2 to int8, also with how many inputs share a scale (int4_g32); or a section "
    "with _component_: a weight-only configuration of torchao.quantization"
)
_INTEGERS = re.compile(r"int([2-8])(?:_g([1-9][0-9]*))?")
_INT4_GROUPS = (32, 64, 128, 256)  # those that torch's kernels know
_NVFP4_BLOCK, _NVFP4_TILE = 16, 128  # inputs that share a scale, and rows whose scales lie together
_ROWS_TRIED = _NVFP4_TILE  # the largest piece of any format


@dataclass(frozen=True)
class WeightFormat:
    """A format of linear weights.

    Args:
        name: as a config has it.
        pack: (weight ``[O, I]``, dtype that the layer computes in) -> the same in this format, on the weight's device.
        group_size: inputs that share a scale; None for a whole row, or what is not known here.
        group_sizes: those that there are.
    """

    name: str
    pack: Callable[[Tensor, torch.dtype], Tensor]
    group_size: int | None = None
    group_sizes: tuple[int, ...] = _INT4_GROUPS


def is_format(value: object) -> bool:
    """Whether a text names a format; of a section it is seen only when it is built."""
    return not isinstance(value, str) or _named(value) is not None


def parse_format(value: str | Mapping[str, Any], key: str) -> WeightFormat:
    """The format that a config describes.

    Args:
        value: a name of :data:`FORMATS`, or a section of one of torchao's configurations, whose values may be sections,
            and names such as ``torch.int4`` or ``torchao.quantization.MappingType.SYMMETRIC``.
        key: the setting that it comes from.

    Raises:
        ConfigError: there is no such format.
    """
    if isinstance(value, str):
        if (found := _named(value)) is None:
            raise ConfigError(Problem(key, value, FORMATS))
        return found
    section: Any = OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig) else dict(value)
    name = str(section.get("_component_"))
    try:
        config = _build(section)
    except Exception as error:  # a component can raise anything
        raise ConfigError(Problem(key, name, "one that can be built", one_line(error))) from error
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import FqnToConfig

    if not isinstance(config, AOBaseConfig) or isinstance(config, FqnToConfig):
        raise ConfigError(Problem(key, name, f"one configuration for all layers: {FORMATS}"))
    if "WeightOnly" not in type(config).__name__:  # torchao's others round activations, or change modules for training
        raise ConfigError(Problem(key, name, "a weight-only configuration, such as Int8WeightOnlyConfig"))
    return WeightFormat(name, _by_configuration(config))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """What a format is applied to: the linear layers of a decoder's blocks, by name."""
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    return {name: layer for name, layer in found.items() if name.startswith("layers.")}


def format_problems(
    weights: WeightFormat, model: nn.Module, key: str, *, dtype: torch.dtype, device: torch.device
) -> Iterator[Problem]:
    """Why a model cannot be kept in a format, by its layers' shapes and by trying each kind of them on the device.

    Args:
        weights: the format.
        model: may be on the meta device.
        key: the setting that names the format.
        dtype: that the model computes in.
        device: that it computes on.
    """
    if any(_torchtune.is_nf4(parameter) for parameter in model.parameters()):
        yield Problem(key, weights.name, "none: the model's builder keeps its weights in NF4 as it is")
        return
    shapes = {tuple(layer.weight.shape) for layer in linear_layers(model).values()}
    if not shapes:
        yield Problem(key, weights.name, "none: the model's blocks have no plain linear layers")
        return
    num_inputs = sorted({shape[1] for shape in shapes})
    if weights.group_size and any(count % weights.group_size for count in num_inputs):
        fitting = [size for size in weights.group_sizes if all(count % size == 0 for count in num_inputs)]
        wanted = f"a group size that divides the {', '.join(f'{count:,}' for count in num_inputs)} inputs of its layers"
        remedy = f"These do: {', '.join(map(str, fitting))}" if fitting else "int8 has none"
        yield Problem(key, weights.name, wanted, remedy)
        return
    for num_outputs, in_dim in sorted(shapes):
        shape = _few_rows(num_outputs, in_dim)
        try:
            weight_OI = torch.ones(shape, dtype=dtype, device=device)
            result = F.linear(weight_OI[:2], weights.pack(weight_OI, dtype))
            if result.dtype != dtype:
                raise TypeError(f"it answers in {result.dtype}")
        except Exception as error:  # what a kernel lacks is said in many ways
            wanted = f"a format that works in {dtype} on {device.type} for layers of {num_outputs:,} x {in_dim:,}"
            yield Problem(key, weights.name, wanted, f"int8 works everywhere. torchao: {one_line(error)}")
            return


def packed_bytes(weights: WeightFormat, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """How many bytes a weight has in a format, by packing some of its rows.

    Args:
        weights: the format.
        shape: [O, I].
        dtype: that the layer computes in.
    """
    some = _few_rows(*shape)
    packed = weights.pack(torch.ones(some, dtype=dtype), dtype)
    return round(sum(part.nbytes for part in _torchtune.plain_tensors(packed)) * shape[0] / some[0])


def _few_rows(num_outputs: int, in_dim: int) -> tuple[int, int]:
    """A weight's shape with fewer outputs, which whatever power of two divides the whole divides, too."""
    rows = max(_ROWS_TRIED, 2**14 // math.gcd(2**14, in_dim))
    return (num_outputs if num_outputs <= 2 * rows else rows + num_outputs % rows, in_dim)


# ------------------------------------------------------------------------------------------------------------- formats
def _named(name: str) -> WeightFormat | None:
    if name in ("float8", "nvfp4"):
        return WeightFormat(name, _float8 if name == "float8" else _nvfp4)
    if name == "nf4":
        return WeightFormat(name, _nf4)
    match = _INTEGERS.fullmatch(name)
    if match is None:
        return None
    bits, group_size = int(match[1]), int(match[2]) if match[2] else None
    if bits == 4:  # the only width that torch has kernels for which read two codes from a byte
        group_size = group_size or 128
        return WeightFormat(name, _int4(group_size), group_size) if group_size in _INT4_GROUPS else None
    return WeightFormat(name, _integers(Scheme.parse(name)), group_size, (16, *_INT4_GROUPS))


def _integers(scheme: Scheme) -> Callable[[Tensor, torch.dtype], Tensor]:
    def pack(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        from kd_recipes.compression.torchao_tensors import as_torchao

        return as_torchao(quantize(weight_OI, scheme), dtype)

    return pack


def _int4(group_size: int) -> Callable[[Tensor, torch.dtype], Tensor]:
    def pack(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        from torchao.dtypes import Int4CPULayout, TensorCoreTiledLayout
        from torchao.quantization import Int4WeightOnlyConfig

        # torchao 0.15 warns of version 1 at every turn; version 2 cannot do it on CPUs, and on GPUs by other packages
        warnings.filterwarnings("ignore", ".*version 1 of Int4WeightOnlyConfig", UserWarning)
        layout = Int4CPULayout() if weight_OI.device.type == "cpu" else TensorCoreTiledLayout()
        config = Int4WeightOnlyConfig(group_size=group_size, version=1, layout=layout)
        return _by_configuration(config)(weight_OI, dtype)

    return pack


def _float8(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Float8WeightOnlyConfig

    return _by_configuration(Float8WeightOnlyConfig())(weight_OI, dtype)


def _nvfp4(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """What torchao's NVFP4WeightOnlyConfig makes, some rows at a time: it takes 56 bytes a weight to find the codes."""
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    if any(size % _NVFP4_BLOCK for size in weight_OI.shape):
        raise ValueError(f"NVFP4 wants multiples of {_NVFP4_BLOCK}, got {tuple(weight_OI.shape)}")
    weight_OI = weight_OI.to(dtype)
    scale = per_tensor_amax_to_scale(weight_OI.abs().max())
    parts = [
        NVFP4Tensor.to_nvfp4(rows, per_tensor_scale=scale, is_swizzled_scales=True)
        for rows in weight_OI.split(_NVFP4_TILE)
    ]
    codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("qdata", "scale"))
    weight: Tensor = NVFP4Tensor(codes, scales, _NVFP4_BLOCK, dtype, scale, _is_swizzled_scales=True)
    return weight


def _nf4(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    return _torchtune.to_nf4(weight_OI.to(dtype))


def _by_configuration(config: Any) -> Callable[[Tensor, torch.dtype], Tensor]:
    def pack(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_

        # torchao 0.15 divides by the scale in the weight's own dtype: in bf16 the codes of int8 are 20 times as far off
        is_exact = isinstance(config, (Int8WeightOnlyConfig, IntxWeightOnlyConfig))
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight_OI.to(torch.float32 if is_exact else dtype), requires_grad=False)
        quantize_(layer, config)
        weight: Tensor = layer.weight.detach()
        return weight.to(dtype) if is_exact else weight

    return pack


# -------------------------------------------------------------------------------------------------------------- config
def _build(node: Any) -> Any:
    """A section with all that is in it; torchtune's own instantiate leaves the inner ones as they are."""
    if isinstance(node, dict) and "_component_" in node:
        arguments = {name: _build(value) for name, value in node.items() if name != "_component_"}
        return _torchtune.locate(str(node["_component_"]))(**arguments)
    return _constant(node) if isinstance(node, str) else node


def _constant(text: str) -> Any:
    """The dtype, or the member of one of torchao's enumerations, that a text names; else the text itself."""
    parent, _, name = text.rpartition(".")
    if parent == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
        return found
    if parent.startswith("torchao."):
        module, _, kind = parent.rpartition(".")
        enumeration = getattr(importlib.import_module(module), kind, None)
        if isinstance(enumeration, enum.EnumMeta):
            return enumeration[name]
    return text
