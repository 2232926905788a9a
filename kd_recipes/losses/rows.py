"""The arithmetic of the objective on the logits of some tokens: their gradient takes their place.

Every operation writes to one of a few scratch buffers, so that on a CPU a block of rows stays in cache and no page is
mapped for it; compiled for a GPU, the buffers vanish and what remains is one kernel.
"""

# n tokens, V vocabulary, K ids of a sparse teacher

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_recipes.losses.divergences import LOG_ZERO, Distributions, Divergence
from kd_recipes.signals import SparseSignal

# What is known of each token, in the order of the values that `replace_by_gradient` returns.
TOKEN_VALUES = (
    "total",
    "cross_entropy",
    "divergence",
    "accuracy",
    "agreement",
    "forward_kl",
    "reverse_kl",
    "teacher_entropy",
    "student_entropy",
    "teacher_label_mass",
    "teacher_cross_entropy",  # at temperature 1, whatever the others are at
)
_MIN_TAIL = 1e-30  # of the student's probability outside a sparse teacher's ids, where float32 underflows
_ARGMAX_BLOCK = 128


@dataclass(frozen=True)
class Terms:
    """What is computed of each token: ``kd_ratio * T^2 * divergence + (1 - kd_ratio) * cross entropy``.

    Args:
        divergence: between teacher and student, each at its temperature.
        kd_ratio: weight of the divergence, in [0, 1].
        temperature: T, of the student in the divergence.
        teacher_temperature: of the teacher in the divergence.
        label_smoothing: share of the label's probability that is spread over all ids.
        student_cap: soft cap of the student's logits, as in :class:`~kd_recipes.signals.LinearLogits`.
        teacher_cap: of the teacher's.
    """

    divergence: Divergence
    kd_ratio: float
    temperature: float
    teacher_temperature: float
    label_smoothing: float
    student_cap: float | None = None
    teacher_cap: float | None = None

    @property
    def num_buffers(self) -> int:
        """Scratch buffers that :func:`replace_by_gradient` needs: one more where the label has a softmax of its own."""
        return 4 if self.temperature == 1.0 else 5


def replace_by_gradient(
    student_nV: Tensor,
    teacher: Tensor | SparseSignal | None,
    labels_n: Tensor,
    weights_n: Tensor,
    terms: Terms,
    scratch: Sequence[Tensor],
) -> Tensor:
    """Overwrite the student's logits with the gradient of ``sum_n weights_n * total_n``.

    Args:
        student_nV: logits before the soft cap, any float dtype; after the call, the gradient.
        teacher: logits ``[n, V]``, which stay as they are, or a sparse teacher, or None.
        labels_n: ids.
        weights_n: of the tokens.
        terms: what is computed.
        scratch: ``terms.num_buffers`` tensors ``[n, V]`` in the dtype of the arithmetic.

    Returns:
        ``[len(TOKEN_VALUES), n]``, of which the total alone is weighted; 0 for what needs a teacher and has none, and
        for what a sparse one does not know.
    """
    z_nV, q_nV, *free = scratch
    labels_n1, weights_n1 = labels_n.unsqueeze(1), weights_n.unsqueeze(1).to(z_nV.dtype)
    ce_weight, kd_weight = 1 - terms.kd_ratio, terms.kd_ratio * terms.temperature
    load(student_nV, terms.student_cap, z_nV)
    top_n1 = likeliest(z_nV)
    log_sum_exp_n1 = softmax(z_nV, top_n1, out=q_nV)
    cross_entropy_n = _cross_entropy(z_nV, labels_n1, log_sum_exp_n1, terms.label_smoothing)
    values = {"cross_entropy": cross_entropy_n, "accuracy": (top_n1 == labels_n1).squeeze(1)}
    total_n = ce_weight * cross_entropy_n
    shares_labels = teacher is None or terms.temperature == 1.0  # whether the label's gradient, too, is made of q
    if not shares_labels:
        q1_nV = free.pop().copy_(q_nV)
        log_sum_exp_n1 = softmax(z_nV.div_(terms.temperature), top_n1, out=q_nV)
    q_factor_n1 = weights_n1 * (ce_weight if shares_labels else 0.0)
    if teacher is not None:
        log_q_nV = z_nV.sub_(log_sum_exp_n1)
        at = (labels_n1, top_n1, terms, free)
        if isinstance(teacher, SparseSignal):
            compare = _compare_drawn if teacher.is_drawn else _compare_likeliest
            pull = compare(q_nV, log_q_nV, teacher, *at)
        else:
            pull = _compare_dense(q_nV, log_q_nV, teacher, *at)
        values |= pull.values
        total_n = total_n + kd_weight * terms.temperature * pull.values["divergence"]
        scale_n1 = weights_n1 * kd_weight
        q_factor_n1 = q_factor_n1 + scale_n1 * pull.q_factor_n1
    grad_nV = q_nV.mul_(q_factor_n1)
    if teacher is not None:
        pull.add_to(grad_nV, scale_n1)
    if not shares_labels:
        grad_nV.addcmul_(q1_nV, weights_n1 * ce_weight)
    _subtract_labels(grad_nV, labels_n1, weights_n1 * ce_weight, terms.label_smoothing)
    if terms.student_cap is not None:
        _differentiate_cap(grad_nV, z_nV.copy_(student_nV), terms.student_cap)
    student_nV.copy_(grad_nV)
    values["total"] = weights_n1.squeeze(1) * total_n
    zero_n = torch.zeros_like(total_n)
    return torch.stack([values.get(name, zero_n).to(total_n.dtype) for name in TOKEN_VALUES])


