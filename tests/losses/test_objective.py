"""The objective against an oracle written from the formulas, with torch's autograd and no code of ours."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_recipes._torchtune import Head
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.losses import ForwardKL, Objective, TorchtuneObjective, choose_objective
from kd_recipes.signals import DenseSignal

VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 8, 12


def _head(rows: int, width: int, seed: int) -> tuple[nn.Linear, Head]:
    torch.manual_seed(seed)
    linear = nn.Linear(width, rows, bias=False)
    return linear, Head(linear, tuple(linear.parameters()), rows)


def _case(labels: list[list[int]], teacher_rows: int = VOCABULARY, rows: int = VOCABULARY):
    torch.manual_seed(0)
    labels_BS = torch.tensor(labels)
    hidden = torch.randn(*labels_BS.shape, WIDTH, requires_grad=True)
    linear, head = _head(rows, WIDTH, 1)
    teacher_linear, teacher_head = _head(teacher_rows, TEACHER_WIDTH, 2)
    signal = DenseSignal(torch.randn(*labels_BS.shape, TEACHER_WIDTH) * 2, lambda h: teacher_head.project(h).detach())
    return hidden, linear, head, teacher_linear, signal, Batch(torch.zeros_like(labels_BS), labels_BS)


def _oracle(hidden, linear, teacher_linear, signal, batch, *, kd_ratio, temperature, num_ids=VOCABULARY):
    """Token by token: kd_ratio * T^2 * sum p (log p - log q) + (1 - kd_ratio) * -log q1[label]."""
    total = kl_sum = ce_sum = 0.0
    for b in range(batch.labels_BS.shape[0]):
        for s in range(batch.labels_BS.shape[1]):
            label = int(batch.labels_BS[b, s])
            if label == IGNORE_INDEX:
                continue
            z = (linear.weight @ hidden[b, s])[:num_ids].double()
            t = (teacher_linear.weight @ signal.hidden_BSD[b, s])[:num_ids].detach().double()
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
    hidden, linear, head, teacher, signal, batch = _case(RAGGED)
    objective = Objective(kd_ratio=kd_ratio, temperature=temperature, chunk_size=chunk_size)
    loss = objective(hidden, head, signal, batch)
    ours = torch.autograd.grad(loss.total, [hidden, linear.weight])
    total, kl, ce = _oracle(hidden, linear, teacher, signal, batch, kd_ratio=kd_ratio, temperature=temperature)
    theirs = torch.autograd.grad(total, [hidden, linear.weight])
    assert loss.num_tokens == 7
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.divergence, kl.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.cross_entropy, ce.detach(), rtol=1e-5, atol=1e-6)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_counts_correct_and_agreeing_tokens():
    hidden, linear, head, teacher, signal, batch = _case(RAGGED)
    loss = Objective(kd_ratio=0.5)(hidden, head, signal, batch)
    valid = batch.labels_BS != IGNORE_INDEX
    top = linear(hidden).argmax(-1)[valid]
    assert loss.num_correct == (top == batch.labels_BS[valid]).sum()
    assert loss.num_agreeing == (top == teacher(signal.hidden_BSD).argmax(-1)[valid]).sum()


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_is_zero_with_zero_gradient_when_student_and_teacher_agree(temperature):
    hidden, linear, head, _, _, batch = _case(RAGGED)
    signal = DenseSignal(hidden.detach(), lambda h: linear(h).detach())
    loss = Objective(kd_ratio=1.0, temperature=temperature)(hidden, head, signal, batch)
    loss.total.backward()
    assert abs(float(loss.total.detach())) < 1e-5
    assert hidden.grad.abs().max() < 1e-5
    assert linear.weight.grad.abs().max() < 1e-5


@pytest.mark.parametrize("labels", [[[IGNORE_INDEX] * 4] * 2, [[]]])
def test_a_batch_without_labels_is_zero_and_differentiable(labels):
    labels = labels if labels[0] else [[IGNORE_INDEX]]
    hidden, linear, head, _, signal, batch = _case(labels)
    loss = Objective(kd_ratio=0.5)(hidden, head, signal, batch)
    loss.total.backward()
    assert loss.num_tokens == 0
    assert float(loss.total.detach()) == 0.0
    assert hidden.grad.abs().max() == 0
    assert linear.weight.grad.abs().max() == 0


def test_heads_of_different_padding_are_compared_over_the_ids_they_share():
    hidden, linear, head, teacher, signal, batch = _case(RAGGED, teacher_rows=VOCABULARY + 5, rows=VOCABULARY + 2)
    loss = Objective(kd_ratio=0.5, num_ids=VOCABULARY)(hidden, head, signal, batch)
    loss.total.backward()
    total, _, _ = _oracle(hidden, linear, teacher, signal, batch, kd_ratio=0.5, temperature=1.0)
    torch.testing.assert_close(loss.total.double(), total, rtol=1e-5, atol=1e-6)
    assert linear.weight.grad[VOCABULARY:].abs().max() == 0
    assert linear.weight.grad[:VOCABULARY].abs().max() > 0


def test_a_teacher_that_masks_ids_gives_a_finite_loss():
    hidden, _, head, teacher, signal, batch = _case(RAGGED)

    def masked(h):
        logits = teacher(h).detach()
        logits[:, 5:20] = -torch.inf
        return logits

    loss = Objective(kd_ratio=1.0)(hidden, head, DenseSignal(signal.hidden_BSD, masked), batch)
    loss.total.backward()
    assert torch.isfinite(loss.total)
    assert torch.isfinite(hidden.grad).all()


def test_the_sum_is_the_same_however_sequences_are_grouped():
    hidden, _, head, _, signal, batch = _case(RAGGED)
    objective = Objective(kd_ratio=0.5)
    whole = objective(hidden, head, signal, batch)
    parts = [
        objective(
            hidden[i : i + 1],
            head,
            DenseSignal(signal.hidden_BSD[i : i + 1], signal.project),
            Batch(batch.tokens_BS[i : i + 1], batch.labels_BS[i : i + 1]),
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(part.total for part in parts), whole.total, rtol=1e-6, atol=1e-6)


def test_bf16_gradients_are_no_worse_than_the_textbook_version_in_bf16():
    hidden, linear, _, teacher, signal, batch = _case([[3, 1, 5, 36, 0, 8, 9, 30]])
    exact, _, _ = _oracle(hidden, linear, teacher, signal, batch, kd_ratio=0.5, temperature=1.0)
    (truth,) = torch.autograd.grad(exact, [hidden])
    low = hidden.detach().bfloat16().requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, bias=False).to(torch.bfloat16)
    head.weight.data.copy_(linear.weight)
    wrapped = Head(head, tuple(head.parameters()), VOCABULARY)
    Objective(kd_ratio=0.5)(low, wrapped, signal, batch).total.backward()
    naive = hidden.detach().bfloat16().requires_grad_()
    logits = head(naive).flatten(0, 1)
    log_p = F.log_softmax(teacher(signal.hidden_BSD).flatten(0, 1).detach().float(), -1)
    kl = F.kl_div(F.log_softmax(logits.float(), -1), log_p, log_target=True, reduction="sum")
    (0.5 * kl + 0.5 * F.cross_entropy(logits.float(), batch.labels_BS.flatten(), reduction="sum")).backward()
    assert (low.grad - truth).norm() <= 1.05 * (naive.grad - truth).norm()


def test_without_gradients_nothing_is_differentiated():
    hidden, _, head, _, signal, batch = _case(RAGGED)
    with torch.no_grad():
        loss = Objective(kd_ratio=0.5)(hidden, head, signal, batch)
    assert not loss.total.requires_grad


def test_a_missing_teacher_is_an_error():
    hidden, _, head, _, _, batch = _case(RAGGED)
    with pytest.raises(ValueError, match="needs a teacher"):
        Objective(kd_ratio=0.5)(hidden, head, None, batch)


@pytest.mark.parametrize("chunked", [True, False])
def test_torchtunes_own_losses_become_sums_of_what_they_average(chunked):
    from torchtune.modules import loss as torchtune_loss

    hidden, linear, head, teacher, signal, batch = _case(RAGGED)
    if chunked:
        ce, kd = torchtune_loss.CEWithChunkedOutputLoss(2), torchtune_loss.ForwardKLWithChunkedOutputLoss(2)
    else:
        ce, kd = None, torchtune_loss.ForwardKLLoss()
    objective = choose_objective(ce, kd, kd_ratio=0.5, temperature=1.0, num_ids=VOCABULARY, chunk_size=None)
    assert isinstance(objective, TorchtuneObjective)
    loss = objective(hidden, head, signal, batch)
    valid = batch.labels_BS.flatten() != IGNORE_INDEX
    logits = linear(hidden).flatten(0, 1)[valid]
    p = torch.softmax(teacher(signal.hidden_BSD).flatten(0, 1)[valid], -1)
    cross = -(p * torch.log_softmax(logits, -1)).sum()
    ce_sum = F.cross_entropy(logits, batch.labels_BS.flatten()[valid], reduction="sum")
    torch.testing.assert_close(loss.total, 0.5 * cross + 0.5 * ce_sum, rtol=1e-5, atol=1e-5)


def test_our_divergence_beside_torchtunes_cross_entropy_takes_our_path():
    from torchtune.modules import loss as torchtune_loss

    settings = {"kd_ratio": 0.5, "temperature": 2.0, "num_ids": 5, "chunk_size": None}
    objective = choose_objective(torchtune_loss.CEWithChunkedOutputLoss(), ForwardKL(), **settings)
    assert isinstance(objective, Objective)
    assert objective.temperature == 2.0
