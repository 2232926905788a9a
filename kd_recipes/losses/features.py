"""Terms of the objective that compare what goes on inside student and teacher, not what they predict.

Each is a sum over valid tokens, as the other terms are, and is added to them with its weight.
"""

# B sequences, S positions, N valid tokens, D student's width, E teacher's, H relation heads, W width of one

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import matrix_norm
from torch.utils.checkpoint import checkpoint

from kd_recipes._torchtune import ModelSize
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import ConfigError, Problem, gather, within
from kd_recipes.losses.objective import LossSum
from kd_recipes.signals import DenseSignal, Kind, Signal, Tap

Features = Mapping[Tap, Tensor]
Layers = Literal["uniform", "last"] | Sequence[Sequence[int]]


def cosine_distance(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """``1 - cos(x, y)`` of each row, ``[N]``."""
    similarity_N: Tensor = F.cosine_similarity(x_ND, y_ND, dim=-1)
    return 1 - similarity_N


def mean_squared_error(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """``mean((x - y)^2)`` of each row, ``[N]``."""
    return (x_ND - y_ND).square().mean(-1)


def linear_cka(x_ND: Tensor, y_NE: Tensor, weights_N: Tensor) -> Tensor:
    """Centered kernel alignment of two sets of rows, with a linear kernel (Kornblith et al., arXiv 1905.00414, eq. 3).

        cka = ||Y^T X||^2 / (||X^T X|| ||Y^T Y||), columns of X and Y centered, Frobenius norms

    It does not see rotations nor a common scale, and the widths may differ. Fewer rows than columns bring it near 1
    whatever they are.

    Args:
        x_ND: rows.
        y_NE: rows of the same tokens.
        weights_N: how often each token counts, from 0.

    Returns:
        A scalar in [0, 1]; 1 for the same rows, and where a side's rows are all alike, which says nothing.
    """
    share_N1 = (weights_N / weights_N.sum()).unsqueeze(-1)
    scale = [(share_N1 * z.square()).sum() for z in (x_ND, y_NE)]
    x_ND, y_NE = ((z - (share_N1 * z).sum(0)) * share_N1.sqrt() for z in (x_ND, y_NE))
    if len(x_ND) < max(x_ND.shape[1], y_NE.shape[1]):  # the same norms from products of rows
        kernel_x, kernel_y = x_ND @ x_ND.T, y_NE @ y_NE.T
        norms, common = (matrix_norm(kernel_x), matrix_norm(kernel_y)), (kernel_x * kernel_y).sum()
    else:
        norms = (matrix_norm(x_ND.T @ x_ND), matrix_norm(y_NE.T @ y_NE))
        common = matrix_norm(y_NE.T @ x_ND).square()
    smallest = 10 * torch.finfo(x_ND.dtype).eps  # of the spread's share, below which it is made of rounding errors
    is_flat = (norms[0] <= smallest * scale[0]) | (norms[1] <= smallest * scale[1])
    one = torch.ones_like(common)
    return torch.where(is_flat, one, common / torch.where(is_flat, one, norms[0] * norms[1]))


def relation_divergence(x_NHW: Tensor, x_SHW: Tensor, y_NHW: Tensor, y_SHW: Tensor, is_seen_NS: Tensor) -> Tensor:
    """How differently two models relate tokens to one another (MiniLMv2, arXiv 2012.15828, eq. 4 and 5).

        relation(a) = softmax(a_N @ a_S.T / sqrt(W)), over the positions that a token sees
        value = mean over heads of KL(relation(y), relation(x))

    Args:
        x_NHW: vectors of some tokens, of the student; W may differ from the teacher's.
        x_SHW: of all positions.
        y_NHW: of the teacher, likewise.
        y_SHW: of the teacher, likewise.
        is_seen_NS: which positions each token sees.

    Returns:
        ``[N]``, nats.
    """

    def log_relation(a_NHW: Tensor, a_SHW: Tensor) -> Tensor:
        score_HNS = torch.einsum("nhw,shw->hns", a_NHW, a_SHW) / math.sqrt(a_NHW.shape[-1])
        return F.log_softmax(score_HNS.masked_fill(~is_seen_NS, -1e30), -1)  # -inf would give 0 * nan below

    log_y_HNS = log_relation(y_NHW, y_SHW)
    return F.kl_div(log_relation(x_NHW, x_SHW), log_y_HNS, log_target=True, reduction="none").sum(-1).mean(0)


def pair_layers(layers: Layers, num_student: int, num_teacher: int) -> list[tuple[int, int]]:
    """Which block of the student is compared with which of the teacher, both counted from 1.

    Args:
        layers: ``uniform``: each block of the student, with the one that stands at the same share of the teacher's
            depth; ``last``: the last with the last; or pairs.
        num_student: blocks.
        num_teacher: blocks.

    Raises:
        ConfigError: a pair that is none, or a block that a model does not have.
    """
    if layers == "uniform":
        return [(i, max(1, round(i * num_teacher / num_student))) for i in range(1, num_student + 1)]
    if layers == "last":
        return [(num_student, num_teacher)]
    listed: Any = layers
    pairs = [tuple(pair) if isinstance(pair, Sequence) else () for pair in listed]
    limits = (num_student, num_teacher)
    if not pairs or not all(
        len(pair) == 2 and all(type(i) is int and 1 <= i <= limit for i, limit in zip(pair, limits, strict=True))
        for pair in pairs
    ):
        wanted = f"uniform, last, or pairs [student's block of 1 to {num_student}, teacher's of 1 to {num_teacher}]"
        raise ConfigError(Problem(".layers", layers, wanted))
    return pairs


class FeatureTerm(nn.Module, ABC):
    """A term; parameters of its own are trained and saved with the student, and left out when it is exported.

    Args:
        name: of its metric.
        weight: what its sum is multiplied by, above 0.
        layers: as in :func:`pair_layers`.
        kinds: of the features that it compares, as :class:`~kd_recipes.signals.Tap` has them.
    """

    def __init__(self, name: str, weight: float, layers: Layers, kinds: Sequence[Kind]) -> None:
        super().__init__()
        if not 0 < weight < math.inf:
            raise ConfigError(Problem(".weight", weight, "a number above 0"))
        unknown = set(kinds) - set(get_args(Kind))
        assert kinds, "a term compares something"
        assert not unknown, f"no features are of kind {unknown}"
        self.name, self.weight, self._layers, self._kinds = name, weight, layers, tuple(kinds)
        self.taps: list[tuple[Tap, Tap]] = []

    def connect(self, student: ModelSize, teacher: ModelSize) -> None:
        """Make ready for two models.

        Raises:
            ConfigError: they do not have what is compared.
        """
        pairs = pair_layers(self._layers, student.num_layers, teacher.num_layers)
        self.taps = [(Tap(s, kind), Tap(t, kind)) for s, t in pairs for kind in self._kinds]
        self.prepare(student, teacher)

    def forward(self, student: Features, teacher: Features, batch: Batch, weights_BS: Tensor) -> Tensor:
        """The sum over tokens of the mean over pairs of features.

        Args:
            student: of the batch.
            teacher: of the batch, on any device.
            batch: says which positions see one another.
            weights_BS: how often each position counts; 0 where it has no label.
        """
        values = [self.compare(pair, student[pair[0]], teacher[pair[1]], batch, weights_BS) for pair in self.taps]
        return torch.stack(values).mean()

    @abstractmethod
    def prepare(self, student: ModelSize, teacher: ModelSize) -> None:
        """Check that the models have what is compared at :attr:`taps`, and make parameters where they are needed."""

    @abstractmethod
    def compare(self, pair: tuple[Tap, Tap], x_BSD: Tensor, y_BSE: Tensor, batch: Batch, weights_BS: Tensor) -> Tensor:
        """The sum over tokens of how far the student's features are from the teacher's, a float32 scalar.

        Args:
            pair: which of :attr:`taps` they were seen at.
            x_BSD: the student's, in its dtype.
            y_BSE: the teacher's, in its dtype and on its device.
            batch: as in :meth:`forward`.
            weights_BS: as in :meth:`forward`.
        """


def _upcast(features: Tensor, like: Tensor) -> Tensor:
    """Features on a device and at least in float32: sums of squares need the digits."""
    return features.to(device=like.device, dtype=torch.promote_types(features.dtype, torch.float32))


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mean_squared_error, "cosine": cosine_distance}


class HiddenStates(FeatureTerm):
    """How far the residual streams after some blocks are from the teacher's.

    Where the widths differ, ``mse`` and ``cosine`` compare a learned linear map of the student's states, one for each
    pair of blocks (TinyBERT, arXiv 1909.10351).

    Args:
        distance: ``mse``, ``cosine`` (DistilBERT, arXiv 1910.01108) or ``cka``: 1 - :func:`linear_cka`, over the
            valid tokens of a micro-batch.
        weight: of the term.
        layers: as in :func:`pair_layers`.
    """

    def __init__(self, distance: str = "cosine", weight: float = 1.0, layers: Layers = "uniform") -> None:
        super().__init__(f"hidden_{distance}", weight, layers, ["hidden"])
        if distance not in (*_DISTANCES, "cka"):
            raise ConfigError(Problem(".distance", distance, "mse, cosine or cka"))
        self._distance = distance
        self.projections = nn.ModuleDict()

    def prepare(self, student: ModelSize, teacher: ModelSize) -> None:
        """Make a projection for each pair where the widths differ."""
        if self._distance != "cka" and student.embed_dim != teacher.embed_dim:
            widths = (student.embed_dim, teacher.embed_dim)
            for pair in self.taps:
                self.projections[_name(pair)] = nn.Linear(*widths, bias=False)

    def compare(self, pair: tuple[Tap, Tap], x_BSD: Tensor, y_BSE: Tensor, batch: Batch, weights_BS: Tensor) -> Tensor:
        """As the distance says; a pair's float32 copies are made once more in the backward pass, and not kept."""
        is_valid_BS = weights_BS != 0
        x_ND, y_NE = x_BSD[is_valid_BS], y_BSE[is_valid_BS.to(y_BSE.device)]
        return checkpoint(self._sum, pair, x_ND, y_NE, weights_BS[is_valid_BS], use_reentrant=False)  # type: ignore[no-any-return]

    def _sum(self, pair: tuple[Tap, Tap], x_ND: Tensor, y_NE: Tensor, weights_N: Tensor) -> Tensor:
        y_NE, x_ND = _upcast(y_NE, like=x_ND), _upcast(x_ND, like=x_ND)
        if self._distance == "cka":
            if len(x_ND) == 0:
                return x_ND.sum()
            return (1 - linear_cka(x_ND, y_NE, weights_N)) * weights_N.sum()
        if self.projections:
            x_ND = self.projections[_name(pair)](x_ND)
        return (_DISTANCES[self._distance](x_ND, y_NE) * weights_N).sum()


def _name(pair: tuple[Tap, Tap]) -> str:
    return f"{pair[0].layer}_{pair[1].layer}"


_RELATION_ELEMENTS = 1 << 24  # heads x tokens x positions that are related at a time: 64 MiB in float32, five times


class AttentionRelations(FeatureTerm):
    """How differently the queries, keys and values of a block relate the tokens to one another (MiniLMv2).

    The number of heads and their width may differ: both models' vectors are cut into the same number of relation
    heads. A token is related to itself and all earlier ones of its document, before positions are rotated into them.

    Args:
        relations: of ``query``, ``key`` and ``value``.
        num_heads: relation heads; None for the greatest number by which both models' heads can be divided.
        weight: of the term.
        layers: as in :func:`pair_layers`.
    """

    def __init__(
        self,
        relations: Sequence[Kind] = ("query", "key", "value"),
        num_heads: int | None = None,
        weight: float = 1.0,
        layers: Layers = "last",
    ) -> None:
        known = {"query", "key", "value"}
        if (
            isinstance(relations, str)
            or not relations
            or set(relations) - known
            or len(set(relations)) < len(relations)
        ):
            raise ConfigError(Problem(".relations", relations, "a list of query, key and value, each at most once"))
        super().__init__("attention_relations", weight, layers, relations)
        self._num_heads = num_heads
        self._heads: dict[str, int] = {}

    def prepare(self, student: ModelSize, teacher: ModelSize) -> None:
        """Choose the number of relation heads."""
        for key, size in (("model", student), ("teacher_model", teacher)):
            if not size.num_heads:
                wanted = "torchtune's own attention in every block, whose queries AttentionRelations can see"
                raise ConfigError(Problem(key, "attention of another kind", wanted, "Compare HiddenStates instead"))
        num_kv_heads = math.gcd(student.num_kv_heads, teacher.num_kv_heads)
        self._heads = {"query": math.gcd(student.num_heads, teacher.num_heads)}
        self._heads |= {"key": num_kv_heads, "value": num_kv_heads}
        if self._num_heads is not None:
            limit = min(self._heads[kind] for kind in self._kinds)
            is_count = type(self._num_heads) is int and self._num_heads > 0
            if not is_count or any(self._heads[kind] % self._num_heads for kind in self._kinds):
                wanted = f"a number that divides the heads of both models, such as {limit}"
                raise ConfigError(Problem(".num_heads", self._num_heads, wanted))
            self._heads = dict.fromkeys(self._heads, self._num_heads)

    def compare(self, pair: tuple[Tap, Tap], x_BSD: Tensor, y_BSE: Tensor, batch: Batch, weights_BS: Tensor) -> Tensor:
        """As :func:`relation_divergence`; relations are computed once more in the backward pass, and not kept."""
        num_heads = self._heads[pair[0].kind]
        x_BSHW, y_BSHW = (_upcast(z, like=x_BSD).unflatten(-1, (num_heads, -1)) for z in (x_BSD, y_BSE))
        num_rows = max(1, _RELATION_ELEMENTS // (num_heads * x_BSD.shape[1]))
        total: Tensor = x_BSHW[:0].sum()
        for sequence, weights_S in enumerate(weights_BS):
            position_S = torch.arange(len(weights_S), device=x_BSD.device)
            for rows_N in weights_S.nonzero().squeeze(1).split(num_rows):
                is_seen_NS = position_S <= rows_N[:, None]
                if batch.input_pos_BS is not None:  # packed: each document begins at position 0
                    document_S = (batch.input_pos_BS[sequence] == 0).cumsum(0)
                    is_seen_NS &= document_S == document_S[rows_N, None]
                x_SHW, y_SHW = x_BSHW[sequence], y_BSHW[sequence]
                tensors = (x_SHW[rows_N], x_SHW, y_SHW[rows_N], y_SHW, is_seen_NS)
                value_N = checkpoint(relation_divergence, *tensors, use_reentrant=False)
                total = total + (value_N * weights_S[rows_N]).sum()
        return total


class FeatureTerms(nn.Module):
    """All the terms of a run; none of them costs nothing.

    Args:
        terms: by the key of the section that describes each, for messages.
    """

    def __init__(self, terms: Mapping[str, FeatureTerm]) -> None:
        super().__init__()
        self.by_name = nn.ModuleDict()
        for term in terms.values():
            self.by_name[term.name if term.name not in self.by_name else f"{term.name}_{len(self.by_name)}"] = term
        self._terms = dict(zip(self.by_name, terms.values(), strict=True))  # typed, which a ModuleDict is not
        self._keys = list(terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a term."""
        return len(self._terms) > 0

    def connect(self, student: ModelSize, teacher: ModelSize) -> None:
        """Make each ready for two models.

        Raises:
            ConfigError: they do not have what some of them compare.
        """
        terms = zip(self._keys, self._terms.values(), strict=True)
        gather(*(partial(within, key, partial(term.connect, student, teacher)) for key, term in terms))

    @property
    def student_taps(self) -> set[Tap]:
        """Where the student is looked into."""
        return {student for term in self._terms.values() for student, _ in term.taps}

    @property
    def teacher_taps(self) -> set[Tap]:
        """Where the teacher is."""
        return {teacher for term in self._terms.values() for _, teacher in term.taps}

    def forward(
        self,
        loss: LossSum,
        student: DenseSignal,
        signal: Signal | None,
        batch: Batch,
        num_tokens: int = 1,
    ) -> LossSum:
        """The loss with the terms added.

        Args:
            loss: of the other terms.
            student: with the features at :attr:`student_taps`.
            signal: with those at :attr:`teacher_taps`.
            batch: both models' input.
            num_tokens: valid tokens of the whole step: the divisor of the sums.
        """
        if not self._terms:
            return loss
        assert isinstance(signal, DenseSignal), "features are a model's that runs"
        is_valid_BS = batch.labels_BS != IGNORE_INDEX
        weights_BS = is_valid_BS.float()
        if batch.weights_BS is not None:
            weights_BS = batch.weights_BS.float().masked_fill(~is_valid_BS, 0)
        total, sums = loss.total, dict(loss.sums)
        for name, term in self._terms.items():
            value = term(student.features, signal.features, batch, weights_BS)
            sums[name] = value.detach().double()
            total = total + term.weight * value / num_tokens
        return replace(loss, total=total, sums=sums)
