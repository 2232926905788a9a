"""The lattices that GGUF has, laid out as llama.cpp reads them: a file holds what was trained, bit for bit.

Every other way to a file rounds a second time: codes become floats, and a quantizer chooses scales of its own.
"""

# O outputs, I inputs, N blocks of all rows, g weights of a block

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kd_recipes.lattices import Quantized, Scheme

Bytes = npt.NDArray[np.uint8]


def ggml_type(scheme: Scheme) -> str | None:
    """GGML's name of a lattice; None where it has none: another group, a scale that is not float16, rounded inputs."""
    if scheme.dynamic_activations or scheme.scale_dtype != torch.float16:
        return None
    return _TYPES.get(f"{scheme.kind}{scheme.bits}_g{scheme.group_size}")


def lay_out(quantized: Quantized) -> Bytes:
    """The bytes of each row ``[O, b]``, block after block, as ggml-common.h declares them.

    Args:
        quantized: on a lattice of which :func:`ggml_type` knows the name.
    """
    scheme, group_size = quantized.scheme, quantized.scheme.group_size or quantized.codes.shape[1]
    codes_Ng = quantized.codes.contiguous().view(-1, group_size).numpy()
    scales_N2 = quantized.scales.contiguous().view(-1, 1).numpy().view(np.uint8)
    name = ggml_type(scheme)
    assert name is not None, scheme.name
    packed = _PACK[name](codes_Ng)
    # the scale of a TQ2_0 block comes last
    parts = [packed, scales_N2] if name == "TQ2_0" else [scales_N2, packed]
    return np.hstack(parts).reshape(len(quantized.codes), -1)


def dequantize_q1_0(data_Ob: Bytes) -> npt.NDArray[np.float32]:
    """The weights ``[O, I]`` of rows of Q1_0, which the gguf package does not read."""
    blocks = data_Ob.reshape(-1, 18)
    scales_N1 = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    signs_Ng = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32) * 2 - 1
    return (signs_Ng * scales_N1).reshape(len(data_Ob), -1)


def _q8_0(codes_Ng: npt.NDArray[np.int8]) -> Bytes:
    return codes_Ng.view(np.uint8)


def _q4_0(codes_Ng: npt.NDArray[np.int8]) -> Bytes:
    nibbles = (codes_Ng + 8).view(np.uint8)  # a byte has a weight of the block's first half, and one of its second
    packed: Bytes = nibbles[:, :16] | (nibbles[:, 16:] << np.uint8(4))
    return packed


def _tq2_0(codes_Ng: npt.NDArray[np.int8]) -> Bytes:
    quarters = (codes_Ng + 1).view(np.uint8).reshape(-1, 2, 4, 32)  # of each half, four weights to a byte
    packed: Bytes = np.bitwise_or.reduce([quarters[:, :, place] << (2 * place) for place in range(4)])
    return packed.reshape(-1, 64)


def _q1_0(codes_Ng: npt.NDArray[np.int8]) -> Bytes:
    return np.packbits(codes_Ng > 0, axis=1, bitorder="little")


_TYPES = {
    "int8_g32": "Q8_0",
    "int4_g32": "Q4_0",
    "ternary2_g256": "TQ2_0",
    "binary1_g128": "Q1_0",
}
_PACK: dict[str, Callable[[npt.NDArray[np.int8]], Bytes]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "TQ2_0": _tq2_0,
    "Q1_0": _q1_0,
}
