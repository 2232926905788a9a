"""Layers whose weight is a product of factors, trainable as they are: fewer parameters and fewer operations."""

# V vocabulary, O outputs, I inputs, D channels, R rank

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_recipes.errors import ConfigError, Problem


class LowRankLinear(nn.Module):
    """A linear layer whose weight is ``u v``, or ``u s v``: ``y = ((x v^T) s^T) u^T + bias``.

    It computes ``F.linear(x, layer.weight, layer.bias)`` without forming the weight: ``R (I + O)`` multiplications
    for each token where the dense layer has ``I O``. Fresh weights are distributed as wide as nn.Linear's.

    Args:
        in_dim: inputs.
        out_dim: outputs.
        rank: of the weight.
        bias: whether there is one.
        three_factors: whether there is an ``s`` of shape ``[R, R]`` between the other two, at first the identity.

    Raises:
        ConfigError: a rank below 1, or above what a matrix of this shape can have.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, *, bias: bool = False, three_factors: bool = False
    ) -> None:
        super().__init__()
        _check_rank(rank, out_dim, in_dim)
        self.in_features, self.out_features, self.rank = in_dim, out_dim, rank
        self.u = nn.Parameter(torch.empty(out_dim, rank))
        self.s = nn.Parameter(torch.empty(rank, rank)) if three_factors else None
        self.v = nn.Parameter(torch.empty(rank, in_dim))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        # u keeps the variance of what it is given, so that the product has that of nn.Linear's weight
        nn.init.kaiming_uniform_(self.v, a=math.sqrt(5))
        nn.init.kaiming_normal_(self.u, nonlinearity="linear")
        if self.s is not None:
            nn.init.eye_(self.s)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def weight(self) -> Tensor:
        """The whole weight, ``[O, I]``, computed at each access; gradients reach the factors."""
        return self.u @ self.v if self.s is None else self.u @ (self.s @ self.v)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs ``[..., O]`` of the inputs ``[..., I]``."""
        return F.linear(self.inner(x), self.u, self.bias)

    def inner(self, x: Tensor) -> Tensor:
        """What ``u`` is applied to, ``[..., R]``."""
        x = F.linear(x, self.v)
        return x if self.s is None else F.linear(x, self.s)

    def extra_repr(self) -> str:
        """What a printed model says of the layer."""
        settings = f"bias={self.bias is not None}, three_factors={self.s is not None}"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {settings}"


class LowRankEmbedding(nn.Module):
    """An embedding whose table is ``u v``: ``y = u[ids] v``.

    It computes ``F.embedding(ids, layer.weight)`` and looks up ``R`` numbers for each token, not ``D``. A head that is
    tied to it and reads ``weight``, as torchtune's TiedLinear does, forms the whole ``[V, D]`` table each time.

    Args:
        num_embeddings: tokens of the vocabulary.
        embedding_dim: channels.
        rank: of the table.

    Raises:
        ConfigError: a rank below 1, or above what a matrix of this shape can have.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, rank: int) -> None:
        super().__init__()
        _check_rank(rank, num_embeddings, embedding_dim)
        self.num_embeddings, self.embedding_dim, self.rank = num_embeddings, embedding_dim, rank
        self.u = nn.Parameter(torch.empty(num_embeddings, rank))
        self.v = nn.Parameter(torch.empty(rank, embedding_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew; the table's variance is 1, as nn.Embedding's."""
        nn.init.normal_(self.u)
        nn.init.normal_(self.v, std=1 / math.sqrt(self.rank))

    @property
    def weight(self) -> Tensor:
        """The whole table, ``[V, D]``, computed at each access; gradients reach the factors."""
        return self.u @ self.v

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings ``[..., D]`` of token ids ``[...]``."""
        return F.embedding(ids, self.u) @ self.v

    def extra_repr(self) -> str:
        """What a printed model says of the layer."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"


def _check_rank(rank: int, rows: int, columns: int) -> None:
    most = min(rows, columns)
    if not 1 <= rank <= most:
        raise ConfigError(Problem(".rank", rank, f"from 1 to {most}, the most that a {rows} x {columns} matrix has"))
