"""What a model says of a batch: logits that are not computed yet, of one model or several, or the few likeliest ids.

The one thing that a loss knows of student and teacher. Logits stay products of hidden states and output heads until
the loss wants them, some tokens at a time.
"""

# B sequences, S positions, T = B * S, n some of them, D_k widths, V vocabulary, K ids kept, M models

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

_COLUMNS = 1024  # of a product of float32 matrices on a CPU that are computed at a time


@dataclass(frozen=True)
class LinearLogits:
    """``soft_cap(sum_k inputs[k] @ weights[k].T + bias)``, not computed yet.

    One product is an output head; a second one a low-rank adapter on it. Equals, without the memory,

        z = sum(x @ w.T for x, w in zip(inputs, weights)) + bias
        logits = soft_cap * tanh(z / soft_cap)

    Args:
        inputs: ``[T, D_k]`` each, tokens of all sequences one after the other.
        weights: ``[V, D_k]`` each.
        bias_V: added; None for none.
        soft_cap: largest absolute logit, smoothly approached (Gemma 2, arXiv 2408.00118); None for none.
        given_TV: logits that somebody has computed already, instead of all of the above.
    """

    inputs: tuple[Tensor, ...] = ()
    weights: tuple[Tensor, ...] = ()
    bias_V: Tensor | None = None
    soft_cap: float | None = None
    given_TV: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """V, padding of the vocabulary included."""
        return self.given_TV.shape[1] if self.given_TV is not None else self.weights[0].shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return self.given_TV.dtype if self.given_TV is not None else self.inputs[0].dtype

    def first(self, num_ids: int) -> LinearLogits:
        """The logits of the first ids alone; nothing is copied."""
        bias_V = None if self.bias_V is None else self.bias_V[:num_ids]
        given_TV = None if self.given_TV is None else self.given_TV[:, :num_ids]
        weights = tuple(weight_VD[:num_ids] for weight_VD in self.weights)
        return LinearLogits(self.inputs, weights, bias_V, self.soft_cap, given_TV)

    def compute(self, positions: slice | Tensor = slice(None)) -> Tensor:
        """Logits ``[n, V]`` of some tokens, to be differentiated by autograd."""
        if self.given_TV is not None:
            return self.given_TV[positions]
        factors = zip(self.inputs, self.weights, strict=True)
        logits_nV = reduce(torch.add, (F.linear(input_TD[positions], weight_VD) for input_TD, weight_VD in factors))
        if self.bias_V is not None:
            logits_nV = logits_nV + self.bias_V
        return logits_nV if self.soft_cap is None else self.soft_cap * torch.tanh(logits_nV / self.soft_cap)

    @torch.no_grad()
    def before_cap(self, positions: slice | Tensor, out_nV: Tensor) -> Tensor:
        """Logits of some tokens before the soft cap.

        Args:
            positions: which of the T tokens.
            out_nV: where they go, on its own device; left alone where the logits are given.

        Returns:
            ``[n, V]``; not to be written to where they are given.
        """
        if isinstance(positions, Tensor):
            positions = positions.to(self._device)
        if self.given_TV is not None:
            return self.given_TV[positions].to(out_nV.device)
        if self._device != out_nV.device:
            here_nV = torch.empty(out_nV.shape, dtype=self.dtype, device=self._device)
            return out_nV.copy_(self.before_cap(positions, here_nV))
        for index, (input_TD, weight_VD) in enumerate(zip(self.inputs, self.weights, strict=True)):
            multiply = torch.Tensor.addmm_ if index else _set_to_product
            multiply(out_nV, input_TD[positions], weight_VD.t())
        return out_nV if self.bias_V is None else out_nV.add_(self.bias_V)

    @property
    def _device(self) -> torch.device:
        return self.given_TV.device if self.given_TV is not None else self.inputs[0].device


def _set_to_product(out_nV: Tensor, input_nD: Tensor, weight_DV: Tensor) -> Tensor:
    if out_nV.device.type == "cpu" and out_nV.dtype is torch.float32:
        # a few rows by 150,000 columns: MKL does them block by block in four fifths of the time
        for block in range(0, out_nV.shape[1], _COLUMNS):
            columns = slice(block, block + _COLUMNS)
            torch.mm(input_nD, weight_DV[:, columns], out=out_nV[:, columns])
        return out_nV
    return torch.mm(input_nD, weight_DV, out=out_nV)


Kind = Literal["hidden", "query", "key", "value"]


@dataclass(frozen=True, order=True)
class Tap:
    """A place inside a model.

    Args:
        layer: number of the block, from 1.
        kind: ``hidden``, the residual stream after the block ``[B, S, D]``; or what its attention compares,
            ``query``, ``key`` and ``value`` ``[B, S, heads * width]``, before positions are rotated into them.
    """

    layer: int
    kind: Kind = "hidden"


