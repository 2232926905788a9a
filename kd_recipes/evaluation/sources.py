"""Where a model of an evaluation comes from: a Hugging Face directory, a GGUF file, or sections of torchtune's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes.compression.checkpoint import read_checkpoint, sections, weight_files
from kd_recipes.errors import ConfigError, Problem, one_line, renamed
from kd_recipes.headers import checkpoint_files

WANTED = "a Hugging Face checkpoint directory, a .gguf file, or sections `model` and `checkpointer`"


@dataclass(frozen=True)
class Source:
    """A model that can be loaded.

    Args:
        place: its directory or file, as the config has it.
        model: section of the model.
        checkpointer: section of its weights.
        files: that hold them.
        description: its architecture in a line.
    """

    place: Path
    model: DictConfig
    checkpointer: DictConfig
    files: tuple[Path, ...]
    description: str

    @property
    def directory(self) -> Path:
        """Where its tokenizer lies, too."""
        return Path(self.checkpointer.get("checkpoint_dir", self.place))

    @property
    def num_bytes(self) -> int:
        """Of the weights on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def stamps(self) -> list[Any]:
        """What changes with the model: its sections, and size and time of change (ns) of its files."""
        found = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
        return [*found, *(OmegaConf.to_container(section) for section in (self.model, self.checkpointer))]


def is_gguf(value: Any) -> bool:
    """Whether a model is given as a GGUF file, which has to be imported before it can be loaded."""
    return isinstance(value, str) and value.endswith(".gguf")


def find_source(key: str, value: Any) -> Source:
    """A directory, or the sections of a model and its checkpointer, as a source.

    Raises:
        ConfigError: it is neither, or torchtune has no builder for it.
    """
    if isinstance(value, str):
        return _of_directory(key, Path(value))
    if not isinstance(value, DictConfig) or value.keys() != {"model", "checkpointer"}:
        raise ConfigError(Problem(key, value, WANTED))
    problems = [
        Problem(f"{key}.{name}", value[name], "a section with _component_")
        for name in ("model", "checkpointer")
        if not isinstance(value[name], DictConfig) or "_component_" not in value[name]
    ]
    if not problems and not {"checkpoint_dir", "checkpoint_files"} <= value.checkpointer.keys():
        problems = [Problem(f"{key}.checkpointer", [*value.checkpointer], "checkpoint_dir and checkpoint_files")]
    if problems:
        raise ConfigError(*problems)
    files = tuple(checkpoint_files(value.checkpointer))
    if missing := [str(file) for file in files if not file.is_file()]:
        raise ConfigError(Problem(f"{key}.checkpointer.checkpoint_files", missing, "files that exist"))
    description = str(value.model._component_).rpartition(".")[2]
    return Source(Path(value.checkpointer.checkpoint_dir), value.model, value.checkpointer, files, description)


def of_gguf(key: str, file: Path, imported: Path) -> Source:
    """A GGUF file, of which ``imported`` is the Hugging Face form."""
    found = _of_directory(key, imported)
    return replace(found, place=file, files=(file,), description=f"{found.description}, from {file.name}")


def _of_directory(key: str, directory: Path) -> Source:
    if not (directory / "config.json").is_file():
        raise ConfigError(Problem(key, str(directory), WANTED))
    try:
        found = renamed(key, lambda: sections(directory))
    except (KeyError, TypeError) as error:
        raise ConfigError(Problem(key, str(directory), WANTED, one_line(error))) from error
    files = tuple(weight_files(directory))
    return Source(directory, found.model, found.checkpointer, files, _architecture(directory))


def _architecture(directory: Path) -> str:
    checkpoint = read_checkpoint(directory)
    config: Mapping[str, Any] = checkpoint.config
    heads = f"{config['num_attention_heads']}/{config.get('num_key_value_heads', config['num_attention_heads'])} heads"
    parts = [
        f"{config['num_hidden_layers']} blocks",
        f"{config['hidden_size']} wide",
        f"{config['intermediate_size']} neurons",
        heads,
        *(["low-rank"] if checkpoint.ranks else []),
        *sorted(set(checkpoint.schemes.values())),
    ]
    return ", ".join(parts)
