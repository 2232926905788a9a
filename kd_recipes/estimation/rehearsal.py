"""A step on tensors without data: every kernel's output has its size, and takes no memory and hardly any time.

What autograd keeps, what an adapter, a pruned width or a lattice adds, what recomputing saves, all follow from the
models' own code, and no formula has to know of them. Only what happens inside a kernel is not seen.
"""

# B sequences, S positions, T = B * S tokens, D width

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchtune.modules import TransformerDecoder

from kd_recipes import _torchtune
from kd_recipes.batch import Batch
from kd_recipes.signals import LinearLogits
from kd_recipes.tally import Tally

_CPU = torch.device("cpu")  # stands for any device: a GPU's fused attention keeps what a CPU's does

FORWARD = "the student's forward pass"

# From the logits of student and teacher to the bytes of what the loss computes a chunk in.
LossBuffers = Callable[[LinearLogits, LinearLogits | None], int]


@dataclass(frozen=True)
class Shape:
    """Of a step's micro-batches.

    Args:
        num_sequences: B.
        length: S.
        packed: whether documents stand end to end, with a mask.
        num_micro_batches: of the step.
    """

    num_sequences: int
    length: int
    packed: bool = False
    num_micro_batches: int = 1

    @property
    def num_tokens(self) -> int:
        """T, of a micro-batch."""
        return self.num_sequences * self.length

    def batch(self) -> Batch:
        """A micro-batch."""
        size = (self.num_sequences, self.length)
        tokens_BS = torch.zeros(size, dtype=torch.long)
        if not self.packed:
            return Batch(tokens_BS, tokens_BS)
        return Batch(tokens_BS, tokens_BS, torch.zeros(*size, self.length, dtype=torch.bool), tokens_BS.clone())


@dataclass(frozen=True)
class Event:
    """A tensor comes or goes.

    Args:
        size: its bytes; negative where it goes.
        phase: of the step.
        block: of the student; None outside of all of them.
        is_grad: whether it is the gradient of a weight, which stays until the update.
    """

    size: int
    phase: str
    block: int | None = None
    is_grad: bool = False


@dataclass
class Rehearsal:
    """What came and went in a step up to its update.

    Args:
        events: in their order.
        activations: bytes that autograd keeps of the student's forward pass.
        loss_stage: bytes that the loss takes, but for gradients of weights.
    """

    events: list[Event] = field(default_factory=list)
    activations: int = 0
    loss_stage: int = 0