@dataclass(frozen=True)
class DenseSignal:
    """A model's whole distribution at each position.

    Args:
        logits: over all ids.
        features: what was seen at the places that were asked for.
    """

    logits: LinearLogits
    features: Mapping[Tap, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class MixtureSignal:
    """Several models' distributions, mixed as probabilities, each softened by itself: ``p = sum_i w_i p_i``.

    Equals, without the memory,

        log_p = torch.logsumexp(torch.stack([log_w[i] + log_softmax(z[i] / temperature) for i in models]), 0)

    Args:
        logits: name of a model -> over all ids.
        log_weights_TM: logarithms of the weights, which sum to 1 in each row; -inf for a weight of 0.
        by_likelihood: whether each weight is multiplied by its model's probability of the label, at temperature 1, and
            brought back to a sum of 1: the posterior of the models, given the label.
    """

    logits: Mapping[str, LinearLogits]
    log_weights_TM: Tensor
    by_likelihood: bool = False

    def log_weights(self, positions: slice | Tensor, log_p_label_nM: Tensor) -> Tensor:
        """Those that some tokens are mixed with ``[n, M]``.

        Args:
            positions: which of the T tokens.
            log_p_label_nM: what each model gives their labels at temperature 1.
        """
        if isinstance(positions, Tensor):
            positions = positions.to(self.log_weights_TM.device)
        log_weights_nM = self.log_weights_TM[positions].to(log_p_label_nM)
        return (log_weights_nM + log_p_label_nM).log_softmax(-1) if self.by_likelihood else log_weights_nM


@dataclass(frozen=True)
class Exact:
    """What is known of a teacher's whole distribution at each position, at one temperature; nan is what is not.

    Args:
        likeliest_T: its likeliest id.
        log_p_likeliest_T: that id's log-probability.
        log_p_label_T: the label's; of any id where there is no label.
        entropy_T: in nats.
    """

    likeliest_T: Tensor
    log_p_likeliest_T: Tensor
    log_p_label_T: Tensor
    entropy_T: Tensor

    @classmethod
    def of(cls, log_p_TV: Tensor, labels_T: Tensor) -> Exact:
        """Of whole distributions, and the labels at their positions."""
        highest_T, likeliest_T = log_p_TV.max(-1)
        log_p_label_T = log_p_TV.gather(1, labels_T[:, None])[:, 0]
        return cls(likeliest_T, highest_T, log_p_label_T, torch.special.entr(log_p_TV.exp()).sum(-1))

    def map(self, function: Callable[[Tensor], Tensor]) -> Exact:
        """The same, each tensor replaced by what a function makes of it."""
        tensors = (self.likeliest_T, self.log_p_likeliest_T, self.log_p_label_T, self.entropy_T)
        return Exact(*map(function, tensors))


@dataclass(frozen=True)
class SparseSignal:
    """Some of a teacher's ids at each position, as a cache of it gives them.

    Either its likeliest ids, and what is left for all others; or ids that were drawn from it: then what is expected
    under the teacher is estimated by the mean over what was drawn, and nothing is known of the others.

    Args:
        ids_TK: distinct within a row.
        log_p_TK: their log-probabilities over the whole vocabulary; -inf where a row has fewer than K ids.
        log_tail_T: logarithm of the probability of all ids that are not named; -inf where there is none.
        temperature: at which the teacher's distribution was taken; it cannot be softened afterwards.
        weights_TK: of ids that were drawn, the share of the draws that each got, 0 where a row has fewer than K ids;
            None for likeliest ids.
        exact: what else is known, at ``temperature``.
        unsoftened: the same at temperature 1.
    """

    ids_TK: Tensor
    log_p_TK: Tensor
    log_tail_T: Tensor
    temperature: float = 1.0
    weights_TK: Tensor | None = None
    exact: Exact | None = None
    unsoftened: Exact | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether its ids were drawn, and are not the likeliest."""
        return self.weights_TK is not None

    def __getitem__(self, positions: slice | Tensor) -> SparseSignal:
        """At some positions."""
        return self._map(lambda tensor: tensor[positions])

    def to(self, device: torch.device) -> SparseSignal:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> SparseSignal:
        return replace(
            self,
            ids_TK=function(self.ids_TK),
            log_p_TK=function(self.log_p_TK),
            log_tail_T=function(self.log_tail_T),
            weights_TK=None if self.weights_TK is None else function(self.weights_TK),
            exact=None if self.exact is None else self.exact.map(function),
            unsoftened=None if self.unsoftened is None else self.unsoftened.map(function),
        )

    @classmethod
    def top_k(cls, logits_TV: Tensor, k: int, temperature: float = 1.0) -> SparseSignal:
        """The k likeliest ids of each row of logits ``[T, V]``."""
        log_p_TV = F.log_softmax(logits_TV.float() / temperature, -1)
        log_p_TK, ids_TK = log_p_TV.topk(k, -1)
        # not 1 - sum(p): that has no digits left where the k ids hold nearly everything
        log_tail_T = log_p_TV.scatter(1, ids_TK, -torch.inf).logsumexp(-1)
        return cls(ids_TK, log_p_TK, log_tail_T, temperature)


Signal = DenseSignal | SparseSignal | MixtureSignal
