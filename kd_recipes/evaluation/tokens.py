"""What a model says of each token of a text, alone and beside a reference: the numbers that all others are made of."""

# B sequences, S positions, T = B * S, N tokens with a label, n some of them, V vocabulary, M teachers

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.signals import DenseSignal, LinearLogits, MixtureSignal, Signal, SparseSignal

MAX_LOGITS = 2**24  # of a model that exist at a time, in float32


@dataclass(frozen=True)
class TokenValues:
    """Of each token that has a label, in float32 on the host.

    Args:
        rows_N: the sequence of the batch that it is in.
        labels_N: its id.
        values: name -> ``[N]``. ``cross_entropy`` with the label and ``entropy`` in nats; ``accuracy``: 1 where the
            likeliest id is the label; ``confidence``: its probability. With a reference also ``kl`` (reference ||
            model) and ``reverse_kl`` in nats, ``agreement``: 1 where both have the same likeliest id,
            ``reference_cross_entropy``, ``reference_entropy``, ``reference_accuracy``, ``reference_confidence``. With
            a sparse reference both divergences are at its temperature, over its ids and one bucket for all others, or
            estimated from the ids drawn; what it does not know is nan. Of a mixture, ``reference_`` is what it is
            before its weights have seen the label, and of each teacher there are :func:`teacher_names`.
    """

    rows_N: Tensor
    labels_N: Tensor
    values: Mapping[str, Tensor]


