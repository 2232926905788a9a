"""Terms that compare what goes on inside: values from formulas written out, gradients, masks, layer maps."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_recipes._torchtune import ModelSize
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.errors import ConfigError
from kd_recipes.losses import AttentionRelations, FeatureTerm, FeatureTerms, HiddenStates, LossSum
from kd_recipes.losses.features import linear_cka, pair_layers
from kd_recipes.signals import DenseSignal, LinearLogits, SparseSignal, Tap

STUDENT = ModelSize(num_rows=50, embed_dim=12, num_layers=2, max_seq_len=16, num_heads=6, num_kv_heads=2)
TEACHER = ModelSize(num_rows=50, embed_dim=20, num_layers=5, max_seq_len=16, num_heads=4, num_kv_heads=2)
WIDTHS = {"hidden": (12, 20), "query": (12, 20), "key": (4, 10), "value": (4, 10)}
TERMS = {
    "mse": lambda: HiddenStates("mse"),
    "cosine": lambda: HiddenStates("cosine"),
    "cka": lambda: HiddenStates("cka", layers="last"),
    "relations": lambda: AttentionRelations(),
}


def _batch(*, packed: bool = False) -> Batch:
    """Two sequences of 7, of which the first has 4 labels and the second 6; packed, of two documents each."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 50, (2, 2, 7))
    labels[0, :2] = labels[0, 6] = labels[1, 3] = IGNORE_INDEX
    input_pos = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4]]) if packed else None
    return Batch(tokens, labels, input_pos_BS=input_pos)


