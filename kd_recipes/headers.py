"""What a checkpoint's files say of it before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from omegaconf import DictConfig, ListConfig

from kd_recipes.errors import ConfigError
from kd_recipes.tensor_files import TensorSpec, read_safetensors_header

_EMBEDDINGS = ("model.embed_tokens.weight", "tok_embeddings.weight")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")


def names_files(section: DictConfig) -> bool:
    """Whether a checkpointer section has ``checkpoint_files`` that :func:`checkpoint_files` can read."""
    files = section.get("checkpoint_files")
    is_pattern = isinstance(files, DictConfig) and {"filename_format", "max_filename"} <= files.keys()
    if is_pattern:
        return str(files.max_filename).isdecimal()
    return bool(isinstance(files, ListConfig) and files)


def checkpoint_files(section: DictConfig) -> list[Path]:
    """The files that a checkpointer section names, as paths."""
    files = section.checkpoint_files
    if isinstance(files, DictConfig):  # {filename_format: model-{}-of-{}.safetensors, max_filename: "00004"}
        last = str(files.max_filename)
        numbers = (str(number).zfill(len(last)) for number in range(1, int(last) + 1))
        files = [files.filename_format.format(number, last) for number in numbers]
    return [Path(section.checkpoint_dir) / str(name) for name in files]


def file_bytes(cfg: DictConfig, key: str) -> int | None:
    """Of the weights in the files of a checkpointer section; None where they are not there, or not whole."""
    section = cfg[key]
    if section is None or not {"checkpoint_dir", "checkpoint_files"} <= section.keys():
        return None
    try:
        read_specs(section)
        return sum(file.stat().st_size for file in checkpoint_files(section))
    except (ConfigError, OSError):
        return None


def read_specs(section: DictConfig) -> dict[str, TensorSpec]:
    """What the headers of a checkpoint's safetensors files say; nothing of files in other formats."""
    specs: dict[str, TensorSpec] = {}
    if "checkpoint_dir" in section:
        for path in checkpoint_files(section):
            if path.suffix == ".safetensors":
                specs |= read_safetensors_header(path)
    return specs


def embedding_shape(specs: Mapping[str, TensorSpec]) -> tuple[int, ...] | None:
    """Of the embedding; None where none is named."""
    return next((specs[name].shape for name in _EMBEDDINGS if name in specs), None)


def num_layers(specs: Mapping[str, TensorSpec]) -> int | None:
    """How many blocks they are of; None where none is named."""
    indices = [int(match.group(1)) for name in specs if (match := _LAYER.match(name))]
    return max(indices) + 1 if indices else None