@torch.no_grad()
def token_values(model: DenseSignal, reference: Signal | None, batch: Batch, *, num_ids: int) -> TokenValues:
    """Compare a model with a batch's labels, and with a reference; logits exist for some tokens at a time.

    Args:
        model: on the batch.
        reference: on the same batch; may be on another device.
        batch: its labels say which tokens count.
        num_ids: ids that count: those beyond are padding of the vocabulary.
    """
    labels_T = batch.labels_BS.flatten()
    positions_N = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
    parts: list[dict[str, Tensor]] = []
    for positions_n in positions_N.split(max(1, MAX_LOGITS // num_ids)):
        log_q_nV = _log_softmax(model.logits, positions_n, num_ids)
        labels_n = labels_T[positions_n].to(log_q_nV.device)
        values = _alone(log_q_nV, labels_n)
        if reference is not None:
            own, shared = _compare(log_q_nV, reference, positions_n, labels_n)
            values |= {f"reference_{name}": value for name, value in own.items()} | shared
        parts.append({name: value.cpu() for name, value in values.items()})
    names = parts[0] if parts else ()
    joined = {name: torch.cat([part[name] for part in parts]) for name in names}
    return TokenValues((positions_N // batch.labels_BS.shape[1]).cpu(), labels_T[positions_N].cpu(), joined)


def teacher_names(reference: Signal | None) -> Sequence[str]:
    """What is known of each teacher of a mixture: its cross entropy, its KL(teacher || model), its weight."""
    names = reference.logits if isinstance(reference, MixtureSignal) else ()
    return [f"teacher_{name}/{value}" for name in names for value in ("cross_entropy", "kl", "weight")]


def _log_softmax(logits: LinearLogits, positions_n: Tensor, num_ids: int) -> Tensor:
    return logits.first(num_ids).compute(positions_n).float().log_softmax(-1)


def _alone(log_q_nV: Tensor, labels_n: Tensor) -> dict[str, Tensor]:
    highest_n, likeliest_n = log_q_nV.max(-1)
    return {
        "cross_entropy": -log_q_nV.gather(1, labels_n[:, None])[:, 0],
        "entropy": -_expectation(log_q_nV, log_q_nV),
        "accuracy": (likeliest_n == labels_n).float(),
        "confidence": highest_n.exp(),
    }


def _compare(
    log_q_nV: Tensor, reference: Signal, positions_n: Tensor, labels_n: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a reference says of the labels, and how the model compares with it."""
    if isinstance(reference, DenseSignal):
        log_p_nV = _log_softmax(reference.logits, positions_n, log_q_nV.shape[1]).to(log_q_nV.device)
        return _alone(log_p_nV, labels_n), _beside(log_q_nV, log_p_nV)
    if isinstance(reference, MixtureSignal):
        return _compare_mixture(log_q_nV, reference, positions_n, labels_n)
    sparse = reference[positions_n.to(reference.ids_TK.device)].to(log_q_nV.device)
    own = _known(sparse, labels_n)
    shared = _beside_drawn(log_q_nV, sparse) if sparse.is_drawn else _beside_likeliest(log_q_nV, sparse)
    return own, shared | {"agreement": (_likeliest(sparse) == log_q_nV.argmax(-1)).float()}


def _compare_mixture(
    log_q_nV: Tensor, mixture: MixtureSignal, positions_n: Tensor, labels_n: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    log_p_MnV = [
        _log_softmax(logits, positions_n, log_q_nV.shape[1]).to(log_q_nV.device) for logits in mixture.logits.values()
    ]
    log_p_label_nM = torch.cat([log_p_nV.gather(1, labels_n[:, None]) for log_p_nV in log_p_MnV], 1)
    log_prior_nM = mixture.log_weights_TM[positions_n.to(mixture.log_weights_TM.device)].to(log_p_label_nM)
    log_weights_nM = mixture.log_weights(positions_n, log_p_label_nM)
    values = [
        (-log_p_label_nM[:, index], _expectation(log_p_nV, log_p_nV - log_q_nV), log_weights_nM[:, index].exp())
        for index, log_p_nV in enumerate(log_p_MnV)
    ]
    of_teachers = dict(zip(teacher_names(mixture), (value_n for three in values for value_n in three), strict=True))
    own = _alone(_mixed(log_p_MnV, log_prior_nM), labels_n)
    return own, _beside(log_q_nV, _mixed(log_p_MnV, log_weights_nM)) | of_teachers


def _mixed(log_p_MnV: Sequence[Tensor], log_weights_nM: Tensor) -> Tensor:
    weighted = (log_p_nV + log_n1 for log_p_nV, log_n1 in zip(log_p_MnV, log_weights_nM.split(1, -1), strict=True))
    mixed_nV: Tensor = reduce(torch.logaddexp, weighted)
    return mixed_nV


def _likeliest(sparse: SparseSignal) -> Tensor:
    if sparse.unsoftened is not None:
        return sparse.unsoftened.likeliest_T
    return sparse.ids_TK.gather(1, sparse.log_p_TK.argmax(-1, keepdim=True))[:, 0]


def _known(sparse: SparseSignal, labels_n: Tensor) -> dict[str, Tensor]:
    accuracy_n = (_likeliest(sparse) == labels_n).float()
    exact, unknown_n = sparse.unsoftened, torch.full_like(accuracy_n, torch.nan)
    if exact is None:
        return {"cross_entropy": unknown_n, "entropy": unknown_n, "accuracy": accuracy_n}
    return {
        "cross_entropy": -exact.log_p_label_T,
        "entropy": exact.entropy_T,
        "accuracy": accuracy_n,
        "confidence": exact.log_p_likeliest_T.exp(),
    }


def _softened(log_q_nV: Tensor, temperature: float) -> Tensor:
    return log_q_nV if temperature == 1 else (log_q_nV / temperature).log_softmax(-1)


def _beside_likeliest(log_q_nV: Tensor, sparse: SparseSignal) -> dict[str, Tensor]:
    log_q_nV = _softened(log_q_nV, sparse.temperature)
    is_named_nK = sparse.log_p_TK > -torch.inf
    ids_nK = torch.where(is_named_nK, sparse.ids_TK, sparse.ids_TK[:, :1])
    log_q_nK = log_q_nV.gather(1, ids_nK).masked_fill(~is_named_nK, -torch.inf)
    log_tail_n1 = log_q_nV.scatter(1, ids_nK, -torch.inf).logsumexp(-1, keepdim=True)
    log_tail_n1 = torch.where(is_named_nK.any(-1, keepdim=True), log_tail_n1, 0.0)
    log_q_nB, log_p_nB = (
        torch.cat((log_q_nK, log_tail_n1), 1),
        torch.cat((sparse.log_p_TK, sparse.log_tail_T[:, None]), 1),
    )
    return _divergences(log_q_nB, log_p_nB)


def _beside_drawn(log_q_nV: Tensor, sparse: SparseSignal) -> dict[str, Tensor]:
    """Estimates, as :func:`kd_recipes.losses.rows.replace_by_gradient` makes them."""
    assert sparse.weights_TK is not None
    log_q_nK = _softened(log_q_nV, sparse.temperature).gather(1, sparse.ids_TK)
    log_ratio_nK = torch.where(sparse.weights_TK > 0, log_q_nK - sparse.log_p_TK, 0.0)
    ratio_nK = log_ratio_nK.exp()
    surplus_nK = ratio_nK * log_ratio_nK - ratio_nK + 1
    return {
        "kl": -(sparse.weights_TK * log_ratio_nK).sum(-1),
        "reverse_kl": (sparse.weights_TK * surplus_nK).sum(-1),
    }


def _beside(log_q_nV: Tensor, log_p_nV: Tensor) -> dict[str, Tensor]:
    agreement_n = (log_p_nV.argmax(-1) == log_q_nV.argmax(-1)).float()
    return _divergences(log_q_nV, log_p_nV) | {"agreement": agreement_n}


def _divergences(log_q_nV: Tensor, log_p_nV: Tensor) -> dict[str, Tensor]:
    difference_nV = log_p_nV - log_q_nV
    return {
        "kl": _expectation(log_p_nV, difference_nV),
        "reverse_kl": -_expectation(log_q_nV, difference_nV),
    }


def _expectation(log_p_nV: Tensor, values_nV: Tensor) -> Tensor:
    """Of values under a distribution; an id of no probability counts nothing, whatever its value."""
    return torch.where(log_p_nV == -torch.inf, 0.0, log_p_nV.exp() * values_nV).sum(-1)
