"""The objective of a distillation, as sums over valid tokens.

    total = sum over tokens of  kd_ratio * T^2 * D(teacher, student) + (1 - kd_ratio) * CE(student, label)

The one division, by the number of valid tokens of the whole step, is made in float32 before any gradient is rounded.
"""

# B sequences, S positions, T = B * S, N valid tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.losses.divergences import Divergence, ForwardKL
from kd_recipes.losses.fused import Tokens, fused_loss
from kd_recipes.losses.mixture import value_names
from kd_recipes.losses.rows import TOKEN_VALUES, Terms
from kd_recipes.signals import DenseSignal, MixtureSignal, Signal, SparseSignal

_WITHOUT_TEACHER = ("cross_entropy", "accuracy")
QUALITIES = tuple(name for name in TOKEN_VALUES if name not in ("total", "cross_entropy", "divergence"))


@dataclass(frozen=True)
class LossSum:
    """Sums over ``num_tokens`` valid tokens.

    Args:
        total: what is differentiated, divided by the step's tokens.
        sums: by name, detached float64 scalars on the tokens' device. ``cross_entropy`` (with smoothed labels),
            ``divergence`` (at its temperatures, without the factor T^2), ``forward_kl``, ``reverse_kl``,
            ``teacher_entropy`` and ``student_entropy`` (at the divergence's temperatures) in nats;
            ``accuracy``: the student's likeliest id is the label; ``agreement``: it is the teacher's;
            ``teacher_label_mass``: the teacher's probability of the label; ``teacher_cross_entropy``: its own with the
            label, at temperature 1, of a mixture before it has seen the label; of each teacher of a mixture
            ``teacher_<name>/cross_entropy``, likewise, and ``teacher_<name>/weight``. Only what was computed.
        num_tokens: valid tokens.
    """

    total: Tensor
    sums: Mapping[str, Tensor]
    num_tokens: int


@dataclass(frozen=True)
class Objective:
    """Settings of the objective; calling it computes the sums and, through ``total``, the gradients.

    Args:
        kd_ratio: weight of the divergence, in [0, 1]; 1 takes no gradient from the labels, 0 needs no teacher.
        temperature: T > 0, of the student in the divergence; its square is the divergence's factor.
        teacher_temperature: of the teacher; T if None.
        divergence: how far the student is from the teacher.
        label_smoothing: share of the label's probability that is spread over all ids, in [0, 1).
        num_ids: how many ids student and teacher share; heads with more rows are padded, and compared over these.
        chunk_size: tokens whose logits exist at a time; chosen from the vocabulary if None.
    """

    kd_ratio: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float | None = None
    divergence: Divergence = field(default_factory=ForwardKL)
    label_smoothing: float = 0.0
    num_ids: int | None = None
    chunk_size: int | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether a signal changes the gradient."""
        return self.kd_ratio > 0

    def __call__(self, student: DenseSignal, signal: Signal | None, batch: Batch, num_tokens: int = 1) -> LossSum:
        """Sums over the tokens whose label is not masked; the others never reach a matrix product.

        Args:
            student: on the batch.
            signal: the teacher on the same batch; None where ``kd_ratio`` is 0.
            batch: its labels, and weights of its tokens.
            num_tokens: valid tokens of the whole step, over all micro-batches and processes: the total's divisor.

        Returns:
            The sums. ``total.backward()`` reaches all that the student's logits are made of.

        Raises:
            ValueError: no signal although ``kd_ratio`` is above 0, one that was taken at another temperature, or one
                that the divergence cannot be estimated from.
        """
        teacher_temperature = self.temperature if self.teacher_temperature is None else self.teacher_temperature
        if signal is None and self.needs_teacher:
            raise ValueError(f"kd_ratio is {self.kd_ratio}, which needs a teacher, and there is no signal")
        if isinstance(signal, SparseSignal) and signal.temperature != teacher_temperature:
            raise ValueError(
                f"the teacher's probabilities were taken at temperature {signal.temperature}, and cannot be brought to "
                f"{teacher_temperature}: set teacher_temperature={signal.temperature}"
            )
        if isinstance(signal, SparseSignal) and signal.is_drawn and not self.divergence.is_estimable:
            name = type(self.divergence).__name__
            raise ValueError(f"{name} cannot be estimated from ids drawn from the teacher: set kd_loss to ForwardKL")
        terms = Terms(
            self.divergence,
            self.kd_ratio,
            self.temperature,
            teacher_temperature,
            self.label_smoothing,
            student.logits.soft_cap,
            signal.logits.soft_cap if isinstance(signal, DenseSignal) else None,
        )
        tokens = _valid_tokens(batch, num_tokens)
        num_ids = self.num_ids or student.logits.num_rows
        total, sums = fused_loss(student.logits, signal, tokens, terms, num_ids=num_ids, chunk_size=self.chunk_size)
        by_name = {name: sums[TOKEN_VALUES.index(name)] for name in _known(signal)}
        if isinstance(signal, MixtureSignal):
            by_name |= zip(value_names(signal), sums[len(TOKEN_VALUES) :], strict=True)
        return LossSum(total, by_name, len(tokens.labels_N))


def _known(signal: Signal | None) -> Sequence[str]:
    if signal is None:
        return _WITHOUT_TEACHER
    is_ignorant = isinstance(signal, SparseSignal) and signal.unsoftened is None
    return [name for name in TOKEN_VALUES[1:] if not (is_ignorant and name == "teacher_cross_entropy")]


def _valid_tokens(batch: Batch, num_tokens: int) -> Tokens:
    labels_T = batch.labels_BS.flatten()
    positions_N = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
    weights_T = torch.ones(labels_T.shape, device=labels_T.device)
    if batch.weights_BS is not None:
        weights_T = batch.weights_BS.flatten().float()
    weights_T = weights_T / num_tokens
    if len(positions_N) == len(labels_T):
        return Tokens(None, labels_T, weights_T)
    return Tokens(positions_N, labels_T[positions_N], weights_T[positions_N])
