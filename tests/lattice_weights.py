"""Weights to be quantized, names of lattices, and how far codes are from what they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_recipes.lattices import Quantized

NAMES = [
    *("gguf_q8_0", "gguf_q4_0", "int2", "int8", "int8_g64", "ternary_g256", "ternary", "binary_g128", "binary"),
    *(f"int{bits}_g32" for bits in range(2, 8)),
    *("8da4w_g32", "8da4w_g64", "8da8w", "float8"),
]
INT = [name for name in NAMES if name.startswith(("gguf", "int", "8da"))]


def weight(rows: int = 24, columns: int = 512, *, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy_tailed(rows: int = 24, columns: int = 512) -> Tensor:
    return weight(rows, columns) * weight(rows, columns, seed=1) * 50


def errors(of: Tensor, quantized: Quantized) -> Tensor:
    """Squared error of each group, in float64."""
    return (quantized.dequantize().double() - of.double()).square().view(*quantized.scales.shape, -1).sum(-1)
