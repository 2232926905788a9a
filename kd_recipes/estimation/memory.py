"""Memory of a device through a run: loading, steps, checkpoints, export."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.compression.keeping import Keeping
from kd_recipes.errors import one_line
from kd_recipes.estimation.ledger import CUDA, GLIBC, Ledger
from kd_recipes.estimation.loss_stage import loss_buffers
from kd_recipes.estimation.machine import Machine, program_bytes
from kd_recipes.estimation.optimizers import OptimizerCost, optimizer_cost
from kd_recipes.estimation.rehearsal import Rehearsal, Shape, rehearse
from kd_recipes.headers import file_bytes
from kd_recipes.parts import build_model
from kd_recipes.students import Constraints
from kd_recipes.training.precision import DTYPES
from kd_recipes.training.preflight import loads_teacher_model

_CHECKPOINT_FILE = 2**30  # bytes; kd_recipes.training.sharded writes files of that size, each made up in memory twice


@dataclass(frozen=True)
class Weights:
    """Of a model, on one device.

    Args:
        resident: bytes of each tensor that stays.
        gathered: bytes that are whole for a while, or as long as a step lasts, where the model is split.
        one_by_one: whether a tensor is read when the one before it is in the model.
    """

    resident: list[float]
    gathered: int = 0
    one_by_one: bool = False

    @property
    def total(self) -> int:
        """Bytes."""
        return round(sum(self.resident)) + self.gathered


@dataclass(frozen=True)
class Memory:
    """Of one device.

    Args:
        parts: name -> bytes; not all are there at the same time.
        peaks: phase -> the most bytes in it, program included.
        checkpoint: bytes of one on disk, of all devices.
        notes: what is not counted.
    """

    parts: dict[str, int]
    peaks: dict[str, int]
    checkpoint: int
    notes: list[str]

    @property
    def peak(self) -> int:
        """The most bytes."""
        return max(self.peaks.values())

    @property
    def phase(self) -> str:
        """In which they are."""
        return max(self.peaks, key=self.peaks.__getitem__)


@dataclass(frozen=True)
class Question:
    """What memory is estimated for.

    Args:
        cfg: of a distillation.
        machine: that it runs on.
        length: tokens of a sequence.
        program: bytes of this process before any model was built.
    """

    cfg: DictConfig
    machine: Machine
    length: int
    program: int

    @property
    def dtype(self) -> torch.dtype:
        """That the student computes in."""
        return DTYPES[self.cfg.dtype]

    @property
    def is_split(self) -> bool:
        """Whether there is more than one process."""
        return self.machine.num_devices > 1

    @property
    def shard_size(self) -> int:
        """Devices that share a model."""
        return int(self.cfg.shard_size or self.machine.num_devices)

    @property
    def shape(self) -> Shape:
        """Of a step's micro-batches."""
        cfg = self.cfg
        return Shape(cfg.batch_size, self.length, is_packed(cfg), cfg.gradient_accumulation_steps)

    def student(self) -> TransformerDecoder:
        """On the meta device, what is frozen frozen, as the recipe changes it."""
        model = build_model("model", self.cfg.model, dtype=self.dtype, device=torch.device("meta"))
        Constraints.build("student_constraints", self.cfg.student_constraints, self.cfg).attach(model)
        _torchtune.freeze_all_but_adapters(model)
        return model

    @property
    def teacher_dtype(self) -> torch.dtype:
        """That ``teacher_model`` computes in."""
        name = self.cfg.teacher_dtype or self.cfg.dtype
        return DTYPES[self.cfg.dtype if name == "auto" else name]

    @property
    def keeping(self) -> Keeping:
        """How the weights of ``teacher_model`` are kept."""
        return Keeping.of("teacher_model", self.cfg.teacher_model, self.cfg)

    def teacher(self) -> TransformerDecoder | None:
        """Likewise; None where no model runs beside the student."""
        return self.named_teacher() if loads_teacher_model(self.cfg) else None

    def named_teacher(self) -> TransformerDecoder | None:
        """``teacher_model``, also where a cache answers in its place; None where the config has none."""
        if self.cfg.teacher_model is None:
            return None
        model = build_model(
            "teacher_model", self.cfg.teacher_model, dtype=self.teacher_dtype, device=torch.device("meta")
        )
        return model.requires_grad_(False)


