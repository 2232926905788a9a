"""Several teachers as one: their distributions mixed in the memory of a chunk, and what each of them is worth there."""

# n tokens of a chunk or block, V ids compared, M teachers

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from kd_recipes.losses.rows import TOKEN_VALUES, likeliest, load, softmax
from kd_recipes.signals import MixtureSignal


class Mixer:
    """Mixes a chunk of tokens at a time. In memory are the mixed chunk and one of a single teacher's logits.

    Args:
        signal: the teachers on all tokens.
        num_ids: V; rows of their heads beyond are padding.
        temperature: each is softened by.
        num_tokens: of the largest chunk.
        device: of the labels.
        dtype: of the arithmetic.
        is_compiled: whether the arithmetic on a teacher's logits is compiled into one kernel.
    """

    def __init__(
        self,
        signal: MixtureSignal,
        *,
        num_ids: int,
        temperature: float,
        num_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        is_compiled: bool,
    ) -> None:
        self._signal, self._temperature, self._is_compiled = signal, temperature, is_compiled
        self._logits = [logits.first(num_ids) for logits in signal.logits.values()]
        self._mixed = torch.empty(num_tokens, num_ids, dtype=dtype, device=device)
        computed = {logits.dtype for logits in self._logits if logits.given_TV is None}
        self._computed = {kind: torch.empty(num_tokens, num_ids, dtype=kind, device=device) for kind in computed}
        self._sums = torch.zeros(1 + 2 * len(self._logits), dtype=torch.float64, device=device)

    def mix(self, positions: slice | Tensor, labels_n: Tensor, scratch: Sequence[Tensor]) -> Tensor:
        """Log-probabilities ``[n, V]`` but for a constant in each row: what a softmax makes of them is the mixture.

        Args:
            positions: which of the T tokens.
            labels_n: their ids.
            scratch: two tensors of a block of rows; unused where the arithmetic is compiled.
        """
        mixed_nV, labels_n1 = self._mixed[: len(labels_n)].fill_(-torch.inf), labels_n.unsqueeze(1)
        log_prior_nM = self._signal.log_weights_TM[positions].to(mixed_nV)
        found = []
        for logits, log_prior_n1 in zip(self._logits, log_prior_nM.split(1, -1), strict=True):
            out_nV = mixed_nV if logits.given_TV is not None else self._computed[logits.dtype][: len(labels_n)]
            raw_nV = logits.before_cap(positions, out_nV)
            settings = (logits.soft_cap, self._temperature, self._signal.by_likelihood)
            found.append(self._add(mixed_nV, raw_nV, labels_n1, log_prior_n1, settings, scratch))
        self._count(positions, log_prior_nM, torch.cat(found, 1))
        return mixed_nV

    def _add(
        self,
        mixed_nV: Tensor,
        raw_nV: Tensor,
        labels_n1: Tensor,
        log_weight_n1: Tensor,
        settings: tuple[float | None, float, bool],
        scratch: Sequence[Tensor],
    ) -> Tensor:
        if self._is_compiled:
            return _compiled()(mixed_nV, raw_nV, labels_n1, log_weight_n1, settings)
        size = len(scratch[0])
        blocks = zip(*(tensor.split(size) for tensor in (mixed_nV, raw_nV, labels_n1, log_weight_n1)), strict=True)
        found = [
            add(mixed, raw, labels, weight, settings, [free[: len(mixed)] for free in scratch])
            for mixed, raw, labels, weight in blocks
        ]
        return torch.cat(found)

    def _count(self, positions: slice | Tensor, log_prior_nM: Tensor, log_p_label_nM: Tensor) -> None:
        """What is known of each teacher, and of the mixture before it has seen the labels."""
        weights_nM = self._signal.log_weights(positions, log_p_label_nM).exp()
        log_p_label_n1 = (log_prior_nM + log_p_label_nM).logsumexp(-1, keepdim=True)
        values = torch.cat((-log_p_label_n1, -log_p_label_nM, weights_nM), 1)
        self._sums += values.sum(0, dtype=torch.float64)

    def complete(self, sums: Tensor) -> Tensor:
        """Sums over all tokens, in the order of ``TOKEN_VALUES``, with those of :func:`value_names` behind them."""
        of_teachers = self._sums[1:].view(2, -1).T.flatten()  # the two of the first teacher, of the second, ...
        sums[TOKEN_VALUES.index("teacher_cross_entropy")] = self._sums[0]
        return torch.cat((sums, of_teachers))


def value_names(signal: MixtureSignal) -> tuple[str, ...]:
    """What is known of each teacher: its cross entropy with the labels at temperature 1, and the weight that it got."""
    return tuple(f"teacher_{name}/{value}" for name in signal.logits for value in ("cross_entropy", "weight"))


def add(
    mixed_nV: Tensor,
    raw_nV: Tensor,
    labels_n1: Tensor,
    log_weight_n1: Tensor,
    settings: tuple[float | None, float, bool],
    scratch: Sequence[Tensor],
) -> Tensor:
    """Add a teacher to a mixture: ``mixed = logaddexp(mixed, log_weight + log_softmax(logits / temperature))``.

    Args:
        mixed_nV: changed in place.
        raw_nV: the teacher's logits before the soft cap, which stay as they are.
        labels_n1: ids.
        log_weight_n1: of the teacher.
        settings: its soft cap, the temperature, and whether what it gives the label is added to ``log_weight``.
        scratch: two tensors of the shape and dtype of the mixture.

    Returns:
        ``[n, 1]``, the label's log-probability at temperature 1.
    """
    soft_cap, temperature, by_likelihood = settings
    z_nV, p_nV = scratch
    load(raw_nV, soft_cap, z_nV)
    top_n1 = likeliest(z_nV)
    log_sum_exp_n1 = softmax(z_nV, top_n1, out=p_nV)
    log_p_label_n1 = z_nV.gather(1, labels_n1) - log_sum_exp_n1
    if temperature != 1.0:
        log_sum_exp_n1 = softmax(z_nV.div_(temperature), top_n1, out=p_nV)
    if by_likelihood:
        log_weight_n1 = log_weight_n1 + log_p_label_n1
    torch.logaddexp(mixed_nV, z_nV.sub_(log_sum_exp_n1 - log_weight_n1), out=mixed_nV)
    return log_p_label_n1


@cache
def _compiled() -> Callable[..., Tensor]:
    def whole_chunk(
        mixed_nV: Tensor,
        raw_nV: Tensor,
        labels_n1: Tensor,
        log_weight_n1: Tensor,
        settings: tuple[float | None, float, bool],
    ) -> Tensor:
        return add(mixed_nV, raw_nV, labels_n1, log_weight_n1, settings, [torch.empty_like(mixed_nV) for _ in "zp"])

    return torch.compile(whole_chunk)
