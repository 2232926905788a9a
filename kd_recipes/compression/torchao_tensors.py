"""Codes and scales as torchao's tensors, for its kernels and for what is exported through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8TensorActivationQuantization,
)

from kd_recipes.compression.checkpoint import read_checkpoint
from kd_recipes.compression.convert import quantized_weights
from kd_recipes.lattices import Quantized, Scheme
from kd_recipes.models import round_activations

_PER_TOKEN = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN


def to_torchao(
    model: nn.Module, checkpoint_dir: Path, *, takes: Callable[[Scheme], bool] = lambda scheme: True
) -> list[str]:
    """Put torchao's quantized tensors in the place of a model's linear weights, with the codes of its checkpoint.

    Nothing is rounded again. Inputs are rounded by torchao then, where the scheme says so. Embeddings, heads that are
    tied to them, factors and float8 stay as they are: numbers that lie on their lattice.

    Args:
        model: as it was loaded from the checkpoint; changed in place.
        checkpoint_dir: what ``Quantization`` or a distillation with ``QuantizationAwareTraining`` has left.
        takes: whether weights of a scheme are wanted so; others stay as they are, too.

    Returns:
        The names of the parameters that are torchao's now.
    """
    source = read_checkpoint(checkpoint_dir)
    converted = []
    for name, quantized in quantized_weights(source):
        layer = model.get_submodule(name.rpartition(".")[0])
        if not isinstance(layer, nn.Linear) or quantized.scheme.kind == "float8" or not takes(quantized.scheme):
            continue
        weight = as_torchao(quantized, layer.weight.dtype)
        layer.weight = nn.Parameter(weight.to(layer.weight.device), requires_grad=False)
        converted.append(name)
    round_activations(model, {name: scheme for name, scheme in source.schemes.items() if name not in converted})
    return converted


def as_torchao(quantized: Quantized, dtype: torch.dtype) -> Tensor:
    """One weight as torchao's tensor.

    Args:
        quantized: of any integer kind; binary codes take two bits there.
        dtype: that it computes in; scales stay in theirs, so that none is rounded.
    """
    scheme, scales_OG = quantized.scheme, quantized.scales
    tensor: Tensor = IntxUnpackedToInt8Tensor(
        quantized.codes,
        scales_OG,
        torch.zeros_like(scales_OG, dtype=torch.int8),
        getattr(torch, f"int{max(2, scheme.bits)}"),
        (1, quantized.codes.shape[1] // scales_OG.shape[1]),
        dtype,
        _PER_TOKEN if scheme.dynamic_activations else None,
    )
    return tensor
