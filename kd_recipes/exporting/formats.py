"""What can be exported: by name, how it is written and what loads it."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from kd_recipes.compression import ToDense
from kd_recipes.compression.checkpoint import RECORD, SECTIONS, HFCheckpoint
from kd_recipes.compression.stream import Text
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.exporting import gguf, graphs, llama_cpp, runtimes
from kd_recipes.storage import FILE_DTYPES, atomic_directory


@dataclass(frozen=True)
class Format(ABC):
    """A kind of file or directory.

    Args:
        name: as in a config.
        path: of it, in the output directory.
        runtime: that loads it.
        packages: module -> what pip calls it, of what writes it and loads it.
    """

    name: str
    path: str
    runtime: type[runtimes.Runtime]
    packages: dict[str, str]

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """Why a checkpoint cannot have this format, by its headers alone."""
        for module, requirement in self.packages.items():
            if find_spec(module) is None:
                yield Problem("formats", self.name, f"the package {requirement}", f"pip install '{requirement}'")

    @abstractmethod
    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """Write it, whole or not at all."""


@dataclass(frozen=True)
class HuggingFace(Format):
    """A directory that transformers loads: adapters merged, factors multiplied, codes as numbers."""

    dtype: str | None = None

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        if self.dtype is None and source.is_dense:
            with atomic_directory(path) as directory:
                for file in source.directory.iterdir():
                    if file.is_file() and file.name not in (RECORD, SECTIONS) and not file.name.startswith("adapter"):
                        shutil.copyfile(file, directory / file.name)
            return
        exact = "fp32" if source.schemes else "bf16"
        no_text = Text((), torch.device("cpu"), torch.float32)
        ToDense(dtype=self.dtype or exact).apply(source, path, no_text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class GGUF(Format):
    """A GGUF file that the gguf package writes."""

    kind: str = "trained"

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """See :class:`Format`."""
        yield from super().problems(source)
        try:
            gguf.refuse(source, self.kind)
        except ConfigError as error:
            yield from error.problems

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        gguf.write_gguf(source, path, self.kind)
        gguf.verify_gguf(source, path)


@dataclass(frozen=True)
class QuantizedGGUF(GGUF):
    """A GGUF file that llama.cpp rounds."""

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        llama_cpp.quantize(source, path, self.kind)


@dataclass(frozen=True)
class Graph(Format):
    """A graph of torch.export; compiled, if ``is_compiled``."""

    is_compiled: bool = False

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """See :class:`Format`."""
        yield from super().problems(source)
        if self.is_compiled and not any(map(shutil.which, ("c++", "g++", "clang++"))):
            yield Problem("formats", self.name, "a C++ compiler", "Install g++ or clang, or export torch_export")

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        (graphs.write_package if self.is_compiled else graphs.write_graph)(source, path, max_seq_len)


_TRANSFORMERS, _LLAMA = {"transformers": "transformers"}, {"gguf": "gguf", "llama_cpp": "llama-cpp-python"}


def _formats() -> Iterator[Format]:
    yield HuggingFace("hf", "hf", runtimes.Transformers, _TRANSFORMERS)
    for dtype in FILE_DTYPES:
        yield HuggingFace(f"hf_{dtype}", f"hf_{dtype}", runtimes.Transformers, _TRANSFORMERS, dtype)
    for kind in gguf.KINDS:
        yield GGUF(f"gguf_{kind}", f"{kind}.gguf", runtimes.LlamaCpp, _LLAMA, kind)
    for kind in llama_cpp.KINDS:
        yield QuantizedGGUF(f"gguf_{kind}", f"{kind}.gguf", runtimes.LlamaCpp, _LLAMA, kind)
    yield Graph("torch_export", "model.pt2", runtimes.TorchExport, {})
    yield Graph("aoti", "aoti.pt2", runtimes.Inductor, {}, is_compiled=True)


FORMATS: dict[str, Format] = {found.name: found for found in _formats()}