def is_packed(cfg: DictConfig) -> bool:
    """Whether the training data is."""
    sections = cfg.dataset if not isinstance(cfg.dataset, DictConfig) else [cfg.dataset]
    return any(section.get("packed", False) for section in sections)


def estimate_memory(question: Question) -> Memory:
    """Go through a run without data.

    Raises:
        ConfigError: a model or the optimizer cannot be built.
    """
    cfg, machine = question.cfg, question.machine
    student, teacher = question.student(), question.teacher()
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    has_masters = bool(cfg.master_weights) and question.dtype is not torch.float32
    masters = [] if question.is_split or not has_masters else [4.0 * p.numel() for p in trained]
    weights, teaching, notes = _student_weights(student, question), Weights([]), [*_not_counted(cfg)]
    if teacher is not None:
        packed: dict[str, int] = {}
        try:
            packed = question.keeping.packed_bytes(teacher, question.teacher_dtype)
        except Exception as error:  # this device may lack what the other has
            notes.append(f"teacher_quantization, which cannot be tried here: {one_line(error)}")
        teaching = _teacher_weights(teacher, packed, question)
    numel = [parameter.numel() / (question.shard_size if question.is_split else 1) for parameter in trained]
    kept_dtype = torch.float32 if has_masters else question.dtype
    cost = optimizer_cost(cfg.optimizer, kept_dtype, is_cuda=machine.kind == "cuda")
    rehearsal = rehearse(
        student,
        teacher,
        question.shape,
        master_weights=has_masters and not question.is_split,
        recompute_activations=cfg.enable_activation_checkpointing,
        loss_buffers=loss_buffers(cfg, question.shape.num_tokens, machine.device),
    )
    run = _Run(question, weights, teaching, masters, numel, kept_dtype, cost, rehearsal)
    checkpoint = round(run.checkpoint * (question.shard_size if question.is_split else 1))
    return Memory(run.parts(), run.play(), checkpoint, notes)


def _student_weights(model: TransformerDecoder, question: Question) -> Weights:
    if not question.is_split:
        return Weights(list(_sizes(model).values()))
    kept = torch.float32 if question.cfg.master_weights else question.dtype
    sizes = [p.numel() * kept.itemsize / question.shard_size for p in model.parameters()]
    return Weights(sizes, _gathered(_sizes(model)))


def _teacher_weights(model: TransformerDecoder, packed: Mapping[str, int], question: Question) -> Weights:
    if question.cfg.teacher_device not in (None, question.cfg.device):
        return Weights([])
    keeping = question.keeping
    sizes = {**_sizes(model), **packed}
    if keeping.cpu_offload:
        return Weights([], _gathered(sizes), one_by_one=True)
    if not (question.is_split and question.cfg.shard_teacher):
        return Weights(list(sizes.values()), one_by_one=not keeping.is_plain(model))
    return Weights([size / question.shard_size for size in sizes.values()], _gathered(sizes))


def _sizes(model: nn.Module) -> dict[str, float]:
    """Bytes of the tensors, also of those that are made of others."""
    return {name: float(parameter.numel() * _itemsize(parameter)) for name, parameter in model.named_parameters()}


def _itemsize(parameter: Any) -> float:
    is_nf4 = type(parameter.data).__name__ == "NF4Tensor"
    return 0.5 + 1 / 64 + 4 / 16384 if is_nf4 else float(parameter.dtype.itemsize)  # codes, and scales of blocks


def _gathered(sizes: Mapping[str, float]) -> int:
    """What is whole on a device: all that is in no block, and two blocks, of which one is being fetched."""
    blocks: defaultdict[str, float] = defaultdict(float)
    for name, size in sizes.items():
        if name.startswith("layers."):
            blocks[name.split(".")[1]] += size
    return round(sum(sizes.values()) - sum(blocks.values()) + 2 * max(blocks.values()))


