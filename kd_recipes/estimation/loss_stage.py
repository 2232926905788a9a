"""What the loss computes a chunk of tokens in: kd_recipes.losses.fused, or torchtune's own on all tokens at once."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from kd_recipes.estimation.rehearsal import LossBuffers
from kd_recipes.losses import TorchtuneObjective, build_divergence, choose_objective
from kd_recipes.losses.fused import choose_chunk_size, rows_at_a_time
from kd_recipes.parts import build
from kd_recipes.signals import LinearLogits
from kd_recipes.training.schedules import Schedule

_FLOAT32 = 4
# Bytes that autograd keeps of each logit of torchtune's losses, the most of them, and the gradient.
_TORCHTUNE_BYTES = 22 + 4


def loss_buffers(cfg: DictConfig, num_tokens: int, device: torch.device) -> LossBuffers:
    """The bytes of an objective, by the logits of student and teacher.

    Args:
        cfg: of a distillation.
        num_tokens: of a micro-batch, all of which count as having a label.
        device: whose kind decides how many of them make a chunk.

    Raises:
        ConfigError: the objective cannot be built.
    """
    temperature = Schedule.of(cfg.temperature).start
    objective = choose_objective(
        build("loss", cfg.loss),
        build_divergence("kd_loss", cfg.kd_loss),
        kd_ratio=Schedule.of(cfg.kd_ratio).start,
        temperature=temperature,
        teacher_temperature=cfg.teacher_temperature,
        label_smoothing=cfg.label_smoothing,
        chunk_size=cfg.chunk_size,
        token_weights=None,
        num_ids=None,
    )

    def whole(student: LinearLogits, teacher: LinearLogits | None) -> int:
        each = _TORCHTUNE_BYTES + student.dtype.itemsize + (teacher.dtype.itemsize if teacher is not None else 0)
        return num_tokens * student.num_rows * each

    def chunked(student: LinearLogits, teacher: LinearLogits | None) -> int:
        num_ids = min(student.num_rows, teacher.num_rows if teacher is not None else student.num_rows)
        size = min(num_tokens, cfg.chunk_size or choose_chunk_size(num_ids, device))
        rows = min(size, rows_at_a_time(num_ids, device))
        scratch = (4 if temperature == 1.0 else 5) * rows * num_ids * _FLOAT32
        given = size * num_ids * teacher.dtype.itemsize if teacher is not None else _sparse_bytes(cfg, num_tokens)
        return size * student.num_rows * student.dtype.itemsize + given + scratch

    return whole if isinstance(objective, TorchtuneObjective) else chunked


def _sparse_bytes(cfg: DictConfig, num_tokens: int) -> int:
    """Of a cached teacher's ids, log-probabilities and weights."""
    encoding = (cfg.teacher or {}).get("encoding")
    if encoding is None:
        return 0
    return num_tokens * int(build("teacher.encoding", encoding).width) * (8 + _FLOAT32 + _FLOAT32)
