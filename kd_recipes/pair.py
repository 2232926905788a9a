"""Student and teacher, as a distillation's config describes them: built, loaded, split over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from kd_recipes._torchtune import ModelSize
from kd_recipes.compression.keeping import Keeping
from kd_recipes.errors import ConfigError, Problem, within
from kd_recipes.losses import FeatureTerms
from kd_recipes.parts import Loaded, build, build_model, load_model
from kd_recipes.students import Constraints, Student
from kd_recipes.teachers import OnlineTeacher, Surroundings, Teacher, TeacherSource
from kd_recipes.teachers.loading import load_frozen
from kd_recipes.training.data import Loader
from kd_recipes.training.parallel import Parallel, Sharding, local_device
from kd_recipes.training.precision import DTYPES, resolve_dtype
from kd_recipes.training.preflight import asks_teacher, check_source, loads_teacher_model


def teacher_source(cfg: DictConfig) -> TeacherSource | None:
    """What a ``teacher:`` section describes; None where there is none or no use for it.

    Raises:
        ConfigError: it is no such section, or something is wrong with the files of the models that it names.
    """
    section = cfg.teacher
    if section is None or not asks_teacher(cfg):
        return None
    source = within("teacher", lambda: build("teacher", section))
    if not isinstance(source, TeacherSource):
        raise ConfigError(Problem("teacher", section._component_, "a kd_recipes.teachers.TeacherSource"))
    within("teacher", lambda: check_source(cfg, source.models()))
    return source


def shared_ids(sizes: Sequence[ModelSize], source: TeacherSource | None) -> int:
    """How many ids student and teacher are compared over: those that both have, and that the teacher's word is over.

    Args:
        sizes: of the models that are in the config.
        source: of :func:`teacher_source`.
    """
    num_rows = min(size.num_rows for size in sizes)
    return num_rows if source is None else within("teacher", lambda: source.num_ids(num_rows))


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
        loaded = self._load("model", cfg.model, cfg.checkpointer, dtype, self.device, is_split)
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

    def compare(self, source: TeacherSource | None, data: Mapping[str, Loader | None]) -> None:
        """Compare a teacher with the config, and with what it will be asked about.

        Args:
            source: of :func:`teacher_source`.
            data: by the key of its section.

        Raises:
            ConfigError: it does not suit them.
        """
        if source is not None:
            within("teacher", lambda: self._compare(source, data))

    def _compare(self, source: TeacherSource, data: Mapping[str, Loader | None]) -> None:
        if problems := [*source.problems(self.cfg)] or [*self._missing(source, data)]:
            raise ConfigError(*problems)

    def _missing(self, source: TeacherSource, data: Mapping[str, Loader | None]) -> Iterator[Problem]:
        for key, loader in data.items():
            rows = tqdm(loader.rows_once() if loader else (), key, leave=False, disable=not self.parallel.is_main)
            if count := self.parallel.sum(source.num_missing(rows)):
                wanted = "documents that the teacher has been asked about"
                remedy = "tune run kd_recipes.cache_teacher with this config adds what is missing"
                yield Problem(key, f"{count:,} that are missing, or have other labels", wanted, remedy)

    def teacher(
        self, source: TeacherSource | None, tokenizer: Any, num_ids: int, look_up: Callable[[], None] | None = None
    ) -> Teacher | None:
        """The teacher; None where nothing asks for one.

        Args:
            source: that it comes from; None for ``teacher_model``.
            tokenizer: of torchtune's protocol.
            num_ids: ids that the student has, without padding.
            look_up: called while a server is waited for; raises where the run is to end.
        """
        if source is not None:
            teacher = source.open(self.surroundings(tokenizer, num_ids, look_up))
            is_watched = self.cfg.health is not None and self.cfg.eval_dataset is not None
            if teacher.online is None and is_watched and self.parallel.is_main:
                print("health: no teacher model is loaded that could write texts, so what texts tell is not watched")
            return teacher
        if not loads_teacher_model(self.cfg):
            return None
        section = {"model": self.cfg.teacher_model, "checkpointer": self.cfg.teacher_checkpointer}
        return self._load_teacher("teacher_model", DictConfig(section))

    def surroundings(self, tokenizer: Any, num_ids: int, look_up: Callable[[], None] | None = None) -> Surroundings:
        """What a teacher is opened with; arguments as of :meth:`teacher`."""
        around = Surroundings(self.cfg, tokenizer, num_ids, self.device, self._load_teacher)
        if look_up is None or self.parallel.world_size > 1:  # others would wait for one that ends within a step
            return around
        return replace(around, look_up=look_up)

    def _load_teacher(self, key: str, section: DictConfig) -> OnlineTeacher:
        """A teacher that runs beside the student: see :class:`~kd_recipes.teachers.Surroundings`."""
        cfg = self.cfg
        device = local_device(section.get("device") or cfg.teacher_device or cfg.device)
        wanted = section.get("dtype") or cfg.teacher_dtype or cfg.dtype
        dtype = self.parallel.each(resolve_dtype(wanted, device))[0]
        is_split = self.parallel.world_size > 1 and cfg.shard_teacher
        keeping = Keeping.of(key, section, cfg)
        skeleton = build_model(key, section.model, dtype=dtype, device=torch.device("meta"))
        if keeping.is_plain(skeleton):
            model = self._load(key, section.model, section.checkpointer, dtype, device, is_split).model
        elif problems := [*keeping.problems(skeleton, dtype=dtype, device=device, is_split=is_split)]:
            raise ConfigError(*problems)
        else:
            model = load_frozen(key, section.model, section.checkpointer, keeping, dtype=dtype, device=device)
        is_compiled = cfg.compile and not keeping.cpu_offload  # hooks that wait for a copy are not to be traced
        teacher = OnlineTeacher(model, device, self.features.teacher_taps, compile_blocks=is_compiled)
        if is_split:
            # without a backward pass, blocks that are not given back after the forward pass never are
            self.parallel.shard(teacher.model, replace(self._sharding(dtype), reshard_after_forward=True))
        return teacher

    def _load(
        self,
        key: str,
        model: DictConfig,
        checkpointer: DictConfig,
        dtype: torch.dtype,
        device: torch.device,
        is_split: bool,
    ) -> Loaded:
        """A model with its weights; one that is to be split is in the main process's host memory alone."""
        device = torch.device("cpu") if is_split else device
        return load_model(
            key, model, checkpointer, dtype=dtype, device=device, is_main=self.parallel.is_main or not is_split
        )

    def _sharding(self, dtype: torch.dtype) -> Sharding:
        cfg = self.cfg
        layers = tuple(cfg.custom_sharded_layers or ())
        return Sharding(dtype, cfg.fsdp_reshard_after_forward, layers, cfg.fsdp_cpu_offload)