@dataclass(frozen=True)
class _Pull:
    """What a teacher adds to a token: its values, and its part of the gradient, in a form that is not expanded yet.

    The gradient is ``q * q_factor + a``, where ``a`` ``[n, V]`` is dense, or stands at some ids.
    """

    values: dict[str, Tensor]
    q_factor_n1: Tensor
    a: Tensor
    ids_nK: Tensor | None = None

    def add_to(self, grad_nV: Tensor, scale_n1: Tensor) -> None:
        scaled = self.a.mul_(scale_n1)
        if self.ids_nK is None:
            grad_nV.add_(scaled)
        else:
            grad_nV.scatter_add_(1, self.ids_nK, scaled)


def _compare_dense(
    q_nV: Tensor,
    log_q_nV: Tensor,
    teacher_nV: Tensor,
    labels_n1: Tensor,
    top_n1: Tensor,
    terms: Terms,
    free: Sequence[Tensor],
) -> _Pull:
    log_p_nV, p_nV = free
    load(teacher_nV, terms.teacher_cap, log_p_nV)
    teacher_top_n1 = likeliest(log_p_nV)
    log_sum_exp_n1 = softmax(log_p_nV, teacher_top_n1, out=p_nV)
    cross_entropy_n = _cross_entropy(log_p_nV, labels_n1, log_sum_exp_n1, label_smoothing=0.0)
    if terms.teacher_temperature != 1.0:
        log_sum_exp_n1 = softmax(log_p_nV.div_(terms.teacher_temperature), teacher_top_n1, out=p_nV)
    log_p_nV.sub_(log_sum_exp_n1)
    label_mass_n = p_nV.gather(1, labels_n1).squeeze(1)
    at = Distributions.compare(p_nV, log_p_nV, q_nV, log_q_nV)
    values = _moments(at, teacher_top_n1 == top_n1, label_mass_n) | {"teacher_cross_entropy": cross_entropy_n}
    values["divergence"], a_nV = terms.divergence(at)
    return _Pull(values, -a_nV.sum(-1, keepdim=True), a_nV)


