"""What can be known to be wrong with how a config keeps its teacher, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from omegaconf import DictConfig
from torch import nn

from kd_recipes.compression.keeping import Keeping
from kd_recipes.errors import Problem
from kd_recipes.training.parallel import local_device, world_size
from kd_recipes.training.precision import DTYPES


def keeping_problems(cfg: DictConfig, key: str, section: DictConfig, model: nn.Module) -> Iterator[Problem]:
    """Why a teacher cannot be kept as the config says.

    Args:
        cfg: of a distillation, whose devices are there.
        key: of the teacher's section.
        section: its own ``device``, ``dtype``, ``quantization`` and ``cpu_offload``, where they are not the config's.
        model: the teacher on the meta device.

    Raises:
        ConfigError: the config names no such format.
    """
    device = local_device(section.get("device") or cfg.teacher_device or cfg.device)
    dtype = DTYPES.get(
        section.get("dtype") or cfg.teacher_dtype or cfg.dtype, torch.bfloat16
    )  # auto may yet become that
    is_split = world_size() > 1 and cfg.shard_teacher
    yield from Keeping.of(key, section, cfg).problems(model, dtype=dtype, device=device, is_split=is_split)
