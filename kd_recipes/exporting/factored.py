"""A model whose products of factors stay factors, as a directory that transformers loads by the code beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from kd_recipes._torchtune.names import to_hf
from kd_recipes.compression.checkpoint import HFCheckpoint, block_of, write_checkpoint
from kd_recipes.compression.convert import as_tune, to_file
from kd_recipes.storage import atomic_directory

CODE = "modeling_factored"
_NAMES = {"llama": "FactoredLlama", "qwen2": "FactoredQwen2"}
_TABLE = "tok_embeddings"


def write_factored(source: HFCheckpoint, destination_dir: Path) -> None:
    """Write the directory, whole or not at all; codes on a lattice become float32 numbers, factors stay what they are.

    Args:
        source: a checkpoint with factors.
        destination_dir: to make.
    """
    with atomic_directory(destination_dir) as directory:
        inner = directory / "model"
        write_checkpoint(source, inner, _tensors(source), record=None, config=_config(source))
        for path in [*inner.iterdir()]:
            path.rename(directory / path.name)
        inner.rmdir()
        shutil.copyfile(Path(__file__).with_name(f"{CODE}.py"), directory / f"{CODE}.py")


def _tensors(source: HFCheckpoint) -> Iterator[tuple[str, Tensor]]:
    for block in dict.fromkeys(block_of(spec.name) for spec in source.specs):
        for key, tensor in as_tune(source, source.names(block)).items():
            yield from to_file({key: tensor.float() if source.schemes else tensor}, source.config)


def _config(source: HFCheckpoint) -> dict[str, Any]:
    name = _NAMES[source.config["model_type"]]
    is_tied = bool(source.config.get("tie_word_embeddings", False))
    ties_factors = is_tied and _TABLE in source.ranks
    dtypes = {key: "float32" for key in ("dtype", "torch_dtype") if key in source.config and source.schemes}
    return {
        **source.config,
        **dtypes,
        "model_type": name.replace("Factored", "factored_").lower(),
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE}.{name}Config",
            "AutoModelForCausalLM": f"{CODE}.{name}ForCausalLM",
        },
        "ranks": {to_hf(f"{layer}.weight").removesuffix(".weight"): list(r) for layer, r in source.ranks.items()},
        "ties_factors": ties_factors,
        "tie_word_embeddings": is_tied and not ties_factors,  # there is no one weight to tie to
    }