def _compare_likeliest(
    q_nV: Tensor,
    log_q_nV: Tensor,
    teacher: SparseSignal,
    labels_n1: Tensor,
    top_n1: Tensor,
    terms: Terms,
    free: Sequence[Tensor],
) -> _Pull:
    """As :func:`_compare_dense` over K + 1 buckets: the ids that the teacher names, and one for all the others.

    The gradient of the last bucket's logarithm is ``q_j / q_tail - q_j`` at each id j in it, so that outside the ids
    all is one factor of q, and only the ids are corrected.
    """
    is_named_nK, ids_nK = _named(teacher)
    log_p_nB = torch.cat((teacher.log_p_TK, teacher.log_tail_T.unsqueeze(1)), 1).to(q_nV.dtype)
    # not 1 - sum(q): that has no digits left where the ids hold nearly everything
    tail_n1 = free[0].copy_(q_nV).scatter_(1, ids_nK, 0.0).sum(-1, keepdim=True)
    tail_n1 = torch.where(is_named_nK.any(-1, keepdim=True), tail_n1, 1.0)
    divisor_n1 = tail_n1.clamp_min(_MIN_TAIL)
    has_tail_n1 = is_named_nK.sum(-1, keepdim=True) < q_nV.shape[1]
    log_tail_n1 = torch.where(has_tail_n1, divisor_n1.log(), LOG_ZERO)
    q_nK = q_nV.gather(1, ids_nK).mul_(is_named_nK)
    log_q_nK = log_q_nV.gather(1, ids_nK).masked_fill_(~is_named_nK, LOG_ZERO)
    q_nB, log_q_nB = torch.cat((q_nK, tail_n1), 1), torch.cat((log_q_nK, log_tail_n1), 1)
    at = Distributions.compare(log_p_nB.exp(), log_p_nB, q_nB, log_q_nB)
    values = _sparse_moments(at, teacher, q_nV, log_q_nV, labels_n1, top_n1)
    values["divergence"], a_nB = terms.divergence(at)
    tail_factor_n1 = a_nB[:, -1:] / divisor_n1
    a_nK = (a_nB[:, :-1] - q_nK * tail_factor_n1).mul_(is_named_nK)
    return _Pull(values, tail_factor_n1 - a_nB.sum(-1, keepdim=True), a_nK, ids_nK)


def _compare_drawn(
    q_nV: Tensor,
    log_q_nV: Tensor,
    teacher: SparseSignal,
    labels_n1: Tensor,
    top_n1: Tensor,
    terms: Terms,
    _free: Sequence[Tensor],
) -> _Pull:
    """As :func:`_compare_dense`, but means over the ids drawn stand for what is expected under the teacher.

    Of the forward divergence the estimate is ``sum_i w_i (log p_i - log q_i)`` and its gradient ``q - w``, both
    without bias; of the reverse one it is ``sum_i w_i (r log r - r + 1)`` with r = q / p, no term of which is negative.
    """
    assert teacher.weights_TK is not None
    is_named_nK, ids_nK = _named(teacher)
    weights_nK = teacher.weights_TK.to(q_nV.dtype, copy=True)
    log_p_nK = teacher.log_p_TK.to(q_nV.dtype).masked_fill(~is_named_nK, 0.0)
    q_nK = q_nV.gather(1, ids_nK).mul_(is_named_nK)
    log_q_nK = log_q_nV.gather(1, ids_nK).clamp_min_(LOG_ZERO).masked_fill_(~is_named_nK, 0.0)
    log_ratio_nK = log_q_nK - log_p_nK
    ratio_nK = log_ratio_nK.exp()
    dot = torch.linalg.vecdot
    at = Distributions(
        weights_nK,
        log_p_nK,
        q_nK,
        log_q_nK,
        forward_kl_n=-dot(weights_nK, log_ratio_nK),
        reverse_kl_n=dot(weights_nK, ratio_nK * log_ratio_nK - ratio_nK + 1),
        teacher_entropy_n=-dot(weights_nK, log_p_nK),
        student_entropy_n=-dot(q_nK, log_q_nK),
    )
    values = _sparse_moments(at, teacher, q_nV, log_q_nV, labels_n1, top_n1)
    values["divergence"], a_nK = terms.divergence(at)
    return _Pull(values, -a_nK.sum(-1, keepdim=True), a_nK, ids_nK)


def _named(teacher: SparseSignal) -> tuple[Tensor, Tensor]:
    """Which of K names a row has, and ids in which those that it has not are its first: added to, they add nothing."""
    is_named_nK = teacher.log_p_TK > LOG_ZERO
    return is_named_nK, torch.where(is_named_nK, teacher.ids_TK, teacher.ids_TK[:, :1])


