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
from kd_recipes.compression.checkpoint import HFCheckpoint, block_of, copy_model
from kd_recipes.compression.stream import Text
from kd_recipes.errors import Problem, problems_of
from kd_recipes.exporting import executorch, factored, gguf, graphs, llama_cpp, runtimes
from kd_recipes.exporting.gguf_tokenizer import tokenizer_metadata
from kd_recipes.lattices import Scheme
from kd_recipes.tensor_files import FILE_DTYPES


@dataclass(frozen=True)
class Format(ABC):
    """A kind of file or directory.

    Args:
        name: as in a config.
        path: of it, in the output directory.
        runtime: that loads it.
        packages: module -> the command that installs it, of what writes the file and loads it.
        limit: nats a token that a file may be from the student before it is an error.
    """

    name: str
    path: str
    runtime: type[runtimes.Runtime]
    packages: dict[str, str]
    limit: float

    @property
    def missing(self) -> list[str]:
        """Of the packages, those that are not installed."""
        return [module for module in self.packages if not _is_installed(module)]

    def problems(self, source: HFCheckpoint) -> Iterator[Problem]:
        """Why a checkpoint cannot have this format, by its headers and its tokenizer."""
        if missing := self.missing:
            wanted = f"the package{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
            commands = dict.fromkeys(self.packages[module] for module in missing)
            yield Problem("formats", self.name, wanted, ", and ".join(commands))

    def most_kl(self, source: HFCheckpoint) -> float:
        """Nats a token that a file of a checkpoint may be from it: of one that has codes throughout, these are kept.

        One that rounds its inputs is no nearer to itself: of a number between two steps the last digit decides,
        and after some layers most do (0.012 for weights that differ by 1e-7 of themselves, docs/deployment.md).
        """
        limit = min(self.limit, NEAR) if _is_coded(source) else self.limit
        rounds_inputs = any(Scheme.parse(name).dynamic_activations for name in set(source.schemes.values()))
        return max(limit, NEAR) if rounds_inputs else limit

    @abstractmethod
    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """Write it, whole or not at all."""


@dataclass(frozen=True)
class HuggingFace(Format):
    """A directory that transformers loads: adapters merged, factors multiplied, codes as numbers.

    Args:
        dtype: of all numbers; by default that of the student's own, and float32 for codes.
    """

    dtype: str | None = None

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        if self.dtype is None and source.is_dense:
            copy_model(source.directory, path)
            return
        no_text = Text((), torch.device("cpu"), torch.float32)
        ToDense(dtype=self.dtype or _widest(source)).apply(source, path, no_text)  # type: ignore[arg-type]


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
        yield from problems_of(lambda: gguf.refuse(source, self.kind))
        yield from problems_of(lambda: tokenizer_metadata(source.directory, int(source.config["vocab_size"])))

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        gguf.write_gguf(source, path, self.kind)


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
            yield from problems_of(lambda: executorch.refuse(source))

    def write(self, source: HFCheckpoint, path: Path, max_seq_len: int) -> None:
        """See :class:`Format`."""
        executorch.write_program(source, path, max_seq_len, is_quantized=self.is_quantized)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it lies in
        return False


def _is_coded(source: HFCheckpoint) -> bool:
    """Whether all matrices of the blocks lie on a lattice."""
    matrices = (spec.name for spec in source.specs if block_of(spec.name) is not None and len(spec.shape) == 2)
    return all(name.endswith((".codes", ".scales")) for name in matrices)


def _widest(source: HFCheckpoint) -> str:
    """The dtype of a checkpoint's numbers; of several, and of points of lattices, float32, which holds them all."""
    dtypes = {spec.dtype for spec in source.specs}
    names = [name for name, dtype in FILE_DTYPES.items() if {dtype} == dtypes]
    return names[0] if names and not source.schemes else "fp32"


_TRANSFORMERS = {"transformers": "pip install transformers"}
_LLAMA = {"gguf": "pip install gguf", "llama_cpp": "pip install llama-cpp-python"}
# its own requirements name a torchao with which torchtune does not import
_EXECUTORCH = {
    "executorch": "pip install --no-deps executorch==1.5.1",
    **dict.fromkeys(
        ("flatbuffers", "ruamel.yaml", "sortedcontainers", "tabulate"),
        "pip install flatbuffers ruamel.yaml sortedcontainers tabulate",
    ),
}
# Nats a token. SAME: programs that compute with the same numbers. NEAR: with 16-bit or 8-bit ones (q8_0 of the
# quickstart's student is at 0.004), or with inputs of layers that are rounded to 8 bits. BROKEN: with fewer bits than a
# student was trained for, which may cost it much (there 0.4 in q2_k); with matrices in each other's place, or weights
# out of place in their rows, it is at 10 to 16, and a guess that knows nothing at 7.
SAME, NEAR, BROKEN = 0.01, 0.05, 4.0


def _formats() -> Iterator[Format]:
    yield HuggingFace("hf", "hf", runtimes.Transformers, _TRANSFORMERS, SAME)
    for dtype in FILE_DTYPES:
        limit = SAME if dtype == "fp32" else NEAR
        yield HuggingFace(f"hf_{dtype}", f"hf_{dtype}", runtimes.Transformers, _TRANSFORMERS, limit, dtype)
    yield Factored("hf_factors", "hf_factors", runtimes.Transformers, _TRANSFORMERS, SAME)
    for kind in gguf.KINDS:
        limit = {"f32": SAME, "q4_0": BROKEN}.get(kind, NEAR)
        yield GGUF(f"gguf_{kind}", f"{kind}.gguf", runtimes.LlamaCpp, _LLAMA, limit, kind)
    for kind in llama_cpp.KINDS:
        yield QuantizedGGUF(f"gguf_{kind}", f"{kind}.gguf", runtimes.LlamaCpp, _LLAMA, BROKEN, kind)
    yield Graph("torch_export", "model.pt2", runtimes.TorchExport, {}, SAME)
    yield Graph("aoti", "aoti.pt2", runtimes.Inductor, {}, SAME, is_compiled=True)
    yield ExecuTorch("executorch_fp32", "fp32.pte", runtimes.ExecuTorch, _EXECUTORCH, SAME)
    yield ExecuTorch("executorch_8da4w", "8da4w.pte", runtimes.ExecuTorch, _EXECUTORCH, BROKEN, is_quantized=True)


FORMATS: dict[str, Format] = {found.name: found for found in _formats()}
