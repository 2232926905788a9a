"""Write a Hugging Face checkpoint without some of its blocks, from file to file.

A kept tensor is copied as it is, so nothing is lost to a conversion, and one tensor is in memory at a time.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.models import model_section
from kd_recipes.storage import (
    TensorSpec,
    atomic_directory,
    is_inside,
    read_safetensors_header,
    require_free_space,
    write_json,
    write_safetensors,
)

MAX_FILE_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"
_RECORD = "pruning.json"
_BLOCK = re.compile(r"(model\.layers\.)(\d+)(\..+)")
_PER_BLOCK_LISTS = ("layer_types", "no_rope_layers")  # in config.json: an entry for each block
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class HFCheckpoint:
    """A Hugging Face checkpoint on disk, of which only headers have been read.

    Args:
        directory: where it lies.
        config: its config.json.
        shards: file name -> the tensors in it.
    """

    directory: Path
    config: Mapping[str, Any]
    shards: Mapping[str, tuple[TensorSpec, ...]]

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return int(self.config["num_hidden_layers"])

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors."""
        return tuple(spec for specs in self.shards.values() for spec in specs)


def read_checkpoint(directory: Path) -> HFCheckpoint:
    """Read what a checkpoint's config.json, index and file headers say.

    Raises:
        ConfigError: no config.json, no safetensors files, one that the index names is missing or damaged, or the
            blocks in the files are not those that config.json counts.
    """
    config = _read_json(directory / "config.json")
    if (directory / _INDEX).is_file():
        names = sorted(set(_read_json(directory / _INDEX).get("weight_map", {}).values()))
    else:
        names = [path.name for path in directory.glob("model.safetensors")]
    if outside := [name for name in names if not is_inside(name)]:
        raise ConfigError(Problem(f"{directory / _INDEX}", outside, "files in its own directory"))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing or not names:
        wanted = "a directory with all its safetensors files"
        got = f"{directory} without {', '.join(missing) or 'model.safetensors'}"
        raise ConfigError(Problem("checkpointer.checkpoint_dir", got, wanted))
    shards = {name: tuple(read_safetensors_header(directory / name).values()) for name in names}
    checkpoint = HFCheckpoint(directory, config, shards)
    found = {int(match[2]) for spec in checkpoint.specs if (match := _BLOCK.fullmatch(spec.name))}
    if not found or found != set(range(config.get("num_hidden_layers", 0))):
        wanted = f"tensors model.layers.0 … for the {config.get('num_hidden_layers')} blocks of config.json"
        raise ConfigError(Problem("checkpointer.checkpoint_dir", f"{len(found)} blocks in {directory}", wanted))
    return checkpoint


@dataclass(frozen=True)
class Edit:
    """What becomes of a tensor.

    Args:
        spec: in the new checkpoint.
        apply: from the tensor to the new one, of the same dtype; None copies it.
    """

    spec: TensorSpec
    apply: Callable[[Tensor], Tensor] | None = None