def _sparse_moments(
    at: Distributions, teacher: SparseSignal, q_nV: Tensor, log_q_nV: Tensor, labels_n1: Tensor, top_n1: Tensor
) -> dict[str, Tensor]:
    """As :func:`_moments`: over what the teacher names, or exactly where it knows more than that."""
    exact, unsoftened = teacher.exact, teacher.unsoftened
    known = {} if unsoftened is None else {"teacher_cross_entropy": -unsoftened.log_p_label_T}
    if exact is None:
        is_label_nK = (teacher.ids_TK == labels_n1) & (teacher.log_p_TK > LOG_ZERO)
        label_mass_n = teacher.log_p_TK.exp().mul(is_label_nK).sum(-1)
        teacher_top_n1 = teacher.ids_TK.gather(1, teacher.log_p_TK.argmax(-1, keepdim=True))
        return _moments(at, teacher_top_n1 == top_n1, label_mass_n) | known
    values = known | _moments(at, exact.likeliest_T.unsqueeze(1) == top_n1, exact.log_p_label_T.exp())
    entropy_n = -torch.linalg.vecdot(q_nV, log_q_nV.clamp_min_(LOG_ZERO))
    return values | {"teacher_entropy": exact.entropy_T, "student_entropy": entropy_n}


def _moments(at: Distributions, agrees_n1: Tensor, label_mass_n: Tensor) -> dict[str, Tensor]:
    return {
        "agreement": agrees_n1.squeeze(1),
        "forward_kl": at.forward_kl_n,
        "reverse_kl": at.reverse_kl_n,
        "teacher_entropy": at.teacher_entropy_n,
        "student_entropy": at.student_entropy_n,
        "teacher_label_mass": label_mass_n,
    }


def load(logits_nV: Tensor, soft_cap: float | None, out: Tensor) -> None:
    """Logits after the soft cap into ``out``."""
    # float32 from here: a bf16 sum over 150,000 probabilities is off in its second digit
    out.copy_(logits_nV)
    if soft_cap is not None:
        out.div_(soft_cap).tanh_().mul_(soft_cap)


def softmax(z_nV: Tensor, top_n1: Tensor, *, out: Tensor) -> Tensor:
    """Probabilities into ``out``; returns the log-sum-exp ``[n, 1]``, which the largest of them tells for free."""
    torch.softmax(z_nV, -1, out=out)
    return z_nV.gather(1, top_n1) - out.gather(1, top_n1).log()


def _cross_entropy(z_nV: Tensor, labels_n1: Tensor, log_sum_exp_n1: Tensor, label_smoothing: float) -> Tensor:
    target_n1 = z_nV.gather(1, labels_n1)
    if label_smoothing > 0:
        target_n1 = torch.lerp(target_n1, z_nV.mean(-1, keepdim=True), label_smoothing)
    return (log_sum_exp_n1 - target_n1).squeeze(1)


def _subtract_labels(grad_nV: Tensor, labels_n1: Tensor, weights_n1: Tensor, label_smoothing: float) -> None:
    grad_nV.scatter_add_(1, labels_n1, weights_n1 * (label_smoothing - 1))
    if label_smoothing > 0:
        grad_nV.sub_(weights_n1 * (label_smoothing / grad_nV.shape[1]))


def _differentiate_cap(grad_nV: Tensor, raw_nV: Tensor, soft_cap: float) -> None:
    """From the gradient by capped logits to that by raw ones: d/dx cap * tanh(x / cap) = 1 - tanh(x / cap)^2."""
    grad_nV.mul_(raw_nV.div_(soft_cap).tanh_().square_().neg_().add_(1.0))


def likeliest(z_nV: Tensor) -> Tensor:
    """``z.argmax(-1, keepdim=True)``, several times faster on a CPU, where only the maximum is vectorized."""
    size = z_nV.shape[1]
    if z_nV.device.type != "cpu" or size < 2 * _ARGMAX_BLOCK or torch.compiler.is_compiling():
        return z_nV.argmax(-1, keepdim=True)
    num_blocks = size // _ARGMAX_BLOCK
    whole_nV = z_nV[:, : num_blocks * _ARGMAX_BLOCK]
    maxima = [whole_nV.unflatten(1, (num_blocks, _ARGMAX_BLOCK)).amax(-1)]
    if num_blocks * _ARGMAX_BLOCK < size:
        maxima.append(z_nV[:, num_blocks * _ARGMAX_BLOCK :].amax(-1, keepdim=True))
    block_n1 = torch.cat(maxima, 1).argmax(-1, keepdim=True)
    # the last block may be short: shifted back, it begins with ids that the first maximum is not among
    start_n1 = (block_n1 * _ARGMAX_BLOCK).clamp_max(size - _ARGMAX_BLOCK)
    window = start_n1 + torch.arange(_ARGMAX_BLOCK, device=z_nV.device)
    return start_n1 + z_nV.gather(1, window).argmax(-1, keepdim=True)
