"""What a distillation asks of its teacher, and what a ``teacher:`` section describes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torchtune.modules import TransformerDecoder

from kd_recipes.batch import Batch
from kd_recipes.errors import Problem
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

    def ahead(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The same batches, in their order, which the teacher is going to be asked about.

        One that has to be waited for can take some before they are asked for.
        """


def _nothing() -> None:
    """Nobody asks the run to end."""


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
        look_up: called from time to time while an answer is waited for; raises where the run is to end.
    """

    cfg: DictConfig
    tokenizer: object
    num_ids: int
    device: torch.device
    load: Callable[[str, DictConfig], OnlineTeacher]
    look_up: Callable[[], None] = _nothing


class TeacherSource(ABC):
    """A teacher that a ``teacher:`` section describes, in the place of ``teacher_model``. Building it is cheap."""

    @abstractmethod
    def problems(self, cfg: DictConfig) -> Iterable[Problem]:
        """What is wrong with it in a distillation of this config, before anything is loaded; keys begin with a dot."""

    def models(self) -> Mapping[str, DictConfig]:
        """The models that opening it loads: sections as ``load`` takes them, by their keys, which begin with a dot."""
        return {}

    def num_ids(self, num_rows: int) -> int:
        """How many ids student and teacher are to be compared over.

        Args:
            num_rows: of the student, or of the one with the fewest, the models of :meth:`models` included.
        """
        return num_rows

    def num_missing(self, batches: Iterable[Batch]) -> int:
        """How many documents of some batches it has no word on: none, unless it has to be prepared for them."""
        return 0

    @abstractmethod
    def open(self, around: Surroundings) -> Teacher:
        """Make it ready to be asked.

        Raises:
            ConfigError: it cannot be.
        """


class ProbedTeacher(Teacher, Protocol):
    """A teacher that is known by what it says."""

    def probe(self) -> dict[str, list[float]]:
        """``likeliest``: the likeliest id after each token of a fixed text; ``log_p``: its log-probability."""


class CacheableSource(TeacherSource):
    """A teacher that a cache can be made of, in the place of ``teacher_model``."""

    k: int  # most likeliest ids of a position that it tells

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a cache of it is known by, beside what it says."""

    @abstractmethod
    def open(self, around: Surroundings) -> ProbedTeacher:
        """As :meth:`TeacherSource.open`."""