def rewrite_checkpoint(
    source: HFCheckpoint,
    destination_dir: Path,
    config: Mapping[str, Any],
    edit: Callable[[TensorSpec], Edit | None],
    *,
    record: Mapping[str, object],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> HFCheckpoint:
    """Write a checkpoint with other tensors; what is only copied is the same bit for bit.

    The result is whole or absent. Beside the weights it holds config.json, the source's tokenizer, chat template and
    generation settings, ``pruning.json`` (what was done), and ``model.yaml`` (the ``model:`` section of a torchtune
    config, where there is a builder for the model).

    Args:
        source: a checkpoint.
        destination_dir: the directory to make.
        config: the new config.json.
        edit: what becomes of a tensor; None leaves it out.
        record: what ``pruning.json`` says; what the source's says comes before it.
        max_file_bytes: weights of less than this go into one file; others into one a file of the source.

    Returns:
        The checkpoint written.

    Raises:
        ConfigError: the disk is full.
    """
    edits = {spec.name: made for spec in source.specs if (made := edit(spec)) is not None}
    num_bytes = sum(made.spec.num_bytes for made in edits.values())
    require_free_space(destination_dir, num_bytes, key="output_dir")
    before = source.directory / _RECORD
    lineage = [*(_read_json(before)["steps"] if before.is_file() else []), record]
    with atomic_directory(destination_dir) as directory:
        _write_weights(source, directory, edits, is_sharded=num_bytes >= max_file_bytes)
        write_json(directory / "config.json", config)
        write_json(directory / _RECORD, {"steps": lineage})
        _copy_companions(source.directory, directory)
        with suppress(ConfigError):  # there may be no builder to name; transformers loads it all the same
            OmegaConf.save({"model": model_section(config)}, directory / "model.yaml")
    return read_checkpoint(destination_dir)


def prune_depth_checkpoint(
    source_dir: Path,
    destination_dir: Path,
    keep: Sequence[int],
    *,
    record: Mapping[str, object] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> HFCheckpoint:
    """Write a checkpoint that has only some blocks of another; everything else in it is the same, bit for bit.

    Args:
        source_dir: a Hugging Face directory with safetensors.
        destination_dir: the directory to make; see :func:`rewrite_checkpoint`.
        keep: blocks to keep, ascending; they are numbered anew.
        record: what else ``pruning.json`` should say.
        max_file_bytes: as in :func:`rewrite_checkpoint`.

    Returns:
        The checkpoint written.

    Raises:
        ConfigError: ``keep`` names no block or one that is not there, the source cannot be read (see
            :func:`read_checkpoint`), or the disk is full.
    """
    source = read_checkpoint(source_dir)
    if not keep or sorted(set(keep) & set(range(source.num_layers))) != list(keep):
        raise ConfigError(Problem("keep", list(keep), f"ascending indices of {source.num_layers} blocks"))

    def edit(spec: TensorSpec) -> Edit | None:
        name = _pruned_name(spec.name, keep)
        return None if name is None else Edit(replace(spec, name=name))

    summary = {"source": str(source_dir), "num_blocks": source.num_layers, "kept_blocks": list(keep)}
    config = pruned_config(source.config, keep)
    return rewrite_checkpoint(
        source, destination_dir, config, edit, record={**summary, **(record or {})}, max_file_bytes=max_file_bytes
    )


def pruned_config(config: Mapping[str, Any], keep: Sequence[int]) -> dict[str, Any]:
    """A config.json for the model that has only the blocks ``keep``."""
    pruned = {**config, "num_hidden_layers": len(keep)}
    for name in _PER_BLOCK_LISTS:
        if config.get(name):
            pruned[name] = [config[name][index] for index in keep]
    if config.get("max_window_layers") is not None:  # blocks from this one on attend to a sliding window
        pruned["max_window_layers"] = sum(index < config["max_window_layers"] for index in keep)
    return pruned


def _pruned_name(name: str, keep: Sequence[int]) -> str | None:
    """The tensor's name in the pruned checkpoint, None if it is not there."""
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    index = int(match[2])
    return f"{match[1]}{keep.index(index)}{match[3]}" if index in keep else None


def _write_weights(source: HFCheckpoint, directory: Path, edits: Mapping[str, Edit], *, is_sharded: bool) -> None:
    kept = {file: [spec for spec in specs if spec.name in edits] for file, specs in source.shards.items()}
    files = [[(file, spec) for spec in specs] for file, specs in kept.items() if specs]
    if not is_sharded:
        _write_file(source, directory / "model.safetensors", [pair for file in files for pair in file], edits)
        return
    weight_map: dict[str, str] = {}
    for number, pairs in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(source, directory / name, pairs, edits)
        weight_map |= {edits[spec.name].spec.name: name for _, spec in pairs}
    total_size = sum(edits[spec.name].spec.num_bytes for pairs in files for _, spec in pairs)
    write_json(directory / _INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_file(
    source: HFCheckpoint, path: Path, pairs: Sequence[tuple[str, TensorSpec]], edits: Mapping[str, Edit]
) -> None:
    """Write one file of (source file, tensor) pairs."""
    pairs = sorted(pairs, key=lambda pair: -pair[1].dtype.itemsize)  # write_safetensors aligns wider dtypes first
    specs = [edits[spec.name].spec for _, spec in pairs]
    write_safetensors(path, specs, _edited_tensors(source.directory, pairs, edits))


def _edited_tensors(
    directory: Path, pairs: Sequence[tuple[str, TensorSpec]], edits: Mapping[str, Edit]
) -> Iterator[Tensor]:
    for file, spec in pairs:
        apply = edits[spec.name].apply
        with safe_open(directory / file, framework="pt") as tensors:
            tensor = tensors.get_tensor(spec.name)
            yield tensor if apply is None else apply(tensor).to(spec.dtype).contiguous()


def _copy_companions(source: Path, destination: Path) -> None:
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, destination / path.name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"Only Hugging Face directories with safetensors can be pruned ({error})"
        raise ConfigError(Problem("checkpointer.checkpoint_dir", str(path), "a readable JSON file", remedy)) from error
    return content
