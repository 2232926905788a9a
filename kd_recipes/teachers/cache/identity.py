"""What a cache is of: a teacher, a vocabulary, a temperature and an encoding; and how two of them differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_recipes.compression.checkpoint import file_stamps, weight_files
from kd_recipes.errors import ConfigError, Problem, one_line
from kd_recipes.headers import checkpoint_files, names_files
from kd_recipes.storage import atomic_directory, describe_files, is_inside, require_vacant, write_json
from kd_recipes.teachers.cache.encodings import encoding_of
from kd_recipes.teachers.cache.store import Writer, has_records, is_part
from kd_recipes.tokenizers import token_ids

FORMAT = 2
_ALL_FILES = 1  # the format whose caches name all safetensors of the teacher's directory, of which some may not be read
_FILE, _TOKENS = "cache.json", "token_ids.json"
_LEAST_AGREEMENT, _MOST_GAP = 0.9, 0.1  # of the likeliest ids; in nats
_AGAIN = "Choose another path for a cache of this one, or go back to what the cache was made with"


@dataclass(frozen=True)
class Identity:
    """What a cache is of.

    Args:
        model: the section that the teacher was built from.
        weights: its files: name -> size and SHA-256; of one that is known by what it says, ``probe`` -> that.
        stamps: name -> size and time of change, by which files that were hashed once are known again.
        tokens: SHA-256 of the token-to-id map, or of the tokenizer's file.
        temperature: of the distributions.
        num_ids: that they are over.
        encoding: its settings.
        dtype: that the teacher computed in.
        format: of the files.
        quantization: that the teacher's weights were in.
    """

    model: Mapping[str, Any]
    weights: Mapping[str, Any]
    stamps: Mapping[str, Any]
    tokens: str
    temperature: float
    num_ids: int
    encoding: Mapping[str, Any]
    dtype: str
    format: int = FORMAT
    quantization: Any = None

    @property
    def is_whole(self) -> bool:
        """Whether its teacher's whole distribution was known, and not a few ids of each position."""
        return "probe" not in self.weights

    def save(self, directory: Path, tokens: Mapping[str, int]) -> None:
        """Begin a cache with it, and with the map from tokens to ids; one that has no record is replaced.

        Raises:
            ConfigError: there is something else in the directory, it cannot be made, or another process adds to it.
        """
        try:
            with ExitStack() as stack:
                if _is_bare(directory):  # and stays so: no other process can add the first record
                    stack.enter_context(closing(Writer(directory, 0)))
                if not _is_bare(directory):
                    require_vacant(directory, key="teacher.path")
                with atomic_directory(directory) as temporary:
                    write_json(temporary / _TOKENS, tokens)
                    write_json(temporary / _FILE, asdict(self))
        except OSError as error:
            wanted = "a place where a directory can be made"
            raise ConfigError(Problem("teacher.path", str(directory), wanted, one_line(error))) from error

    @classmethod
    def load(cls, directory: Path) -> Identity | None:
        """That of a cache; None where there is none.

        Raises:
            ConfigError: it cannot be read.
        """
        file = directory / _FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version = content["format"]
            if version in (_ALL_FILES, FORMAT):
                identity = cls(**content)
                identity._require_sound()
                return identity
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(Problem(".path", str(file), "a cache.json that can be read", one_line(error))) from error
        raise ConfigError(Problem(".path", f"{directory}, format {version}", f"a cache of format {FORMAT}"))

    def _require_sound(self) -> None:
        """Refuse what no cache is of.

        Raises:
            ValueError, TypeError, KeyError: what is wrong.
        """
        encoding_of(self.encoding)
        for name in ("model", "weights", "stamps"):
            dict(getattr(self, name))
        if not (isinstance(self.num_ids, int) and self.num_ids > 0 and float(self.temperature) > 0):
            raise ValueError(f"num_ids {self.num_ids!r}, temperature {self.temperature!r}")


def _is_bare(directory: Path) -> bool:
    """Whether there is nothing but a cache that has no record."""
    files = [*directory.iterdir()] if directory.is_dir() else []
    is_cache = any(file.name == _FILE for file in files)
    return is_cache and all(f.name in (_FILE, _TOKENS) or is_part(f) for f in files) and not has_records(directory)


def quantization_of(cfg: DictConfig) -> Any:
    """What a config says of the teacher's weights: a name, or a section."""
    value = cfg.teacher_quantization
    return plain(value) if isinstance(value, DictConfig) else value


def plain(section: DictConfig) -> dict[str, Any]:
    """A section of a config without interpolations."""
    content: Any = OmegaConf.to_container(section, resolve=True)
    return dict(content)


