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
class Disk:
    """Of one run.

    Args:
        parts: name -> bytes.
        place: the directory that there is.
        free: bytes there.
        cache_bytes: most bytes of a token in a cached teacher's files, before they are compressed; None without one.
    """

    parts: dict[str, int]
    place: str
    free: int
    cache_bytes: float | None

    @property
    def total(self) -> int:
        """Bytes, without a cache."""
        return sum(self.parts.values())


def estimate_disk(cfg: DictConfig, *, checkpoint: int, student: int, num_ids: int) -> Disk:
    """What a distillation writes.

    Args:
        cfg: of it.
        checkpoint: bytes of one.
        student: bytes of its weights, for where its files are not here.
        num_ids: of the vocabulary.

    Raises:
        ConfigError: a cache's encoding cannot be built.
    """
    exports = 0 if cfg.save_adapter_weights_only else student * (1 if cfg.eval_dataset is None else 2)
    count = num_checkpoints(cfg)
    parts = {
        "students (best, final)": bytes_to_write(cfg).get("students", exports),
        f"checkpoints ({count} at most)": checkpoint * count,
    }
    place = nearest_existing(Path(cfg.output_dir))
    return Disk(parts, str(place), shutil.disk_usage(place).free, _cache_bytes(cfg, num_ids))


def _cache_bytes(cfg: DictConfig, num_ids: int) -> float | None:
    encoding = (cfg.teacher or {}).get("encoding")
    if encoding is None:
        return None
    built = build("teacher.encoding", encoding)
    bits = math.ceil(math.log2(num_ids)) + _LOG_BITS * (2 if built.is_drawn else 1)
    return float(built.width) * bits / 8 + _FACTS_BYTES
