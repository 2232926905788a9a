"""Checkpoints on disk as compression sees them: headers when one is read, a tensor at a time when one is written.

A dense model is a directory as transformers writes it. One whose weights are products of factors, or codes on a
lattice, is laid out alike, but its config.json is of a ``model_type`` that transformers refuses, since it would take
such weights for missing ones: ``{"model_type": "kd_recipes", "dense": config.json of the dense model, "ranks": …,
"schemes": …}``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem
from kd_recipes.models import COMPRESSED, checkpointer_model_type, model_section
from kd_recipes.storage import atomic_directory, is_inside, require_free_space, write_json
from kd_recipes.tensor_files import TensorSpec, read_safetensors_header

MAX_FILE_BYTES = 2_000_000_000
RECORD = "compression.json"
SECTIONS = "model.yaml"
_INDEX = "model.safetensors.index.json"
_BLOCK = re.compile(r"model\.layers\.(\d+)\..+")
_ADAPTER_REMEDY = (
    "It holds adapters alone. Run the distillation again with resume_from_checkpoint=True "
    "save_adapter_weights_only=False: final/ is then the student with its adapters merged. Other programs' adapters "
    "are merged by peft's merge_and_unload"
)
_COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)


@dataclass(frozen=True)
class HFCheckpoint:
    """A checkpoint on disk, of which only headers have been read.

    Args:
        directory: where it lies.
        config: config.json of the model, or of the dense one that it stands for.
        shards: file name -> the tensors in it.
        ranks: of the layers that are products of factors, the sizes between these, by torchtune's name of the layer.
        schemes: of the parameters that are codes on a lattice, by torchtune's name of the parameter.
    """

    directory: Path
    config: Mapping[str, Any]
    shards: Mapping[str, tuple[TensorSpec, ...]]
    ranks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    schemes: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return int(self.config["num_hidden_layers"])

    @property
    def is_dense(self) -> bool:
        """Whether its weights are matrices as they are, which transformers loads."""
        return not self.ranks and not self.schemes

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """All tensors."""
        return tuple(spec for specs in self.shards.values() for spec in specs)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(spec.num_bytes for spec in self.specs)

    def names(self, block: int | None) -> list[str]:
        """The tensors of a block; of None, those outside all blocks."""
        return [spec.name for spec in self.specs if block_of(spec.name) == block]

    def tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Some of its tensors, read one at a time."""
        file_of = {spec.name: file for file, specs in self.shards.items() for spec in specs}
        for name in names:
            with safe_open(self.directory / file_of[name], framework="pt") as file:
                yield name, file.get_tensor(name)


