"""From hidden states and output heads straight to gradients, a chunk of tokens at a time.

Neither model's logits ever exist for more than a chunk, whose buffers are used again for the next. What is left of
the work are the products that nobody can avoid: two heads forward, and the student's head twice backward, once for its
inputs and, unless it is frozen, once for its weight.
"""

# T tokens of a batch, N of them valid, n of a chunk or block, D widths, V ids compared

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kd_recipes.losses.mixture import Mixer
from kd_recipes.losses.rows import TOKEN_VALUES, Terms, replace_by_gradient
from kd_recipes.signals import DenseSignal, LinearLogits, MixtureSignal, Signal, SparseSignal

# Tokens of a chunk: 256 fill a CPU's matrix units, a GPU wants more; and logits of a chunk, of each model.
_CHUNK_TOKENS_CPU, _CHUNK_ELEMENTS_CPU = 256, 256 * 152_064
_CHUNK_ELEMENTS = 1024 * 152_064
# Logits of a block of rows, for each thread: two rows of Qwen's, whose scratch buffers stay in cache. On a GPU that
# does not compile, and elsewhere: what keeps a device busy.
_BLOCK_ELEMENTS_CPU = 2 * 152_064
_BLOCK_ELEMENTS = 1 << 24
_ROWS = 16_384  # of a weight's gradient that are computed at a time


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch that have a label.

    Args:
        positions_N: which of the T they are; None for all of them.
        labels_N: ids.
        weights_N: what each one's part of the total is multiplied by, in float32.
    """

    positions_N: Tensor | None
    labels_N: Tensor
    weights_N: Tensor

    def chunks(self, size: int) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
        """Positions, labels and weights of chunks of nearly the same size, at most ``size``."""
        num_tokens = len(self.labels_N)
        num_chunks = -(-num_tokens // size)
        bounds = [num_tokens * index // num_chunks for index in range(num_chunks + 1)] if num_chunks else []
        for start, stop in pairwise(bounds):
            here = slice(start, stop)
            positions = here if self.positions_N is None else self.positions_N[here]
            yield positions, self.labels_N[here], self.weights_N[here]


def fused_loss(
    student: LinearLogits,
    signal: Signal | None,
    tokens: Tokens,
    terms: Terms,
    *,
    num_ids: int,
    chunk_size: int | None = None,
    compiled: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the objective over some tokens, with its gradient; equals, without the memory,

        z_NV = logits of the student at the tokens, cut to num_ids, and the teacher's likewise
        total = (weights_N * objective(z_NV, teacher_NV, labels_N)).sum()

    Args:
        student: of all T tokens. Gradients reach what of its inputs, weights and bias requires them.
        signal: the teacher on the same tokens, or None.
        tokens: those that count; the others never reach a product.
        terms: what is computed of each.
        num_ids: V; rows of the heads beyond are padding.
        chunk_size: tokens whose logits exist at a time; chosen from V if None.
        compiled: whether the arithmetic on a chunk's logits is compiled into one kernel; on a GPU if None.

    Returns:
        The total, float32, and the unweighted sums ``[len(TOKEN_VALUES)]`` of what is known of each token, float64; of
        a mixture, those of :func:`~kd_recipes.losses.mixture.value_names` follow.
    """
    device = tokens.labels_N.device
    if chunk_size is None:
        chunk_size = choose_chunk_size(num_ids, device)
    is_compiled = device.type == "cuda" if compiled is None else compiled
    # under no_grad autograd still reports what requires gradients, so the inner function has to be told
    call = _Call(student, signal, tokens, terms, num_ids, chunk_size, is_compiled, torch.is_grad_enabled())
    tensors = (*student.inputs, *student.weights, student.bias_V, student.given_TV)
    return _FusedLoss.apply(call, *tensors)  # type: ignore[no-any-return]


