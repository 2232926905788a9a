"""A frozen model from its checkpoint, a tensor at a time: memory holds the model as it will be, and one weight."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.compression import CompressedCheckpointer
from kd_recipes.compression.keeping import Keeping
from kd_recipes.compression.weight_only import linear_layers
from kd_recipes.errors import ConfigError
from kd_recipes.parts import build_model, does_not_fit, unreadable
from kd_recipes.teachers.offload import Offload

_HOST = torch.device("cpu")
_BYTES_BETWEEN = 2**23  # read between two calls for memory to be given back; less often, more of it is kept


def load_frozen(
    key: str,
    model: DictConfig,
    checkpointer: DictConfig,
    keeping: Keeping,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> TransformerDecoder:
    """Build a model and load its weights, each of them turned into its format as soon as it has been read.

    Weights of a checkpointer that is neither torchtune's for Hugging Face's files nor ours are all in memory at first.

    Args:
        key: of the model's section.
        model: its section; a builder that quantizes to NF4 has its way.
        checkpointer: of its weights.
        keeping: how it is kept; it has no problems with the model.
        dtype: that it computes in.
        device: that it computes on, on which weights are quantized, too.

    Raises:
        ConfigError: the model cannot be built, or is not the one that the checkpoint holds.
    """
    decoder = build_model(key, model, dtype=dtype, device=torch.device("meta"))
    weights, linear = keeping.weights, linear_layers(decoder)
    assembly = _torchtune.Assembly(decoder, device, dtype)
    num_bytes = 0
    for name, tensor in _read(key, checkpointer):
        layer, _, leaf = name.rpartition(".")
        pack = weights.pack if weights and layer in linear and leaf == "weight" else None
        weight = assembly.prepare(name, tensor, pack)
        if weight is not None:
            is_on_host = keeping.cpu_offload and name.startswith("layers.")
            assembly.place(name, _torchtune.map_tensors(weight, _to_host) if is_on_host else weight)
        num_bytes += tensor.nbytes
        if num_bytes >= _BYTES_BETWEEN:
            num_bytes = 0
            _return_memory()
    problems = assembly.finish()
    _torchtune.compute_positions(decoder, device)
    problems += [f"{name} is in no file" for name, buffer in decoder.named_buffers() if buffer.is_meta]
    if problems:
        raise does_not_fit(key, model, problems)
    if keeping.cpu_offload:
        Offload(decoder, device)
    return decoder


def _return_memory() -> None:
    """Have the C library give back what it keeps of memory that was freed.

    glibc keeps up to twice the largest piece, and whatever lies below a piece in use: with int4 that came to two and a
    half times the model.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # others have none, and keep less
    if trim is not None:
        trim(0)


def _to_host(tensor: Tensor) -> Tensor:
    return tensor.to(_HOST)


def _read(key: str, checkpointer: DictConfig) -> Iterator[tuple[str, Tensor]]:
    try:
        reader: Any = _torchtune.build_checkpointer(checkpointer)
        yield from reader.tensors() if isinstance(reader, CompressedCheckpointer) else _torchtune.weights_of(reader)
    except ConfigError:
        raise
    except Exception as error:  # torchtune raises bare ones
        raise unreadable(key, checkpointer, error) from error