def _features(term: FeatureTerm, which: int, seed: int) -> dict[Tap, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    taps = {pair[which] for pair in term.taps}
    return {
        tap: torch.randn(2, 7, WIDTHS[tap.kind][which], generator=generator, dtype=torch.float64)
        for tap in sorted(taps)
    }


def _connected(name: str) -> FeatureTerm:
    torch.manual_seed(1)
    term: FeatureTerm = TERMS[name]()
    term.connect(STUDENT, TEACHER)
    return term.double()


def _weights(batch: Batch) -> Tensor:
    weights = (batch.labels_BS != IGNORE_INDEX).double()
    weights[1, 0] = 2.5
    return weights


def _by_hand(name: str, term: FeatureTerm, x: Tensor, y: Tensor, index: int, batch: Batch, weights: Tensor) -> float:
    """One pair, token by token."""
    tokens = [(b, s) for b in range(2) for s in range(7) if weights[b, s]]
    if name in ("mse", "cosine"):
        matrix = list(term.projections.values())[index].weight.detach()  # type: ignore[union-attr,index]
        total = 0.0
        for b, s in tokens:
            u, v = matrix @ x[b, s], y[b, s]
            distance = ((u - v) ** 2).mean() if name == "mse" else 1 - (u @ v) / (u.norm() * v.norm())
            total += float(weights[b, s] * distance)
        return total
    if name == "cka":
        w = torch.stack([weights[at] for at in tokens])
        center = torch.eye(len(tokens)).double() - torch.ones(len(tokens), 1).double() @ (w / w.sum())[None]
        rows = [torch.stack([z[at] for at in tokens]) for z in (x, y)]
        grams = [(w.sqrt()[:, None] * (center @ z)) for z in rows]
        k, m = (g @ g.T for g in grams)
        cka = torch.trace(k @ m) / torch.sqrt(torch.trace(k @ k) * torch.trace(m @ m))
        return float((1 - cka) * w.sum())
    total = 0.0
    for b, s in tokens:
        seen = list(range(s + 1))
        if batch.input_pos_BS is not None:
            seen = list(range(s - int(batch.input_pos_BS[b, s]), s + 1))
        heads = 2  # gcd(6, 4) for queries, gcd(2, 2) for keys and values
        for h in range(heads):
            p, q = (
                torch.softmax(
                    torch.stack([z[b, s].chunk(heads)[h] @ z[b, j].chunk(heads)[h] for j in seen])
                    / math.sqrt(z.shape[-1] // heads),
                    0,
                )
                for z in (y, x)
            )
            total += float(weights[b, s] * (p * (p / q).log()).sum() / heads)
    return total


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_value_is_the_formulas(name: str, packed: bool) -> None:
    term, batch = _connected(name), _batch(packed=packed)
    student, teacher, weights = _features(term, 0, 2), _features(term, 1, 3), _weights(batch)
    parts = [
        _by_hand(name, term, student[s], teacher[t], index, batch, weights) for index, (s, t) in enumerate(term.taps)
    ]
    assert len(parts) == {"mse": 2, "cosine": 2, "cka": 1, "relations": 3}[name]
    assert float(term(student, teacher, batch, weights).detach()) == pytest.approx(sum(parts) / len(parts), rel=1e-9)


@pytest.mark.parametrize("name", TERMS)
def test_gradient_is_numerically_right(name: str) -> None:
    term, batch = _connected(name), _batch(packed=True)
    student, teacher, weights = _features(term, 0, 2), _features(term, 1, 3), _weights(batch)
    inputs = [tensor.requires_grad_() for tensor in student.values()]

    def value(*tensors: Tensor) -> Tensor:
        result: Tensor = term(dict(zip(student, tensors, strict=True)), teacher, batch, weights)
        return result

    assert torch.autograd.gradcheck(value, inputs, fast_mode=True)
    value(*inputs).backward()
    assert all(parameter.grad is not None and parameter.grad.norm() > 0 for parameter in term.parameters())
    for tap, tensor in student.items():
        if tap.kind == "hidden":  # keys and values of tokens without a label are still related to
            assert not tensor.grad[weights == 0].any()


@pytest.mark.parametrize("name", TERMS)
def test_student_like_teacher_is_at_zero(name: str) -> None:
    term: FeatureTerm = TERMS[name]()
    term.connect(STUDENT, STUDENT)
    assert not list(term.parameters())  # no projection between equal widths
    batch, features = _batch(), _features(term, 0, 2)
    student = {tap: tensor.clone().requires_grad_() for tap, tensor in features.items()}
    value = term(student, features, batch, _weights(batch))
    value.backward()
    assert abs(float(value.detach())) < 1e-12
    assert all(tensor.grad.abs().max() < 1e-8 for tensor in student.values())


@pytest.mark.parametrize("name", TERMS)
def test_a_batch_without_labels(name: str) -> None:
    term, batch = _connected(name), _batch()
    student, teacher = _features(term, 0, 2), _features(term, 1, 3)
    inputs = [tensor.requires_grad_() for tensor in student.values()]
    value = term(student, teacher, batch, torch.zeros(2, 7))
    value.backward()
    assert float(value.detach()) == 0
    assert all(not tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("num_rows", [5, 40])
def test_cka_does_not_see_rotation_and_scale(num_rows: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(num_rows, 8).double(), torch.randn(num_rows, 11).double()
    rotation, _ = torch.linalg.qr(torch.randn(8, 8).double())
    weights = torch.ones(num_rows).double()
    assert float(linear_cka(x, 3 * x @ rotation + 7, weights)) == pytest.approx(1)
    assert float(linear_cka(x, y, weights)) == pytest.approx(float(linear_cka(5 * x @ rotation, y, weights)))
    assert 0 < float(linear_cka(x, y, weights)) < 0.95


@pytest.mark.parametrize("noise", [0.0, 1e-6])
@pytest.mark.parametrize("num_rows", [1, 4, 40])
def test_cka_of_rows_that_are_all_alike_says_nothing(num_rows: int, noise: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(1, 8).expand(num_rows, 8) + noise * torch.randn(num_rows, 8)).requires_grad_()
    cka = linear_cka(x, torch.randn(num_rows, 11), torch.ones(num_rows))
    cka.backward()
    assert float(cka.detach()) == 1
    assert not x.grad.any()


def test_relations_are_the_same_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    term, batch = _connected("relations"), _batch(packed=True)
    student, teacher, weights = _features(term, 0, 2), _features(term, 1, 3), _weights(batch)
    whole = term(student, teacher, batch, weights)
    monkeypatch.setattr("kd_recipes.losses.features._RELATION_ELEMENTS", 2 * 2 * 7)
    torch.testing.assert_close(term(student, teacher, batch, weights), whole)


def test_a_masked_token_stays_masked_whatever_its_weight() -> None:
    terms = FeatureTerms({"a": HiddenStates("mse", layers="last")})
    terms.connect(STUDENT, STUDENT)
    batch, features = _batch(), _features(next(iter(terms.by_name.values())), 0, 2)  # type: ignore[arg-type]
    weights = torch.ones(2, 7).masked_fill(batch.labels_BS == IGNORE_INDEX, math.inf)
    logits = LinearLogits(given_TV=torch.zeros(14, 50))
    student = DenseSignal(logits, {tap: value + 1 for tap, value in features.items()})
    loss = terms(
        LossSum(torch.zeros(()), {}, 10), student, DenseSignal(logits, features), replace(batch, weights_BS=weights)
    )
    assert float(loss.sums["hidden_mse"]) == pytest.approx(10)


def test_layer_maps() -> None:
    assert pair_layers("uniform", 3, 9) == [(1, 3), (2, 6), (3, 9)]
    assert pair_layers("uniform", 4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert pair_layers("last", 3, 9) == [(3, 9)]
    assert pair_layers([[1, 4], [3, 9]], 3, 9) == [(1, 4), (3, 9)]


@pytest.mark.parametrize(
    "layers", ["first", [], [[1]], [[0, 1]], [[1, 10]], [[4, 1]], [["a", 1]], [[1.7, 2]], [[True, 2]], ["12"]]
)
def test_a_layer_map_that_cannot_be(layers: object) -> None:
    with pytest.raises(ConfigError, match=r"\.layers.*student's block of 1 to 3, teacher's of 1 to 9"):
        pair_layers(layers, 3, 9)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HiddenStates("euclid"), "distance: got 'euclid', wanted mse, cosine or cka"),
        (lambda: HiddenStates(weight=0), "weight: got 0, wanted a number above 0"),
        (lambda: AttentionRelations(["keys"]), "relations: .*wanted a list of query, key and value"),
        (lambda: AttentionRelations(["key", "key"]), "relations: .*each at most once"),
        (lambda: AttentionRelations(num_heads=2.0).connect(STUDENT, TEACHER), "num_heads: got 2.0"),
        (lambda: AttentionRelations(num_heads=4).connect(STUDENT, TEACHER), "num_heads: got 4, wanted .* such as 2"),
        (
            lambda: AttentionRelations().connect(STUDENT, ModelSize(50, 20, 5, 16)),
            "teacher_model: .*attention in every block",
        ),
    ],
)
def test_settings_that_cannot_be(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_terms_are_added_with_their_weights() -> None:
    terms = FeatureTerms(
        {"a": HiddenStates("mse", weight=3.0), "b": HiddenStates("mse", layers="last"), "c": AttentionRelations()}
    )
    terms.connect(STUDENT, TEACHER)
    batch = _batch()
    features = [
        {tap: value for term in terms.by_name.values() for tap, value in _features(term, which, 4 + which).items()}  # type: ignore[arg-type]
        for which in (0, 1)
    ]
    assert [set(side) for side in features] == [terms.student_taps, terms.teacher_taps]
    logits = LinearLogits(given_TV=torch.zeros(14, 50))
    student, teacher = (DenseSignal(logits, side) for side in features)
    terms.double()
    before = LossSum(torch.tensor(1.0), {"accuracy": torch.tensor(2.0)}, 10)
    after = terms(before, student, teacher, batch, 5)
    assert list(after.sums) == ["accuracy", "hidden_mse", "hidden_mse_1", "attention_relations"]
    first, second, third = (float(after.sums[name]) for name in list(after.sums)[1:])
    assert float(after.total.detach()) == pytest.approx(1 + (3 * first + second + third) / 5)
    with pytest.raises(AssertionError, match="a model's that runs"):
        terms(before, student, SparseSignal.top_k(torch.zeros(14, 50), 3), batch)


def test_no_terms_change_nothing() -> None:
    terms, loss = FeatureTerms({}), LossSum(torch.tensor(1.0), {}, 1)
    terms.connect(STUDENT, TEACHER)
    student = DenseSignal(LinearLogits(given_TV=torch.zeros(14, 50)))
    assert terms(loss, student, None, _batch()) is loss
    assert not terms.needs_teacher
    assert not terms.student_taps
    assert not terms.teacher_taps


def test_the_term_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    (block,) = (part for part in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Lengths" in part)
    names: dict[str, Any] = {}
    exec(block, names)
    term = names["Lengths"](weight=0.5)
    term.connect(STUDENT, TEACHER)
    batch, student, teacher = _batch(), _features(term, 0, 2), _features(term, 1, 3)
    ratio = student[Tap(2)].norm(dim=-1) / teacher[Tap(5)].norm(dim=-1)
    expected = (ratio.log() ** 2 * _weights(batch)).sum()
    assert float(term(student, teacher, batch, _weights(batch))) == pytest.approx(float(expected), rel=1e-5)