def hash_tokens(section: DictConfig) -> tuple[str, dict[str, int]]:
    """What identifies a ``tokenizer:`` section's vocabulary, and its map from tokens to ids where that is known."""
    path = Path(str(section.get("path", "")))
    tokens = token_ids(path if path.is_dir() else path.parent) if path.name else None
    if tokens is not None:
        ordered = json.dumps(sorted(tokens.items(), key=lambda item: item[1]))
        return hashlib.sha256(ordered.encode()).hexdigest(), tokens
    content = path.read_bytes() if path.is_file() else json.dumps(plain(section), sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest(), {}


def teacher_directory(section: DictConfig) -> Path | None:
    """Where a checkpointer's weights are; None for one of the user's own, with other arguments."""
    directory = section.get("checkpoint_dir")
    return Path(directory) if isinstance(directory, str) else None


def hash_weights(section: DictConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Size and SHA-256 of a checkpointer's files, and their stamps; nothing where no file is known.

    Raises:
        ConfigError: a file cannot be read.
    """
    directory = teacher_directory(section)
    if directory is None:
        return {"checkpointer": plain(section)}, {}
    files = _files_of(section, directory)
    try:
        return describe_files(directory, files), file_stamps(directory, files)
    except OSError as error:
        wanted = "files that can be read"
        raise ConfigError(Problem("teacher_checkpointer", str(directory), wanted, one_line(error))) from error


def _files_of(section: DictConfig, directory: Path) -> list[Path]:
    """What a checkpointer reads: of the files that it names those that are there, or all safetensors of its model."""
    if not names_files(section):
        return weight_files(directory)
    return sorted(file for file in checkpoint_files(section) if file.is_file() and _is_below(file, directory))


def _is_below(file: Path, directory: Path) -> bool:
    return file.is_relative_to(directory) and is_inside(str(file.relative_to(directory)))


def differences(
    cache: Identity, cfg: DictConfig, directory: Path, source: Mapping[str, Any] | None = None
) -> Iterator[Problem]:
    """How the teacher and the vocabulary of a config differ from a cache's; keys are those of the config.

    Args:
        cache: what there is.
        cfg: of a distillation.
        directory: of the cache.
        source: what describes a teacher in the place of ``teacher_model``; None for none.
    """
    if source is not None:
        yield from _section_problems(cache, "teacher.source", source)
    else:
        if cfg.teacher_checkpointer is not None:
            yield from _weight_problems(cache, cfg.teacher_checkpointer)
        if cfg.teacher_model is not None:
            yield from _section_problems(cache, "teacher_model", plain(cfg.teacher_model))
        if cfg.teacher_model is not None and quantization_of(cfg) != cache.quantization:
            wanted = f"{cache.quantization}, as the cache was made with"
            yield Problem("teacher_quantization", quantization_of(cfg), wanted, _AGAIN)
    digest, tokens = hash_tokens(cfg.tokenizer)
    if digest != cache.tokens:
        got, known = str(cfg.tokenizer.get("path")), _known_tokens(directory) or tokens
        if changed := set(tokens.items()) ^ set(known.items()):
            token, _ = min(changed, key=lambda item: (item[1], item[0]))
            got = f"{token!r} is {tokens.get(token)} for the tokenizer and {known.get(token)} for the cache"
        yield Problem("tokenizer.path", got, "the tokenizer that the cache was made with", _AGAIN)


def _known_tokens(directory: Path) -> dict[str, int]:
    """The map from tokens to ids that a cache has; an empty one where it cannot be read."""
    try:
        return dict(json.loads((directory / _TOKENS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _section_problems(cache: Identity, key: str, new: Mapping[str, Any]) -> Iterator[Problem]:
    old = dict(cache.model)
    if dict(new) != old:
        name = next(name for name in sorted({*new, *old}) if new.get(name) != old.get(name))
        yield Problem(f"{key}.{name}", new.get(name), f"{old.get(name)}, as the cache was made with", _AGAIN)


def probe_problems(cache: Identity, said: Mapping[str, list[float]]) -> Iterator[Problem]:
    """How what a teacher says of a fixed text differs from what the cache's teacher said.

    A server gives other last digits to the same question from time to time, so that numbers need not be equal.
    """
    known = cache.weights["probe"]
    pairs = [*zip(known["likeliest"], said["likeliest"], strict=False)]
    agreement = sum(a == b for a, b in pairs) / max(len(pairs), 1)
    gaps = [abs(a - b) for a, b in zip(known["log_p"], said["log_p"], strict=False)]
    gap = sum(gaps) / max(len(gaps), 1)
    if len(known["likeliest"]) != len(said["likeliest"]) or agreement < _LEAST_AGREEMENT or gap > _MOST_GAP:
        got = f"a server whose model has {agreement:.0%} of the likeliest ids of a fixed text, {gap:.3f} nats apart"
        yield Problem("teacher.source.url", got, "the model that the cache was made of", _AGAIN)


def _weight_problems(cache: Identity, section: DictConfig) -> Iterator[Problem]:
    directory = teacher_directory(section)
    if not cache.weights:
        wanted = "a cache that knows its teacher's files"
        yield Problem("teacher.path", "one that does not, of an earlier version", wanted, "Make it again")
        return
    if directory is not None and file_stamps(directory, _files_of(section, directory)) == dict(cache.stamps):
        return  # hashing a large teacher takes a minute
    weights, _ = hash_weights(section)
    if cache.format == _ALL_FILES and weights and weights.items() <= cache.weights.items():
        return
    if weights != dict(cache.weights):
        name = next(n for n in sorted({*weights, *cache.weights}) if weights.get(n) != cache.weights.get(n))
        if name not in weights or name not in cache.weights:
            got = f"{directory}, of which {name} is {'' if name in weights else 'not '}read"
        else:
            got = f"{directory}, whose {name} is another one"
        yield Problem("teacher_checkpointer.checkpoint_dir", got, "the teacher that the cache was made of", _AGAIN)


def setting_problems(cache: Identity, wanted: Identity) -> Iterator[Problem]:
    """How settings for a cache differ from those of the one that is there."""
    keys = {"temperature": "temperature", "num_ids": "teacher_model", "encoding": "teacher.encoding"}
    for name, key in {**keys, "dtype": "teacher_dtype"}.items():
        new, old = getattr(wanted, name), getattr(cache, name)
        if new != old:
            what = f"{name} {new}" if name == "num_ids" else new
            yield Problem(key, what, f"{old}, as the cache was made with", _AGAIN)
