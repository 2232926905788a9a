"""Tensors of all processes in one directory of safetensors files: each process writes and reads its own part.

The files are those of torch.distributed.checkpoint's writer for Hugging Face's format: no pickles, and whoever reads
them may split the tensors otherwise, or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

# of a file: what is written is copied once more, a file at a time
_MAX_BYTES = 1 << 30


class Staging:
    """Copies of tensors in host memory, made while the training waits, and written while it goes on."""

    def __init__(self) -> None:
        has_cuda = torch.cuda.is_available()
        options = StagingOptions(
            use_pinned_memory=has_cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=has_cuda,
        )
        self._stager = DefaultStager(options)

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors as they are now; the memory of the copies made before is used again."""
        return self._stager.stage(dict(tensors))  # type: ignore[return-value]


def local_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_writable(tensor: Tensor) -> bool:
    """Whether safetensors takes a tensor: quantized optimizers keep tensors of their own kinds."""
    local = local_part(tensor)
    return type(local.data) is Tensor and local.is_contiguous()


def write_tensors(directory: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[Path]:
    """Write what this process has of the tensors; all processes of a group together, into the same directory.

    Returns:
        The files that this process has written.

    Raises:
        Exception: the file system's, of whichever process it refused.
    """
    writer = HuggingFaceStorageWriter(str(directory), _file_numbers(tensors), save_distributed=True)
    with _collective():
        detached = {name: tensor.detach() for name, tensor in tensors.items()}
        save(detached, storage_writer=writer, process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank(group)
    return sorted(directory.glob(f"shard-{rank + 1:05d}-*"))


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Into which of a process's files each tensor goes, from 1."""
    numbers, number, num_bytes = {}, 1, 0
    for name, tensor in tensors.items():
        if num_bytes and num_bytes + tensor.nbytes > _MAX_BYTES:
            number, num_bytes = number + 1, 0
        numbers[name] = number
        num_bytes += tensor.nbytes
    return numbers


def read_shapes(directory: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape, of the whole, and dtype of each tensor in a directory."""
    entries = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}  # type: ignore[union-attr]


def read_tensors(directory: Path, into: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Read this process's parts of tensors, in place; all processes of a group together.

    Raises:
        KeyError: the directory has not all of them.
        ValueError: one of them has another shape.
    """
    shapes = read_shapes(directory)
    if missing := into.keys() - shapes.keys():
        raise KeyError(f"not in the checkpoint: {sorted(missing)[:3]} …")
    for name, tensor in into.items():
        if shapes[name][0] != tensor.shape:
            raise ValueError(f"{name}: {list(shapes[name][0])} in the checkpoint, {list(tensor.shape)} here")
    with _collective(), torch.no_grad():
        reader = HuggingFaceStorageReader(str(directory))
        detached = {name: tensor.detach() for name, tensor in into.items()}
        load(detached, storage_reader=reader, process_group=group, no_dist=group is None)


@contextmanager
def _collective() -> Iterator[None]:
    """Turn torch's error about some processes, which is not an ``Exception``, into that of the first of them.

    And let it do without processes, where there is one, in silence.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        first.add_note(f"in process {rank}")
        raise first from None