def block_of(name: str) -> int | None:
    """The number of the block that a tensor belongs to, by its name in the file; None if to none."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else None


def read_checkpoint(directory: Path) -> HFCheckpoint:
    """Read what a checkpoint's config.json, index and file headers say.

    Raises:
        ConfigError: no config.json, no safetensors files, one that the index names is missing or damaged, or the
            blocks in the files are not those that config.json counts.
    """
    written = _read_json(directory / "config.json")
    is_compressed = written.get("model_type") == COMPRESSED
    config = written["dense"] if is_compressed else written
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
        is_adapter = (directory / "adapter_config.json").is_file()
        raise ConfigError(Problem("checkpoint_dir", got, wanted, _ADAPTER_REMEDY if is_adapter else ""))
    shards = {name: tuple(read_safetensors_header(directory / name).values()) for name in names}
    forms = {name: written[name] for name in ("ranks", "schemes")} if is_compressed else {}
    checkpoint = HFCheckpoint(directory, config, shards, **forms)
    found = {block_of(spec.name) for spec in checkpoint.specs} - {None}
    if not found or found != set(range(config.get("num_hidden_layers", 0))):
        wanted = f"tensors model.layers.0 … for the {config.get('num_hidden_layers')} blocks of config.json"
        raise ConfigError(Problem("checkpoint_dir", f"{len(found)} blocks in {directory}", wanted))
    return checkpoint


def write_checkpoint(
    source: HFCheckpoint,
    destination_dir: Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    record: Mapping[str, object] | None,
    config: Mapping[str, Any] | None = None,
    ranks: Mapping[str, Sequence[int]] | None = None,
    schemes: Mapping[str, str] | None = None,
    num_bytes: int | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> HFCheckpoint:
    """Write what a checkpoint has become; the result is whole or absent.

    Beside the weights it holds config.json, the source's tokenizer, chat template and generation settings,
    ``compression.json`` (what was done, step by step) and ``model.yaml`` (the ``model:`` and ``checkpointer:`` sections
    of a recipe's config, where there is a builder for the model).

    Args:
        source: what it was.
        destination_dir: the directory to make.
        tensors: what it is now, by the names of Hugging Face's files; taken one at a time.
        record: what was done; what ``compression.json`` of the source says comes before it. None leaves it to
            :func:`settle`.
        config: config.json of the dense model; the source's by default.
        ranks: as :attr:`HFCheckpoint.ranks`, complete; filled while ``tensors`` are taken, if need be.
        schemes: likewise.
        num_bytes: of what is written, as far as is known; as much as the source by default, where there are no factors
            and no codes.
        max_file_bytes: tensors are gathered in memory to files of about this size.

    Returns:
        The checkpoint written.

    Raises:
        ConfigError: the disk has not so much room.
        StorageError: it is full.
    """
    if num_bytes is None:
        num_bytes = source.num_bytes if ranks is None and schemes is None else 0
    require_free_space(destination_dir, num_bytes, key="output_dir")
    with atomic_directory(destination_dir) as directory:
        _write_files(directory, tensors, max_file_bytes)
        write_json(directory / "config.json", compressed_config(config or source.config, ranks, schemes))
        write_json(directory / RECORD, {"steps": [*lineage(source.directory), *([] if record is None else [record])]})
        copy_companions(source.directory, directory)
        with suppress(ConfigError):  # there may be no builder to name; transformers loads it all the same
            OmegaConf.save(sections(directory, destination_dir), directory / SECTIONS)
    return read_checkpoint(destination_dir)


def settle(directory: Path, destination_dir: Path, record: Mapping[str, object], *, is_new: bool = False) -> None:
    """Make what a checkpointer has written say what has been done last, and where it will lie.

    torchtune's copy ``compression.json`` and ``model.yaml`` of the model that it was; ours knows its own directory.

    Args:
        directory: what has been written; changed in place.
        destination_dir: where it will be.
        record: what was done.
        is_new: whether a directory without ``compression.json`` gets one.
    """
    if is_new or (directory / RECORD).is_file():
        write_json(directory / RECORD, {"steps": [*lineage(directory), record]})
    if (directory / SECTIONS).is_file():
        OmegaConf.save(sections(directory, destination_dir), directory / SECTIONS)


def add_figures(directory: Path, figures: Mapping[str, object]) -> None:
    """Write beside what was done what it has cost, in ``compression.json``."""
    replace_record(directory, {**lineage(directory)[-1], "figures": figures})


def replace_record(directory: Path, record: Mapping[str, object]) -> None:
    """Say in ``compression.json`` what was done last, in the place of what it says; made where there is none."""
    steps = [*lineage(directory)[:-1], record]
    unfinished = directory / f".{RECORD}"
    write_json(unfinished, {"steps": steps})
    unfinished.replace(directory / RECORD)


def compressed_config(
    dense: Mapping[str, Any], ranks: Mapping[str, Sequence[int]] | None, schemes: Mapping[str, str] | None
) -> dict[str, Any]:
    """The config.json of a model whose dense form has the config ``dense``."""
    if not ranks and not schemes:
        return dict(dense)
    return {"model_type": COMPRESSED, "dense": dict(dense), "ranks": dict(ranks or {}), "schemes": dict(schemes or {})}


def lineage(directory: Path) -> list[Any]:
    """What was done to a checkpoint before, step by step."""
    path = directory / RECORD
    return list(_read_json(path)["steps"]) if path.is_file() else []


def sections(directory: Path, destination_dir: Path | None = None) -> Any:
    """The ``model:`` and ``checkpointer:`` sections of a recipe's config for a checkpoint.

    Args:
        directory: where it is.
        destination_dir: where it will be, if elsewhere.

    Raises:
        ConfigError: torchtune has no builder for it.
    """
    place = {"checkpoint_dir": str(destination_dir or directory)}
    config = _read_json(directory / "config.json")
    files = [path.name for path in weight_files(directory)]
    checkpointer: dict[str, Any] = {**place, "checkpoint_files": files}
    if config.get("model_type") == COMPRESSED:
        model = {"_component_": "kd_recipes.models.from_checkpoint", **place}
        checkpointer = {"_component_": "kd_recipes.compression.CompressedCheckpointer", **checkpointer}
    else:
        model = model_section(config)
        checkpointer = {"_component_": "torchtune.training.FullModelHFCheckpointer", **checkpointer}
        checkpointer["model_type"] = checkpointer_model_type(config)
    return OmegaConf.create({"model": model, "checkpointer": checkpointer})


def weight_files(directory: Path) -> list[Path]:
    """Those of the whole model: beside a merged one its adapter may lie."""
    return sorted(path for path in directory.glob("*.safetensors") if not path.name.startswith("adapter"))


def file_stamps(directory: Path, weights: Iterable[Path] | None = None) -> dict[str, list[int]]:
    """Size and time of change (ns) of what a model is read from: as good as a checksum for files that nobody forges.

    Args:
        directory: of its config.json.
        weights: files there; by default :func:`weight_files`.
    """
    found = weight_files(directory) if weights is None else weights
    files = [path for path in (directory / "config.json", *found) if path.is_file()]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def _write_files(directory: Path, tensors: Iterable[tuple[str, Tensor]], max_file_bytes: int) -> None:
    files: list[list[str]] = []
    gathered: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(gathered, directory / f"part-{len(files)}", metadata={"format": "pt"})
        files.append(list(gathered))
        gathered.clear()

    for name, tensor in tensors:
        gathered[name] = tensor.detach().cpu().contiguous()
        total += tensor.nbytes
        if sum(kept.nbytes for kept in gathered.values()) >= max_file_bytes:
            flush()
    if gathered:
        flush()
    if len(files) == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (directory / f"part-{number}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_model(source: Path, destination: Path) -> None:
    """Copy what a dense model is loaded from: config.json, weights, tokenizer, chat template, generation settings.

    Left out is what came of making it: ``compression.json``, ``model.yaml``, figures, adapters.
    """
    with atomic_directory(destination) as directory:
        for path in (source / "config.json", source / _INDEX, *weight_files(source)):
            if path.is_file():
                shutil.copyfile(path, directory / path.name)
        copy_companions(source, directory)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence."""
    for path in companions(source):
        shutil.copyfile(path, destination / path.name)


def companions(directory: Path) -> list[Path]:
    """Tokenizer, chat template, generation settings and licence of a model."""
    return sorted({path for pattern in _COMPANIONS for path in directory.glob(pattern) if path.is_file()})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"Only Hugging Face directories with safetensors can be compressed ({error})"
        raise ConfigError(Problem("checkpoint_dir", str(path), "a readable JSON file", remedy)) from error
    return content
