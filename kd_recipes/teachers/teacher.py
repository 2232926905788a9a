"""What a distillation asks of its teacher, and what a ``teacher:`` section describes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.modules import TransformerDecoder

from kd_recipes.batch import Batch
from kd_recipes.errors import Problem
from kd_recipes.losses import build_divergence
from kd_recipes.signals import Signal
from kd_recipes.teachers.online import OnlineTeacher


class Teacher(Protocol):
    """From a batch to what the teacher says of it."""

    @property
    def online(self) -> OnlineTeacher | None:
        """The model that writes texts; None where no model is here."""

    @property
    def models(self) -> Sequence[TransformerDecoder]:
        """Those that are here, whose memory and operations are counted."""

    def signal(self, batch: Batch) -> Signal:
        """The teacher's distribution at each position that has a label.

        Args:
            batch: on the student's device.
        """


@dataclass(frozen=True)
class Surroundings:
    """What a teacher is opened with.

    Args:
        cfg: of the distillation.
        tokenizer: of torchtune's protocol.
        num_ids: ids that the student has, without the padding of its vocabulary.
        device: of the student.
        load: loads a model: (its key for messages, a section of ``model``, ``checkpointer`` and, where they are not to
            be those of the config, ``dtype``, ``device``, ``quantization`` and ``cpu_offload``) -> a teacher that runs
            here.
    """

    cfg: DictConfig
    tokenizer: object
    num_ids: int
    device: torch.device
    load: Callable[[str, DictConfig], OnlineTeacher]


class TeacherSource(ABC):
    """A teacher that a ``teacher:`` section describes, in the place of ``teacher_model``. Building it is cheap."""

    @abstractmethod
    def problems(self, cfg: DictConfig) -> Iterable[Problem]:
        """What is wrong with it in a distillation of this config, before anything is loaded; keys begin with a dot."""

    def models(self) -> Mapping[str, DictConfig]:
        """The models that opening it loads: sections as ``load`` takes them, by their keys, which begin with a dot."""
        return {}

    def num_missing(self, batches: Iterable[Batch]) -> int:
        """How many documents of some batches it has no word on: none, unless it has to be prepared for them."""
        return 0

    @abstractmethod
    def open(self, around: Surroundings) -> Teacher:
        """Make it ready to be asked.

        Raises:
            ConfigError: it cannot be.
        """


def own_divergence_problems(cfg: DictConfig, reason: str) -> Iterator[Problem]:
    """A ``kd_loss`` of torchtune's, where the teacher is none that gives logits.

    Args:
        cfg: of the distillation.
        reason: why it does not do.
    """
    kd_loss = build_divergence("kd_loss", cfg.kd_loss)
    if isinstance(kd_loss, nn.Module):
        remedy = "kd_recipes.losses.ForwardKL has the gradient of theirs"
        yield Problem("kd_loss", type(kd_loss).__name__, f"a divergence of kd_recipes.losses: {reason}", remedy)