class _Stage:
    """The models, and what happens to them.

    Args:
        student: with sizes for weights.
        teacher: likewise.
        master_weights: whether gradients are float32.
        recompute_activations: whether blocks are computed again in the backward pass.
        loss_buffers: see :data:`LossBuffers`.
    """

    def __init__(
        self,
        student: TransformerDecoder,
        teacher: TransformerDecoder | None,
        *,
        master_weights: bool,
        recompute_activations: bool,
        loss_buffers: LossBuffers,
    ) -> None:
        self._graded: set[int] = set()
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)
                parameter.grad_dtype = torch.float32 if master_weights else parameter.dtype
        self._student = _torchtune.Headless(student.train(), recompute_activations=recompute_activations)
        for index, block in enumerate(student.layers):
            block.register_forward_pre_hook(partial(self._enter, index))
            block.register_forward_hook(partial(self._leave, index))
        self._teacher = _torchtune.Headless(teacher.eval()) if teacher is not None else None
        self._loss_buffers = loss_buffers
        self.found = Rehearsal()
        self._phase, self._now = "", 0
        self._block: int | None = None

    def changed(self, size: int, *, is_grad: bool = False) -> None:
        """Write down an event."""
        self._now += size
        self.found.events.append(Event(size, self._phase, self._block, is_grad))

    def _enter(self, index: int, _block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._set_block(index)
        if index == 0 and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self._set_block(None))

    def _leave(self, index: int, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        output.register_hook(lambda _: self._set_block(index))

    def _set_block(self, index: int | None) -> None:
        self._block = index

    def play(self, shape: Shape) -> None:
        """All micro-batches; from the second on they are alike."""
        for _ in range(min(shape.num_micro_batches, 2)):
            self._play(shape.batch())

    def _keep_gradient(self, parameter: Tensor) -> None:
        """From its first on, a gradient is no tensor of the backward pass any more."""
        if parameter.grad is not None and id(parameter) not in self._graded:
            self._graded.add(id(parameter))
            self.changed(-parameter.grad.nbytes)
            self.changed(parameter.grad.nbytes, is_grad=True)

    def _play(self, batch: Batch) -> None:
        self._phase, self._block = "the teacher's forward pass", None
        teacher = None
        if self._teacher is not None:
            with torch.no_grad():
                teacher = self._teacher(batch).logits
        self._phase, before = FORWARD, self._now
        student = self._student(batch).logits
        self.found.activations, before = self._now - before, self._now
        self._phase, self._block = "the loss", None
        buffers = torch.empty(self._loss_buffers(student, teacher), dtype=torch.uint8)
        grads_TD = [torch.empty_like(hidden_TD) for hidden_TD in student.inputs]
        self.found.loss_stage = self._now - before
        for weight in student.weights:
            self._add_gradient(weight)
        del buffers, teacher
        self._phase = "the backward pass"
        pairs = [pair for pair in zip(student.inputs, grads_TD, strict=True) if pair[0].requires_grad]
        torch.autograd.backward([hidden_TD for hidden_TD, _ in pairs], [grad_TD for _, grad_TD in pairs])

    def _add_gradient(self, weight: Tensor) -> None:
        if weight.requires_grad and weight.is_leaf:
            grad = torch.empty(weight.shape, dtype=weight.grad_dtype or weight.dtype)
            weight.grad = grad if weight.grad is None else weight.grad.add_(grad)
            self._keep_gradient(weight)


def rehearse(
    student: TransformerDecoder,
    teacher: TransformerDecoder | None,
    shape: Shape,
    *,
    master_weights: bool,
    recompute_activations: bool,
    loss_buffers: LossBuffers,
) -> Rehearsal:
    """Go through a step up to its update.

    Args:
        student: on the meta device, in the dtype that it computes in, what is frozen frozen; no good afterwards.
        teacher: likewise; None without one beside the student.
        shape: of the micro-batches.
        master_weights: whether gradients are float32.
        recompute_activations: whether blocks are computed again in the backward pass.
        loss_buffers: see :data:`LossBuffers`.
    """
    num_blocks = [_shorten(model) for model in (student, teacher) if model is not None]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with warnings.catch_warnings(), mode:
        warnings.simplefilter("ignore")  # what a kernel has to say of its inputs is said again when it runs
        for model in (student, teacher):
            if model is not None:
                _give_sizes(model, mode)
        stage = _Stage(
            student,
            teacher,
            master_weights=master_weights,
            recompute_activations=recompute_activations,
            loss_buffers=loss_buffers,
        )
        with Tally(stage.changed):
            stage.play(shape)
    return _lengthen(stage.found, num_blocks[0] - len(student.layers))


def _shorten(model: TransformerDecoder) -> int:
    """Leave a first, a middle and a last block where all are alike; returns how many there were."""
    num_blocks = len(model.layers)
    looks = {
        tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in block.named_parameters())
        for block in model.layers
    }
    if num_blocks > 3 and len(looks) == 1:
        model.layers = nn.ModuleList([model.layers[index] for index in (0, 1, num_blocks - 1)])
    return num_blocks


def _lengthen(found: Rehearsal, num_more: int) -> Rehearsal:
    """Let the middle one of three blocks come so many times more."""
    events: list[Event] = []
    more = 0
    for (phase, block), group in groupby(found.events, lambda event: (event.phase, event.block)):
        part = list(group)
        events += part * (1 + num_more if block == 1 else 1)
        if block == 1 and phase == FORWARD and not more:
            more = num_more * sum(event.size for event in part)
    return Rehearsal(events, found.activations + more, found.loss_stage)


def _give_sizes(model: TransformerDecoder, mode: FakeTensorMode) -> None:
    """From the meta device to tensors that say of themselves that they are in memory, and are not."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes():
        _torchtune.compute_positions(model, _CPU)  # which looks at numbers
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
