"""safetensors files, written one tensor at a time and read by their headers alone.

A checkpoint larger than memory must still be writable: `safetensors.torch.save_file` wants all tensors at once.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kd_recipes.errors import ConfigError, Problem

# The limit of the reference implementation: a larger length is a damaged file, not a large model.
MAX_HEADER_BYTES = 100_000_000

# What weights are written in, by the names of configs.
FILE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, taking the tensors one at a time from ``tensors``.

    Equivalent, when everything fits in memory, to
    ``safetensors.torch.save_file({s.name: t for s, t in zip(specs, tensors)}, path, metadata)``.

    Args:
        path: the file to write; not atomic by itself, see :func:`kd_recipes.storage.atomic_directory`.
        specs: what will come, in order. Where dtypes differ, wider ones first (readers need aligned data).
        tensors: as many tensors, each matching its spec; may be a generator.
        metadata: the header's ``__metadata__``; default ``{"format": "pt"}``, which transformers asks for.

    Raises:
        ValueError: a tensor does not match its spec, there are too few or too many, or a spec is not aligned.
    """
    header = _encode_header(specs, {"format": "pt"} if metadata is None else metadata)
    with path.open("wb") as file:
        file.write(header)
        remaining = iter(tensors)
        # No name holds a tensor here, nor does a zip: the one written is freed before the next one is made.
        for spec in specs:
            file.write(_data_of(next(remaining, None), spec))
        if next(remaining, None) is not None:
            raise ValueError(f"more tensors than the {len(specs)} specs")


def _data_of(tensor: torch.Tensor | None, spec: TensorSpec) -> memoryview:
    if tensor is None:
        raise ValueError(f"{spec.name}: fewer tensors than specs")
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise ValueError(f"{spec.name}: got {tensor.dtype} {tuple(tensor.shape)}, wanted {spec}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for spec in specs:
        if spec.name in entries:
            raise ValueError(f"{spec.name}: two tensors have this name")
        if offset % spec.dtype.itemsize:
            raise ValueError(f"{spec.name}: {spec.dtype} at byte {offset} is not aligned; put wider dtypes first")
        end = offset + spec.num_bytes
        entries[spec.name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_safetensors_header(path: Path) -> dict[str, TensorSpec]:
    """Read the names, dtypes and shapes in a safetensors file without its data.

    Raises:
        ConfigError: the file is truncated, or is not a safetensors file.
    """
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            entries: dict[str, Any] = json.loads(file.read(length))
        specs = {name: _decode_entry(name, entry) for name, entry in entries.items() if name != "__metadata__"}
        expected = 8 + length + sum(spec.num_bytes for spec in specs.values())
        if (size := path.stat().st_size) != expected:
            raise ValueError(f"{size} bytes where its header describes {expected}")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = Problem(str(path), str(error), "a whole safetensors file", "Copy it again: it is damaged.")
        raise ConfigError(problem) from error
    return specs


def _decode_entry(name: str, entry: Mapping[str, Any]) -> TensorSpec:
    spec = TensorSpec(name, _DTYPES[entry["dtype"]], tuple(int(size) for size in entry["shape"]))
    start, end = entry["data_offsets"]
    if end - start != spec.num_bytes:
        raise ValueError(f"{name}: {end - start} bytes for a tensor of {spec.num_bytes}")
    return spec
