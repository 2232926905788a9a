"""The objective against an oracle written from the formulas, with torch's autograd and no code of ours."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.losses import ForwardKL, Objective, TorchtuneObjective, choose_objective
from kd_recipes.signals import DenseSignal, LinearLogits, SparseSignal

VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 8, 12


def _signal(hidden_BSD, linear) -> DenseSignal:
    return DenseSignal(LinearLogits((hidden_BSD.flatten(0, 1),), (linear.weight,), linear.bias))


def _linear(rows: int, width: int, seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(width, rows, bias=False)


def _case(labels: list[list[int]], teacher_rows: int = VOCABULARY, rows: int = VOCABULARY):
    """Hidden states and heads of both models, and the batch."""
    torch.manual_seed(0)
    labels_BS = torch.tensor(labels)
    hidden = torch.randn(*labels_BS.shape, WIDTH, requires_grad=True)
    teacher_hidden = torch.randn(*labels_BS.shape, TEACHER_WIDTH) * 2
    linear, teacher = _linear(rows, WIDTH, 1), _linear(teacher_rows, TEACHER_WIDTH, 2)
    return hidden, linear, teacher_hidden, teacher, Batch(torch.zeros_like(labels_BS), labels_BS)


def _oracle(hidden, linear, teacher_hidden, teacher, batch, *, kd_ratio, temperature, num_ids=VOCABULARY):
    """Token by token: kd_ratio * T^2 * sum p (log p - log q) + (1 - kd_ratio) * -log q1[label]."""
    total = kl_sum = ce_sum = 0.0
    for b in range(batch.labels_BS.shape[0]):
        for s in range(batch.labels_BS.shape[1]):
            label = int(batch.labels_BS[b, s])
            if label == IGNORE_INDEX:
                continue
            z = (linear.weight @ hidden[b, s])[:num_ids].double()
            t = (teacher.weight @ teacher_hidden[b, s])[:num_ids].detach().double()
            p = torch.exp(t / temperature) / torch.exp(t / temperature).sum()
            q = torch.exp(z / temperature) / torch.exp(z / temperature).sum()
            kl = sum(p[i] * (torch.log(p[i]) - torch.log(q[i])) for i in range(num_ids))
            ce = -torch.log(torch.exp(z[label]) / torch.exp(z).sum())
            total = total + kd_ratio * temperature**2 * kl + (1 - kd_ratio) * ce
            kl_sum, ce_sum = kl_sum + kl, ce_sum + ce
    return total, kl_sum, ce_sum


RAGGED = [[3, 1, IGNORE_INDEX, 36, 0], [IGNORE_INDEX, 7, 7, IGNORE_INDEX, 9]]


@pytest.mark.parametrize("kd_ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 3, 100, None])
def test_equals_the_formula_in_value_and_gradient(kd_ratio, temperature, chunk_size):
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    objective = Objective(kd_ratio=kd_ratio, temperature=temperature, chunk_size=chunk_size)
    loss = objective(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    ours = torch.autograd.grad(loss.total, [hidden, linear.weight])
    total, kl, ce = _oracle(hidden, linear, teacher_hidden, teacher, batch, kd_ratio=kd_ratio, temperature=temperature)
    theirs = torch.autograd.grad(total, [hidden, linear.weight])
    assert loss.num_tokens == 7
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.sums["divergence"], kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.sums["cross_entropy"], ce.detach(), rtol=1e-5, atol=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_counts_correct_and_agreeing_tokens():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    loss = Objective(kd_ratio=0.5)(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    valid = batch.labels_BS != IGNORE_INDEX
    top = linear(hidden).argmax(-1)[valid]
    assert loss.sums["accuracy"] == (top == batch.labels_BS[valid]).sum()
    assert loss.sums["agreement"] == (top == teacher(teacher_hidden).argmax(-1)[valid]).sum()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_is_zero_with_zero_gradient_when_student_and_teacher_agree(temperature):
    hidden, linear, _, _, batch = _case(RAGGED)
    agreeing = _signal(hidden.detach(), linear)
    loss = Objective(kd_ratio=1.0, temperature=temperature)(_signal(hidden, linear), agreeing, batch)
    loss.total.backward()
    assert abs(float(loss.total.detach())) < 1e-5
    assert hidden.grad.abs().max() < 1e-5
    assert linear.weight.grad.abs().max() < 1e-5


@pytest.mark.parametrize("labels", [[[IGNORE_INDEX] * 4] * 2, [[]]])
def test_a_batch_without_labels_is_zero_and_differentiable(labels):
    labels = labels if labels[0] else [[IGNORE_INDEX]]
    hidden, linear, teacher_hidden, teacher, batch = _case(labels)
    loss = Objective(kd_ratio=0.5)(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    loss.total.backward()
    assert loss.num_tokens == 0
    assert float(loss.total.detach()) == 0.0
    assert hidden.grad.abs().max() == 0
    assert linear.weight.grad.abs().max() == 0


def test_heads_of_different_padding_are_compared_over_the_ids_they_share():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED, teacher_rows=VOCABULARY + 5, rows=VOCABULARY + 2)
    loss = Objective(kd_ratio=0.5, num_ids=VOCABULARY)(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    loss.total.backward()
    total, _, _ = _oracle(hidden, linear, teacher_hidden, teacher, batch, kd_ratio=0.5, temperature=1.0)
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-6)
    assert linear.weight.grad[VOCABULARY:].abs().max() == 0
    assert linear.weight.grad[:VOCABULARY].abs().max() > 0


def test_a_teacher_that_masks_ids_gives_a_finite_loss():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)

    logits = teacher(teacher_hidden).detach().flatten(0, 1)
    logits[:, 5:20] = -torch.inf
    loss = Objective(kd_ratio=1.0)(_signal(hidden, linear), DenseSignal(LinearLogits(given_TV=logits)), batch)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(hidden.grad).all()


def test_the_sum_is_the_same_however_sequences_are_grouped():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    objective = Objective(kd_ratio=0.5)
    whole = objective(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    parts = [
        objective(
            _signal(hidden[i : i + 1], linear),
            _signal(teacher_hidden[i : i + 1], teacher),
            Batch(batch.tokens_BS[i : i + 1], batch.labels_BS[i : i + 1]),
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-6, atol=1e-6)


def test_a_sparse_teacher_of_another_temperature_is_an_error():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    signal = SparseSignal.top_k(teacher(teacher_hidden).detach().flatten(0, 1), 5, temperature=2.0)
    with pytest.raises(ValueError, match=r"set teacher_temperature=2\.0"):
        Objective(kd_ratio=0.5)(_signal(hidden, linear), signal, batch)
    loss = Objective(kd_ratio=0.5, teacher_temperature=2.0)(_signal(hidden, linear), signal, batch)
    assert torch.isfinite(loss.total)


def test_tokens_can_be_weighted_and_the_total_is_divided_once():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    models = (_signal(hidden, linear), _signal(teacher_hidden, teacher))
    first = torch.zeros_like(batch.labels_BS, dtype=torch.float32)
    first[0, 0] = 3.0
    weighted = Objective()(*models, dataclasses.replace(batch, weights_BS=first), 7)
    alone = batch.labels_BS.clone().fill_(IGNORE_INDEX)
    alone[0, 0] = batch.labels_BS[0, 0]
    one = Objective()(*models, Batch(batch.tokens_BS, alone))
    torch.testing.assert_close(weighted.total, one.total * 3 / 7)
    assert weighted.num_tokens == 7


def test_without_gradients_nothing_is_differentiated():
    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    with torch.no_grad():
        loss = Objective(kd_ratio=0.5)(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    assert not loss.total.requires_grad


def test_a_missing_teacher_is_an_error():
    hidden, linear, _, _, batch = _case(RAGGED)
    with pytest.raises(ValueError, match="needs a teacher"):
        Objective(kd_ratio=0.5)(_signal(hidden, linear), None, batch)


@pytest.mark.parametrize("chunked", [True, False])
def test_torchtunes_own_losses_become_sums_of_what_they_average(chunked):
    from torchtune.modules import loss as torchtune_loss

    hidden, linear, teacher_hidden, teacher, batch = _case(RAGGED)
    if chunked:
        ce, kd = torchtune_loss.CEWithChunkedOutputLoss(2), torchtune_loss.ForwardKLWithChunkedOutputLoss(2)
    else:
        ce, kd = None, torchtune_loss.ForwardKLLoss()
    objective = choose_objective(ce, kd, kd_ratio=0.5, temperature=1.0, num_ids=VOCABULARY, chunk_size=None)
    assert isinstance(objective, TorchtuneObjective)
    loss = objective(_signal(hidden, linear), _signal(teacher_hidden, teacher), batch)
    valid = batch.labels_BS.flatten() != IGNORE_INDEX
    logits = linear(hidden).flatten(0, 1)[valid]
    p = torch.softmax(teacher(teacher_hidden).flatten(0, 1)[valid], -1)
    cross = -(p * torch.log_softmax(logits, -1)).sum()
    ce_sum = F.cross_entropy(logits, batch.labels_BS.flatten()[valid], reduction="sum")
    torch.testing.assert_close(loss.total, 0.5 * cross + 0.5 * ce_sum, rtol=1e-5, atol=1e-5)


def test_our_divergence_beside_torchtunes_cross_entropy_takes_our_path():
    from torchtune.modules import loss as torchtune_loss

    settings = {"kd_ratio": 0.5, "temperature": 2.0, "num_ids": 5, "chunk_size": None}
    objective = choose_objective(torchtune_loss.CEWithChunkedOutputLoss(), ForwardKL(), **settings)
    assert isinstance(objective, Objective)
    assert objective.temperature == 2.0
