"""Student and teacher, as a distillation's config describes them: built, loaded, split over the processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from omegaconf import DictConfig

from kd_recipes.losses import FeatureTerms
from kd_recipes.parts import CHECKPOINTERS, Loaded, load_model
from kd_recipes.students import Constraints, Student
from kd_recipes.teachers import OnlineTeacher
from kd_recipes.training.parallel import Parallel, Sharding, local_device
from kd_recipes.training.precision import DTYPES, resolve_dtype
from kd_recipes.training.preflight import asks_teacher


@dataclass(frozen=True)
class Pair:
    """Builds them.

    Args:
        cfg: of the distillation.
        dtype: that the student computes in.
        device: of the student.
        parallel: the processes.
        features: what the loss compares inside them.
    """

    cfg: DictConfig
    dtype: torch.dtype
    device: torch.device
    parallel: Parallel
    features: FeatureTerms

    def student(self, constraints: Constraints) -> Student:
        """The student, its weights held to ``constraints``."""
        cfg = self.cfg
        is_split = self.parallel.world_size > 1
        dtype = torch.float32 if is_split and cfg.master_weights else self.dtype  # FSDP computes in the one asked for
        loaded = self._load("model", dtype, self.device, is_split)
        student = Student(
            loaded.model,
            cfg.model,
            loaded.checkpointer,
            export_dtype=DTYPES.get(cfg.export_dtype, loaded.file_dtype),
            compute_dtype=self.dtype,
            schemes=constraints.attach(loaded.model),
            taps=self.features.student_taps,
            recompute_activations=cfg.enable_activation_checkpointing,
            offload_activations=cfg.enable_activation_offloading,
            compile_blocks=cfg.compile,
        )
        self.parallel.shard(student.model, self._sharding(self.dtype))
        return student

    def teacher(self) -> OnlineTeacher | None:
        """The teacher; None where nothing asks for one."""
        cfg = self.cfg
        if not asks_teacher(cfg):
            return None
        device = local_device(cfg.teacher_device or cfg.device)
        dtype = self.parallel.each(resolve_dtype(cfg.teacher_dtype or cfg.dtype, device))[0]
        is_split = self.parallel.world_size > 1 and cfg.shard_teacher
        loaded = self._load("teacher_model", dtype, device, is_split)
        teacher = OnlineTeacher(loaded.model, device, self.features.teacher_taps, compile_blocks=cfg.compile)
        if is_split:
            # without a backward pass, blocks that are not given back after the forward pass never are
            self.parallel.shard(teacher.model, replace(self._sharding(dtype), reshard_after_forward=True))
        return teacher

    def _load(self, key: str, dtype: torch.dtype, device: torch.device, is_split: bool) -> Loaded:
        """A model with its weights; one that is to be split is in the main process's host memory alone."""
        sections = (self.cfg[key], self.cfg[CHECKPOINTERS[key]])
        device = torch.device("cpu") if is_split else device
        return load_model(key, *sections, dtype=dtype, device=device, is_main=self.parallel.is_main or not is_split)

    def _sharding(self, dtype: torch.dtype) -> Sharding:
        cfg = self.cfg
        layers = tuple(cfg.custom_sharded_layers or ())
        return Sharding(dtype, cfg.fsdp_reshard_after_forward, layers, cfg.fsdp_cpu_offload)
