"""Whole numbers in as few bits as they need, laid out so that a compressor still sees what they have in common.

Each full byte of all numbers stands together, and the bits that are left over likewise: a byte that is nearly always
the same is then a run of the same byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.uint32]


def plane_sizes(count: int, num_bits: int) -> list[int]:
    """Bytes of each plane of ``count`` numbers."""
    whole, rest = divmod(num_bits, 8)
    return [count] * whole + ([-(-count * rest // 8)] if rest else [])


def pack(values: Numbers, num_bits: int) -> list[Bytes]:
    """Planes of numbers below ``2 ** num_bits``, the lowest byte first."""
    whole, rest = divmod(num_bits, 8)
    planes = [(values >> 8 * index).astype(np.uint8) for index in range(whole)]
    if rest:
        high = (values >> 8 * whole).astype(np.uint8)
        bits = np.unpackbits(high[:, None], axis=1, count=rest, bitorder="little")
        planes.append(np.packbits(bits, bitorder="little"))
    return planes


def unpack(planes: Sequence[Bytes], count: int, num_bits: int) -> Numbers:
    """The inverse of :func:`pack`."""
    whole, rest = divmod(num_bits, 8)
    values = np.zeros(count, np.uint32)
    for index in range(whole):
        values |= planes[index].astype(np.uint32) << np.uint32(8 * index)
    if rest:
        bits = np.unpackbits(planes[whole], count=count * rest, bitorder="little").reshape(count, rest)
        high = np.packbits(bits, axis=1, bitorder="little").reshape(count)
        values |= high.astype(np.uint32) << np.uint32(8 * whole)
    return values
