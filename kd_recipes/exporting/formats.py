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
from kd_recipes.compression.checkpoint import HFCheckpoint, copy_model
from kd_recipes.compression.stream import Text
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.exporting import executorch, factored, gguf, graphs, llama_cpp, runtimes
from kd_recipes.tensor_files import FILE_DTYPES


@dataclass(frozen=True)
class Format(ABC):
    """A kind of file or directory.

    Args:
        name: as in a config.
        path: of it, in the output directory.
        runtime: that loads it.
        packages: module -> the commands that install what writes it and loads it.
        most_kl: nats a token that it may be from the student; None where numbers are rounded again, by whatever that
            may cost.
    """

    name: str
    path: str
    runtime: type[runtimes.Runtime]
    packages: dict[str, str]
    most_kl: float | None

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """Why a checkpoint cannot have this format, by its headers alone."""
        for module, commands in self.packages.items():
            if find_spec(module) is None:
                yield Problem("formats", self.name, f"the package {module}", commands)

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
            copy_model(source.directory, path)
            return
        exact = "fp32" if source.schemes else "bf16"
        no_text = Text((), torch.device("cpu"), torch.float32)
        ToDense(dtype=self.dtype or exact).apply(source, path, no_text)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Factored(Format):
    """A directory whose products of factors stay factors, with the code that transformers needs for it."""

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """See :class:`Format`."""
        yield from super().problems(source)
        if not source.ranks:
            remedy = "Export hf, which holds a dense model as it is"
            yield Problem("formats", f"{self.name} of {source.directory}", "a model with products of factors", remedy)

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        factored.write_factored(source, path)


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


@dataclass(frozen=True)
class ExecuTorch(Format):
    """A program for ExecuTorch's runtime with XNNPACK."""

    is_quantized: bool = False

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """See :class:`Format`."""
        yield from super().problems(source)
        if self.is_quantized:
            try:
                executorch.refuse(source)
            except ConfigError as error:
                yield from error.problems

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        executorch.write_program(source, path, max_seq_len, is_quantized=self.is_quantized)


_TRANSFORMERS = {"transformers": "pip install transformers"}
_LLAMA = {"gguf": "pip install gguf", "llama_cpp": "pip install llama-cpp-python"}
# its own requirements name a torchao with which torchtune does not import
_EXECUTORCH = {
    "executorch": "pip install --no-deps executorch==1.5.1, and pip install flatbuffers ruamel.yaml sortedcontainers "
    "tabulate"
}
_SAME, _NEAR = 0.01, 0.05  # programs that compute with the same numbers; llama.cpp rounds what comes into a layer


def _formats() -> Iterator[Format]:
    yield HuggingFace("hf", "hf", runtimes.Transformers, _TRANSFORMERS, _SAME)
    for dtype in FILE_DTYPES:
        most_kl = _SAME if dtype == "fp32" else _NEAR
        yield HuggingFace(f"hf_{dtype}", f"hf_{dtype}", runtimes.Transformers, _TRANSFORMERS, most_kl, dtype)
    yield Factored("hf_factors", "hf_factors", runtimes.Transformers, _TRANSFORMERS, _SAME)
    for kind in gguf.KINDS:
        limit = {"f32": _SAME, "f16": _NEAR, "bf16": _NEAR, "trained": _NEAR}.get(kind)
        yield GGUF(f"gguf_{kind}", f"{kind}.gguf", runtimes.LlamaCpp, _LLAMA, limit, kind)
    for kind in llama_cpp.KINDS:
        yield QuantizedGGUF(f"gguf_{kind}", f"{kind}.gguf", runtimes.LlamaCpp, _LLAMA, None, kind)
    yield Graph("torch_export", "model.pt2", runtimes.TorchExport, {}, _SAME)
    yield Graph("aoti", "aoti.pt2", runtimes.Inductor, {}, _SAME, is_compiled=True)
    yield ExecuTorch("executorch_fp32", "fp32.pte", runtimes.ExecuTorch, _EXECUTORCH, _SAME)
    yield ExecuTorch("executorch_8da4w", "8da4w.pte", runtimes.ExecuTorch, _EXECUTORCH, None, is_quantized=True)


FORMATS: dict[str, Format] = {found.name: found for found in _formats()}
