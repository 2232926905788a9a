"""A student as a graph of torch.export, and compiled ahead of time by AOTInductor."""

# B sequences, S positions

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from kd_recipes.compression import sections
from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.parts import load_model
from kd_recipes.storage import atomic_file, scratch_directory


def load_student(source: HFCheckpoint) -> TransformerDecoder:
    """torchtune's model with a checkpoint's numbers, in float32, for evaluation."""
    found = sections(source.directory)
    settings: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    return load_model("checkpoint_dir", found.model, found.checkpointer, **settings).model.eval()


def trace(source: HFCheckpoint, max_seq_len: int) -> torch.export.ExportedProgram:
    """A graph from ids ``[1, S]`` to logits ``[1, S, V]`` for any S from 2 to ``max_seq_len``, in float32.

    Codes on a lattice have become the numbers that they stand for; factors stay factors.
    """
    model = load_student(source)
    length = torch.export.Dim("length", min=2, max=max_seq_len)
    example = torch.zeros(1, min(8, max_seq_len), dtype=torch.long)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes={"tokens": {1: length}}, strict=False)


def write_graph(source: HFCheckpoint, file: Path, max_seq_len: int) -> None:
    """Write the graph, to be loaded by ``torch.export.load``."""
    with _named_as(file) as unfinished:
        torch.export.save(trace(source, max_seq_len), str(unfinished))


def write_package(source: HFCheckpoint, file: Path, max_seq_len: int) -> None:
    """Compile the graph for this kind of machine, to be loaded by ``torch._inductor.aoti_load_package``.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    program = trace(source, max_seq_len)
    with _named_as(file) as unfinished, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch 2.13 of its own code
        torch._inductor.aoti_compile_and_package(program, package_path=str(unfinished))


@contextmanager
def _named_as(file: Path) -> Iterator[Path]:
    """An unfinished file that ends in ``.pt2``: torch warns of other names, and its compiler refuses them."""
    with scratch_directory(file) as scratch, atomic_file(file) as unfinished:
        yield scratch / file.name
        (scratch / file.name).rename(unfinished)
