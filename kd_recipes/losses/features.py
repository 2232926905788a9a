"""Terms of the objective that compare what goes on inside student and teacher, not what they predict.

Each is a sum over valid tokens, as the other terms are, and is added to them with its weight.
"""

# B sequences, S positions, N valid tokens, D student's width, E teacher's, H relation heads, W width of one

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import matrix_norm
from torch.utils.checkpoint import checkpoint

from kd_recipes._torchtune import ModelSize
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.losses.objective import LossSum
from kd_recipes.signals import DenseSignal, SparseSignal, Tap

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
        weights_N: how often each token counts.

    Returns:
        A scalar in [0, 1]; 1 for the same rows.
    """
    share_N1 = (weights_N / weights_N.sum()).unsqueeze(-1)
    x_ND, y_NE = ((z - (share_N1 * z).sum(0)) * share_N1.sqrt() for z in (x_ND, y_NE))
    if len(x_ND) < max(x_ND.shape[1], y_NE.shape[1]):  # the same norms from products of rows
        kernel_x, kernel_y = x_ND @ x_ND.T, y_NE @ y_NE.T
        cka: Tensor = (kernel_x * kernel_y).sum() / (matrix_norm(kernel_x) * matrix_norm(kernel_y))
    else:
        cka = matrix_norm(y_NE.T @ x_ND).square() / (matrix_norm(x_ND.T @ x_ND) * matrix_norm(y_NE.T @ y_NE))
    return cka


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
    wanted = f"uniform, last, or pairs [student's block of 1 to {num_student}, teacher's of 1 to {num_teacher}]"
    try:
        pairs = [(int(student), int(teacher)) for student, teacher in layers]
    except (TypeError, ValueError):
        pairs = []
    if not pairs or any(not (1 <= s <= num_student and 1 <= t <= num_teacher) for s, t in pairs):
        raise ConfigError(Problem("feature_losses.layers", layers, wanted))
    return pairs


class FeatureTerm(nn.Module, ABC):
    """A term; parameters of its own are trained and saved with the student, and left out when it is exported.

    Args:
        name: of its metric.
        weight: what its sum is multiplied by, above 0.
        layers: as in :func:`pair_layers`.
        kinds: of the features that it compares.
    """

    def __init__(self, name: str, weight: float, layers: Layers, kinds: Sequence[str]) -> None:
        super().__init__()
        if not 0 < weight < math.inf:
            raise ConfigError(Problem("feature_losses.weight", weight, "a number above 0"))
        self.name, self.weight, self._layers, self._kinds = name, weight, layers, tuple(kinds)
        self.taps: list[tuple[Tap, Tap]] = []

    def connect(self, student: ModelSize, teacher: ModelSize) -> None:
        """Make ready for two models.

        Raises:
            ConfigError: they do not have what is compared.
        """
        pairs = pair_layers(self._layers, student.num_layers, teacher.num_layers)
        self.taps = [(Tap(s, kind), Tap(t, kind)) for s, t in pairs for kind in self._kinds]  # type: ignore[arg-type]
        self._prepare(student, teacher)

    def forward(self, student: Features, teacher: Features, batch: Batch, weights_BS: Tensor) -> Tensor:
        """The sum over tokens of the mean over pairs of features.

        Args:
            student: of the batch.
            teacher: of the batch, on any device.
            batch: says which positions see one another.
            weights_BS: how often each position counts; 0 where it has no label.
        """
        values = []
        for index, (of_student, of_teacher) in enumerate(self.taps):
            x_BSD = student[of_student]
            x_BSD = x_BSD.to(torch.promote_types(x_BSD.dtype, torch.float32))  # sums of squares need the digits
            y_BSE = teacher[of_teacher].detach().to(x_BSD)
            values.append(self._compare(index, x_BSD, y_BSE, batch, weights_BS))
        return torch.stack(values).mean()

    @abstractmethod
    def _prepare(self, student: ModelSize, teacher: ModelSize) -> None: ...

    @abstractmethod
    def _compare(self, index: int, x_BSD: Tensor, y_BSE: Tensor, batch: Batch, weights_BS: Tensor) -> Tensor: ...


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
            raise ConfigError(Problem("feature_losses.distance", distance, "mse, cosine or cka"))
        self._distance = distance
        self.projections = nn.ModuleList()

    def _prepare(self, student: ModelSize, teacher: ModelSize) -> None:
        if self._distance != "cka" and student.embed_dim != teacher.embed_dim:
            widths = (student.embed_dim, teacher.embed_dim)
            self.projections = nn.ModuleList(nn.Linear(*widths, bias=False) for _ in self.taps)

    def _compare(self, index: int, x_BSD: Tensor, y_BSE: Tensor, batch: Batch, weights_BS: Tensor) -> Tensor:
        is_valid_BS = weights_BS != 0
        x_ND, y_NE, weights_N = x_BSD[is_valid_BS], y_BSE[is_valid_BS], weights_BS[is_valid_BS]
        if self._distance == "cka":
            if len(x_ND) < 2:  # a single token has no relations to others
                return x_ND.sum() * 0
            return (1 - linear_cka(x_ND, y_NE, weights_N)) * weights_N.sum()
        if self.projections:
            x_ND = self.projections[index](x_ND)
        return (_DISTANCES[self._distance](x_ND, y_NE) * weights_N).sum()


class AttentionRelations(FeatureTerm):
    """How differently the queries, keys and values of a block relate the tokens to one another (MiniLMv2).

    The number of heads and their width may differ: both models' vectors are cut into the same number of relation
    heads. A token is related to those that it attends to, itself included, before positions are rotated into them.

    Args:
        relations: of ``query``, ``key`` and ``value``.
        num_heads: relation heads; None for the greatest number by which both models' heads can be divided.
        weight: of the term.
        layers: as in :func:`pair_layers`.
    """

    def __init__(
        self,
        relations: Sequence[str] = ("query", "key", "value"),
        num_heads: int | None = None,
        weight: float = 1.0,
        layers: Layers = "last",
    ) -> None:
        super().__init__("attention_relations", weight, layers, relations)
        if isinstance(relations, str) or not relations or set(relations) - {"query", "key", "value"}:
            raise ConfigError(Problem("feature_losses.relations", relations, "a list of query, key and value"))
        self._num_heads = num_heads
        self._heads: dict[str, int] = {}

    def _prepare(self, student: ModelSize, teacher: ModelSize) -> None:
        for key, size in (("model", student), ("teacher_model", teacher)):
            if not size.num_heads:
                wanted = "a model whose attention has q_proj, k_proj and v_proj, for AttentionRelations"
                raise ConfigError(Problem(key, "attention of its own", wanted, "Compare HiddenStates instead"))
        num_kv_heads = math.gcd(student.num_kv_heads, teacher.num_kv_heads)
        self._heads = {"query": math.gcd(student.num_heads, teacher.num_heads)}
        self._heads |= {"key": num_kv_heads, "value": num_kv_heads}
        if self._num_heads is not None:
            limit = min(self._heads[kind] for kind in self._kinds)
            if self._num_heads < 1 or any(self._heads[kind] % self._num_heads for kind in self._kinds):
                wanted = f"a number that divides the heads of both models, such as {limit}"
                raise ConfigError(Problem("feature_losses.num_heads", self._num_heads, wanted))
            self._heads = dict.fromkeys(self._heads, self._num_heads)

    def _compare(self, index: int, x_BSD: Tensor, y_BSE: Tensor, batch: Batch, weights_BS: Tensor) -> Tensor:
        num_heads = self._heads[self.taps[index][0].kind]
        x_BSHW, y_BSHW = (z.unflatten(-1, (num_heads, -1)) for z in (x_BSD, y_BSE))
        position_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        total = x_BSD.sum() * 0
        for sequence, weights_S in enumerate(weights_BS):  # one at a time, and its relations computed again backward
            rows_N = weights_S.nonzero().squeeze(1)
            is_seen_NS = position_S <= position_S[rows_N, None]
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
        terms: in any number.
    """

    def __init__(self, terms: Sequence[FeatureTerm]) -> None:
        super().__init__()
        self._terms = tuple(terms)  # typed, which a ModuleList is not
        self.terms = nn.ModuleList(terms)

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a term."""
        return len(self._terms) > 0

    def connect(self, student: ModelSize, teacher: ModelSize) -> None:
        """Make each ready for two models.

        Raises:
            ConfigError: they do not have what one of them compares.
        """
        for term in self._terms:
            term.connect(student, teacher)

    @property
    def student_taps(self) -> set[Tap]:
        """Where the student is looked into."""
        return {student for term in self._terms for student, _ in term.taps}

    @property
    def teacher_taps(self) -> set[Tap]:
        """Where the teacher is."""
        return {teacher for term in self._terms for _, teacher in term.taps}

    def forward(
        self,
        loss: LossSum,
        student: DenseSignal,
        signal: DenseSignal | SparseSignal | None,
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
        assert isinstance(signal, DenseSignal), "a teacher without features is refused at set-up"
        weights_BS = (batch.labels_BS != IGNORE_INDEX).float()
        if batch.weights_BS is not None:
            weights_BS = weights_BS * batch.weights_BS
        total, sums = loss.total, dict(loss.sums)
        for index, term in enumerate(self._terms):
            value = term(student.features, signal.features, batch, weights_BS)
            name = term.name if term.name not in sums else f"{term.name}_{index}"
            sums[name] = value.detach().double()
            total = total + term.weight * value / num_tokens
        return replace(loss, total=total, sums=sums)
