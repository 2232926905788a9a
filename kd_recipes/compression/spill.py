"""Tensors that are known before they can be written, on disk in the meantime: memory holds one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_recipes.storage import scratch_directory

_TENSOR = "tensor"  # its name in its file


class Spill(MutableMapping[str, Tensor]):
    """A dict of tensors, each in a file of its own, and read anew each time.

    Args:
        directory: for the files; empty.
    """

    def __init__(self, directory: Path) -> None:
        self._new_files = (directory / f"{index}.safetensors" for index in itertools.count())
        self._files: dict[str, Path] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        file = self._files.get(name) or next(self._new_files)
        save_file({_TENSOR: tensor.detach().cpu().contiguous()}, file)
        self._files[name] = file

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self._files[name])[_TENSOR]

    def __delitem__(self, name: str) -> None:
        self._files.pop(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@contextmanager
def spilled(destination_dir: Path) -> Iterator[Spill]:
    """A :class:`Spill` beside a directory that will be made of it.

    Raises:
        StorageError: the disk refuses.
    """
    with scratch_directory(destination_dir) as directory:
        yield Spill(directory)