def choose_chunk_size(num_ids: int, device: torch.device) -> int:
    """Tokens whose logits exist at a time, where nothing else is asked for."""
    if device.type == "cpu":
        return max(1, min(_CHUNK_TOKENS_CPU, _CHUNK_ELEMENTS_CPU // num_ids))
    return max(1, _CHUNK_ELEMENTS // num_ids)


@dataclass(frozen=True)
class _Call:
    student: LinearLogits
    signal: Signal | None
    tokens: Tokens
    terms: Terms
    num_ids: int
    chunk_size: int
    is_compiled: bool
    wants_grad: bool


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        needs_grad = [call.wants_grad and needed for needed in ctx.needs_input_grad[1:]]
        grads = _Gradients(call.student, needs_grad)
        chunks = _ChunkBuffers(call)
        sums = torch.zeros(len(TOKEN_VALUES), dtype=torch.float64, device=call.tokens.labels_N.device)
        for positions, labels_n, weights_n in call.tokens.chunks(call.chunk_size):
            logits_nV = chunks.student_logits(positions, len(labels_n))
            teacher = chunks.teacher(positions, labels_n)
            sums += chunks.replace_by_gradient(logits_nV[:, : call.num_ids], teacher, labels_n, weights_n)
            logits_nV[:, call.num_ids :] = 0  # rows of the head that stand for no id
            grads.add(positions, logits_nV)
        sums = chunks.complete(sums)
        ctx.grads = grads.tensors
        ctx.mark_non_differentiable(sums)
        return sums[0].to(_arithmetic_dtype(call.student.dtype)), sums

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # freed as soon as they are handed on
        if grads is None:
            raise RuntimeError("the fused loss keeps no graph: it can be differentiated once")
        if grad_total.device.type != "cpu" or grad_total != 1.0:  # looking at it would make a GPU wait
            grads = [None if grad is None else grad.mul_(grad_total) for grad in grads]
        return (None, *grads)


class _ChunkBuffers:
    """The memory that the chunks take turns in."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        student, device = call.student, call.tokens.labels_N.device
        num_tokens = min(call.chunk_size, len(call.tokens.labels_N))
        self._student = torch.empty(num_tokens, student.num_rows, dtype=student.dtype, device=device)
        self._teacher_logits = None
        if isinstance(call.signal, DenseSignal):
            self._teacher_logits = teacher = call.signal.logits.first(call.num_ids)
            rows = 0 if teacher.given_TV is not None else num_tokens
            self._teacher = torch.empty(rows, call.num_ids, dtype=teacher.dtype, device=device)
        num_rows = min(num_tokens, rows_at_a_time(call.num_ids, device))
        shape = (0 if call.is_compiled else call.terms.num_buffers, num_rows, call.num_ids)
        self._scratch = torch.empty(shape, dtype=_arithmetic_dtype(student.dtype), device=device)
        self._terms, self._mixer = call.terms, None
        if isinstance(call.signal, MixtureSignal):
            self._mixer = Mixer(
                call.signal,
                num_ids=call.num_ids,
                temperature=call.terms.teacher_temperature,
                num_tokens=num_tokens,
                device=device,
                dtype=_arithmetic_dtype(student.dtype),
                is_compiled=call.is_compiled,
            )
            self._terms = replace(call.terms, teacher_temperature=1.0)  # what is mixed is softened already

    def student_logits(self, positions: slice | Tensor, num_tokens: int) -> Tensor:
        """Logits before the soft cap, in memory that may be written to."""
        out_nV = self._student[:num_tokens]
        logits_nV = self._call.student.before_cap(positions, out_nV)
        return logits_nV if logits_nV is out_nV else out_nV.copy_(logits_nV)

    def teacher(self, positions: slice | Tensor, labels_n: Tensor) -> Tensor | SparseSignal | None:
        """What the teacher says of the tokens."""
        if self._mixer is not None:
            return self._mixer.mix(positions, labels_n, list(self._scratch[:2]))
        if self._teacher_logits is not None:
            return self._teacher_logits.before_cap(positions, self._teacher[: len(labels_n)])
        signal = self._call.signal
        return signal[positions] if isinstance(signal, SparseSignal) else None

    def replace_by_gradient(
        self, logits_nV: Tensor, teacher: Tensor | SparseSignal | None, labels_n: Tensor, weights_n: Tensor
    ) -> Tensor:
        """:func:`~kd_recipes.losses.rows.replace_by_gradient`, block by block; returns sums over the tokens."""
        terms = self._terms
        if self._call.is_compiled:
            return _compiled()(logits_nV, teacher, labels_n, weights_n, terms).sum(-1, dtype=torch.float64)
        sums = torch.zeros(len(TOKEN_VALUES), dtype=torch.float64, device=logits_nV.device)
        num_rows = self._scratch.shape[1]
        for start in range(0, len(labels_n), num_rows):
            block = slice(start, start + num_rows)
            part = teacher[block] if teacher is not None else None
            scratch = [buffer[: len(labels_n[block])] for buffer in self._scratch]
            values = replace_by_gradient(logits_nV[block], part, labels_n[block], weights_n[block], terms, scratch)
            sums += values.sum(-1, dtype=torch.float64)
        return sums

    def complete(self, sums: Tensor) -> Tensor:
        """Sums over all tokens, with what is known of each teacher behind them."""
        return sums if self._mixer is None else self._mixer.complete(sums)


class _Gradients:
    """Sums of products over the chunks.

    Args:
        logits: of the student.
        needed: which of its inputs, weights, bias and given logits, in this order, want a gradient.
    """

    def __init__(self, logits: LinearLogits, needed: list[bool]) -> None:
        def zeros(tensor: Tensor | None, is_needed: bool) -> Tensor | None:
            return torch.zeros_like(tensor) if tensor is not None and is_needed else None

        num_products = len(logits.inputs)
        self._logits = logits
        self._inputs = list(map(zeros, logits.inputs, needed[:num_products]))
        self._needs_weight = needed[num_products : 2 * num_products]
        self._weights: list[Tensor | None] = [None] * num_products
        self._bias, self._given = map(zeros, (logits.bias_V, logits.given_TV), needed[2 * num_products :])

    def add(self, positions: slice | Tensor, grad_nV: Tensor) -> None:
        """Add what the gradient of some tokens' logits gives to each."""
        for total_TD, weight_VD in zip(self._inputs, self._logits.weights, strict=True):
            if total_TD is not None and isinstance(positions, slice):
                torch.mm(grad_nV, weight_VD, out=total_TD[positions])
            elif total_TD is not None:
                total_TD[positions] = grad_nV @ weight_VD
        for index, (input_TD, weight_VD) in enumerate(zip(self._logits.inputs, self._logits.weights, strict=True)):
            if self._needs_weight[index]:
                factors = grad_nV.t(), input_TD[positions]
                self._weights[index] = _add_product(self._weights[index], *factors, _gradient_dtype(weight_VD))
        if self._bias is not None:
            self._bias += grad_nV.sum(0)
        if self._given is not None:
            self._given[positions] = grad_nV

    @property
    def tensors(self) -> list[Tensor | None]:
        """In the order of ``needed``; None where none is wanted."""
        weights = [
            torch.zeros_like(weight) if needed and total is None else total
            for weight, needed, total in zip(self._logits.weights, self._needs_weight, self._weights, strict=True)
        ]
        return [*self._inputs, *weights, self._bias, self._given]


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """Of the gradient that a weight wants, which may have more digits than the weight."""
    wanted = weight.grad_dtype if weight.is_leaf else None
    return wanted or weight.dtype


def _add_product(total_VD: Tensor | None, grad_Vn: Tensor, input_nD: Tensor, dtype: torch.dtype) -> Tensor:
    """``total + grad @ input`` in a dtype, in place, a block of ids at a time.

    A product of bf16 that is added to float32 is rounded before, and CPUs compute one into a float32 copy of all of it.
    """
    is_first = total_VD is None
    if total_VD is None:
        total_VD = torch.empty(len(grad_Vn), input_nD.shape[1], dtype=dtype, device=grad_Vn.device)
    for total_vD, grad_vn in zip(total_VD.split(_ROWS), grad_Vn.split(_ROWS), strict=True):
        if dtype is not grad_Vn.dtype:
            total_vD.copy_(grad_vn @ input_nD) if is_first else total_vD.add_(grad_vn @ input_nD)
        elif is_first:
            torch.mm(grad_vn, input_nD, out=total_vD)
        else:
            total_vD.addmm_(grad_vn, input_nD)
    return total_VD


def _arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def rows_at_a_time(num_ids: int, device: torch.device) -> int:
    """Tokens of a block, whose arithmetic is done in scratch buffers."""
    if device.type != "cpu":
        return max(1, _BLOCK_ELEMENTS // num_ids)
    return torch.get_num_threads() * max(1, _BLOCK_ELEMENTS_CPU // num_ids)


@cache
def _compiled() -> Callable[..., Tensor]:
    def whole_chunk(
        student_nV: Tensor, teacher: Tensor | SparseSignal | None, labels_n: Tensor, weights_n: Tensor, terms: Terms
    ) -> Tensor:
        scratch = [torch.empty_like(student_nV, dtype=torch.float32) for _ in range(terms.num_buffers)]
        return replace_by_gradient(student_nV, teacher, labels_n, weights_n, terms, scratch)

    return torch.compile(whole_chunk)
