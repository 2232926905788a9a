"""Room that a run takes on the disk."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from kd_recipes.parts import build
from kd_recipes.training.disk import bytes_to_write, num_checkpoints
from kd_recipes.training.preflight import nearest_existing

_LOG_BITS = 12  # of a log-probability in a cache, and of a count
_FACTS_BYTES = 12  # of a position, whatever is kept of it


@dataclass(frozen=True)
class CacheRoom:
    """What a teacher has said, before it is compressed.

    Args:
        token_bytes: most bytes of a token.
        num_tokens: at most as many, if all that a run sees is new; None where it follows from the data.
        place: the directory that there is.
        free: bytes there.
    """

    token_bytes: float
    num_tokens: int | None
    place: str
    free: int

    @property
    def num_bytes(self) -> int | None:
        """The most bytes; None where they follow from the data."""
        return None if self.num_tokens is None else round(self.token_bytes * self.num_tokens)


@dataclass(frozen=True)
class Disk:
    """Of one run.

    Args:
        parts: name -> bytes.
        place: the directory that there is.
        free: bytes there.
        cache: of the teacher; None without one.
    """

    parts: dict[str, int]
    place: str
    free: int
    cache: CacheRoom | None

    @property
    def fits(self) -> bool:
        """Whether there is room, without a cache, of which much may be there, and what is new is compressed."""
        return sum(self.parts.values()) <= self.free


def estimate_disk(cfg: DictConfig, *, checkpoint: int, student: int, num_ids: int, num_tokens: int | None) -> Disk:
    """What a distillation writes.

    Args:
        cfg: of it.
        checkpoint: bytes of one.
        student: bytes of its weights, for where its files are not here.
        num_ids: of the vocabulary.
        num_tokens: that the run sees at most; None where they follow from the data.

    Raises:
        ConfigError: a cache's encoding cannot be built.
    """
    exports = 0 if cfg.save_adapter_weights_only else student * (1 if cfg.eval_dataset is None else 2)
    count = num_checkpoints(cfg)
    parts = {
        "students (best, final)": bytes_to_write(cfg).get("students", exports),
        f"checkpoints ({count} at most)": checkpoint * count,
    }
    place, free = _free(cfg.output_dir)
    return Disk(parts, place, free, _cache(cfg, num_ids, num_tokens))


def _free(path: str) -> tuple[str, int]:
    """The directory that there is on the way to another, and the bytes that are free there."""
    place = nearest_existing(Path(path))
    return str(place), shutil.disk_usage(place).free


def _cache(cfg: DictConfig, num_ids: int, num_tokens: int | None) -> CacheRoom | None:
    encoding = (cfg.teacher or {}).get("encoding")
    if encoding is None:
        return None
    built = build("teacher.encoding", encoding)
    bits = math.ceil(math.log2(num_ids)) + _LOG_BITS * (2 if built.is_drawn else 1)
    return CacheRoom(float(built.width) * bits / 8 + _FACTS_BYTES, num_tokens, *_free(cfg.teacher.path))