@dataclass
class _Run:
    question: Question
    weights: Weights
    teaching: Weights
    masters: list[float]
    numel: list[float]  # of the trained weights, on this device
    kept_dtype: torch.dtype  # of the weights that the optimizer works on
    cost: OptimizerCost
    rehearsal: Rehearsal

    @property
    def _grad_share(self) -> float:
        """Of a gradient that was rehearsed, what a device keeps of it."""
        if not self.question.is_split:
            return 1.0
        return self.kept_dtype.itemsize / self.question.dtype.itemsize / self.question.shard_size

    @property
    def _gradients(self) -> list[float]:
        return [numel * self.kept_dtype.itemsize for numel in self.numel]

    @property
    def _moments(self) -> list[float]:
        """Two equal parts of what the optimizer keeps of each weight: it is Adam's, or smaller."""
        return [numel * self.cost.state_bytes / 2 for numel in self.numel for _ in range(2)]

    @property
    def checkpoint(self) -> float:
        """Bytes of this device's part of one: the weights as the optimizer has them, and its state."""
        return sum(self.numel) * (self.kept_dtype.itemsize + self.cost.state_bytes)

    def parts(self) -> dict[str, int]:
        """Name -> bytes."""
        found = {
            "the program itself": self._program,
            "student: weights": self.weights.total,
            "student: float32 copies": round(sum(self.masters)),
            "student: gradients": round(sum(self._gradients)),
            "optimizer": round(sum(self._moments)),
            "teacher: weights": self.teaching.total,
            "activations": self.rehearsal.activations,
            "loss stage": self.rehearsal.loss_stage,
        }
        return {name: size for name, size in found.items() if size}

    @property
    def _program(self) -> int:
        return program_bytes(self.question.machine, self.question.program)

    def play(self) -> dict[str, int]:
        """Phase -> the most bytes in it."""
        is_cpu = self.question.machine.kind == "cpu"
        ledger = Ledger(GLIBC if is_cpu else CUDA)
        ledger.phase = "loading the models"
        ledger.hold([self._program])
        for weights, key in ((self.weights, "checkpointer"), (self.teaching, "teacher_checkpointer")):
            ledger.hold(weights.resident)
            if is_cpu and weights.resident:
                read = max(weights.resident)
                if not weights.one_by_one:  # the file is there until its weights are in the model
                    read = file_bytes(self.question.cfg, key) or sum(weights.resident)
                with ledger.during("loading the models", [read]):
                    pass
        ledger.hold(self.masters)
        ledger.hold([self.weights.gathered, self.teaching.gathered])
        for step in range(2):  # the second finds the optimizer's state, and what the first has left
            self._step(ledger, is_first=step == 0)
        if is_cpu:
            with ledger.during("writing a checkpoint", self._checkpoint()):
                pass
            with ledger.during("writing the student", self._export()):
                pass
        return ledger.peaks

    def _step(self, ledger: Ledger, *, is_first: bool) -> None:
        for event in self.rehearsal.events:
            ledger.phase = f"a step: {event.phase}"
            ledger.change(event.size * (self._grad_share if event.is_grad else 1), moves=not event.is_grad)
        ledger.phase = "a step: the update"
        if is_first:
            ledger.hold(self._moments)
        temporary = [numel * self.cost.temporary_bytes for numel in self.numel]
        with ledger.during("a step: the update", temporary if self.cost.all_at_once else [max(temporary)]):
            pass
        ledger.hold(-size for size in self._gradients)

    def _checkpoint(self) -> Iterator[float]:
        """Files are made up in memory, twice: tensor by tensor, then whole."""
        largest = max(self.numel) * self.kept_dtype.itemsize
        yield from [min(self.checkpoint, max(_CHECKPOINT_FILE, largest))] * 2
        if self.question.cfg.enable_async_checkpointing:
            yield self.checkpoint

    def _export(self) -> list[float]:
        """A copy of the student, in its own dtype; and where the files have another, one in that."""
        return list(self.weights.resident)


def _not_counted(cfg: DictConfig) -> Iterator[str]:
    if cfg.feature_losses is not None:
        yield "feature_losses: the states that they compare, and their gradients"
    if cfg.enable_activation_offloading:
        yield "enable_activation_offloading: activations are counted on the device"
    if cfg.fsdp_cpu_offload:
        yield "fsdp_cpu_offload: weights, gradients and moments are counted on the device"
    if cfg.compile:
        yield "compile: a compiled block keeps less than is counted here"
    if cfg.teacher is not None and not str(cfg.teacher._component_).endswith("CachedTeacher"):
        yield "teacher: models that the section loads"
    if cfg.teacher_device not in (None, cfg.device):
        yield f"teacher_model, which is on {cfg.teacher_device}"
