"""Several teachers on the fused path, against one matrix of probabilities that is mixed in plain torch, in float64."""

import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from kd_recipes import losses
from kd_recipes.batch import IGNORE_INDEX, Batch
from kd_recipes.losses import Objective
from kd_recipes.losses.fused import Tokens, fused_loss
from kd_recipes.losses.mixture import value_names
from kd_recipes.losses.rows import TOKEN_VALUES, Terms
from kd_recipes.signals import DenseSignal, LinearLogits, MixtureSignal
from loss_oracle import DIVERGENCES

T, V, WIDTH = 7, 301, 8
WIDTHS = {"large": 12, "small": 5, "third": 3}
FIXED = [0.5, 0.3, 0.2]


def _case(dtype=torch.float64, size=V, num_tokens=T):
    """Student's hidden states and head, the teachers' logits in the forms that they may have, labels and weights."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(num_tokens, WIDTH).to(dtype), (torch.randn(size, WIDTH) / 2).to(dtype)
    teachers = {
        name: LinearLogits((torch.randn(num_tokens, width).to(dtype),), ((torch.randn(size + 2, width)).to(dtype),))
        for name, width in WIDTHS.items()
    }
    teachers["small"] = dataclasses.replace(teachers["small"], soft_cap=2.0)
    teachers["third"] = LinearLogits(given_TV=teachers["third"].compute())
    labels, weights = torch.randint(0, size, (num_tokens,)), torch.rand(num_tokens)
    return hidden.requires_grad_(), weight.requires_grad_(), teachers, labels, weights


def _mixed(teachers, weights_TM, labels, temperature, by_likelihood, size=V):
    """Probabilities that are mixed as such, one teacher's row of weights after the other, and the weights."""
    logits = [teacher.compute()[:, :size].double() for teacher in teachers.values()]
    share = weights_TM.double()
    if by_likelihood:
        share = share * torch.stack([F.softmax(z, -1).gather(1, labels[:, None])[:, 0] for z in logits], 1)
        share = share / share.sum(1, keepdim=True)
    return sum(share[:, [i]] * F.softmax(z / temperature, -1) for i, z in enumerate(logits)), share


def _weights(kind, num_tokens=T):
    if kind == "by token":
        torch.manual_seed(3)
        drawn = torch.rand(num_tokens, 3).double()
        drawn[2, 0] = drawn[4, 1] = drawn[4, 2] = 0.0  # teachers that are not asked, there
        return drawn / drawn.sum(1, keepdim=True)
    return torch.tensor(FIXED, dtype=torch.float64).expand(num_tokens, 3)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("kd_ratio", "temperature", "teacher_temperature", "kind", "by_likelihood"),
    [
        (0.6, 1.0, 1.0, "fixed", False),
        (1.0, 2.0, 1.5, "by token", False),
        (0.3, 1.0, 1.0, "by token", True),
        (0.6, 3.0, 3.0, "fixed", True),
    ],
)
def test_equals_the_formula_in_value_and_gradient(
    name, kd_ratio, temperature, teacher_temperature, kind, by_likelihood
):
    ours, formula = DIVERGENCES[name]
    hidden, weight, teachers, labels, weights = _case()
    share = _weights(kind)
    terms = Terms(ours, kd_ratio, temperature, teacher_temperature, 0.1)
    positions = torch.tensor([0, 2, 3, 4, 6])  # the others' labels are masked
    signal = MixtureSignal(teachers, share.log(), by_likelihood)
    tokens = Tokens(positions, labels[positions], weights[positions])
    total, sums = fused_loss(LinearLogits((hidden,), (weight,)), signal, tokens, terms, num_ids=V, chunk_size=3)
    z = hidden @ weight.T
    p, used = _mixed(teachers, share, labels, teacher_temperature, by_likelihood)
    rows = kd_ratio * temperature**2 * formula(p, F.softmax(z / temperature, -1))
    rows = rows + (1 - kd_ratio) * F.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)
    truth = (weights * rows)[positions].sum()
    torch.testing.assert_close(total, truth, rtol=1e-9, atol=1e-9)
    found, expected = (torch.autograd.grad(value, (hidden, weight)) for value in (total, truth))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)

    known = dict(zip([*TOKEN_VALUES, *value_names(signal)], sums.tolist(), strict=True))
    for index, (teacher, logits) in enumerate(teachers.items()):
        cross_entropy = F.cross_entropy(logits.compute()[:, :V], labels, reduction="none")[positions].sum()
        assert known[f"teacher_{teacher}/cross_entropy"] == pytest.approx(float(cross_entropy))
        assert known[f"teacher_{teacher}/weight"] == pytest.approx(float(used[positions, index].sum()))
    blind, _ = _mixed(teachers, share, labels, 1.0, False)
    own = -blind.gather(1, labels[:, None]).log()[positions].sum()
    assert known["teacher_cross_entropy"] == pytest.approx(float(own))
    assert known["teacher_entropy"] == pytest.approx(float(-(p * p.log())[positions].sum()))
    assert known["teacher_label_mass"] == pytest.approx(float(p.gather(1, labels[:, None])[positions].sum()))


@pytest.mark.parametrize("by_likelihood", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_mixed_with_itself_is_itself(dtype, by_likelihood):
    hidden, weight, teachers, labels, weights = _case(dtype)
    large = teachers["large"]
    two = MixtureSignal({"a": large, "b": large}, torch.tensor([0.7, 0.3]).log().expand(T, 2), by_likelihood)
    terms = Terms(losses.JensenShannon(), 0.7, 2.0, 2.0, 0.0)
    logits, tokens = LinearLogits((hidden,), (weight,)), Tokens(None, labels, weights)
    alone, mixed = (fused_loss(logits, s, tokens, terms, num_ids=V) for s in (DenseSignal(large), two))
    torch.testing.assert_close(mixed[0], alone[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mixed[1][: len(TOKEN_VALUES)], alone[1], rtol=1e-6, atol=1e-6)
    for mine, other in zip(*(torch.autograd.grad(one[0], (hidden, weight)) for one in (mixed, alone)), strict=True):
        bound = 1e-6 if dtype is torch.float32 else 4e-3  # a gradient's last bit of bf16
        torch.testing.assert_close(mine, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 6])
@pytest.mark.parametrize("by_likelihood", [False, True])
def test_chunks_make_no_difference(chunk_size, by_likelihood):
    hidden, weight, teachers, labels, weights = _case()
    signal = MixtureSignal(teachers, _weights("by token").log(), by_likelihood)
    terms = Terms(losses.ReverseKL(), 0.7, 2.0, 1.0, 0.0)
    call = partial(fused_loss, LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), terms)
    whole, chunked = call(num_ids=V, chunk_size=T), call(num_ids=V, chunk_size=chunk_size)
    for mine, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    for mine, other in zip(*(torch.autograd.grad(one[0], (hidden, weight)) for one in (chunked, whole)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("by_likelihood", [False, True])
def test_is_zero_with_zero_gradient_where_the_student_is_the_mixture(by_likelihood):
    _, _, teachers, labels, weights = _case()
    share = _weights("by token")
    p, _ = _mixed(teachers, share, labels, 1.0, by_likelihood)
    z = p.log().requires_grad_()
    signal = MixtureSignal(teachers, share.log(), by_likelihood)
    terms = Terms(losses.ForwardKL(), 1.0, 1.0, 1.0, 0.0)
    total, _ = fused_loss(LinearLogits(given_TV=z), signal, Tokens(None, labels, weights), terms, num_ids=V)
    total.backward()
    assert abs(float(total.detach())) < 1e-12
    assert float(z.grad.abs().max()) < 1e-12


@pytest.mark.parametrize("size", [1e4, 60.0])
@pytest.mark.parametrize("by_likelihood", [False, True])
def test_logits_of_any_size_give_finite_gradients(size, by_likelihood):
    torch.manual_seed(0)
    z, *logits = (((torch.rand(4, 50) * 2 - 1) * size) for _ in range(3))
    z.requires_grad_()
    teachers = {name: LinearLogits(given_TV=given) for name, given in zip("ab", logits, strict=True)}
    signal = MixtureSignal(teachers, torch.tensor([1.0, 0.0]).log().expand(4, 2), by_likelihood)
    tokens = Tokens(None, torch.arange(4), torch.ones(4))
    total, sums = fused_loss(
        LinearLogits(given_TV=z), signal, tokens, Terms(losses.ReverseKL(), 0.5, 1, 1, 0), num_ids=50
    )
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(sums).all()


def test_the_compiled_kernel_is_the_same_arithmetic():
    hidden, weight, teachers, labels, weights = _case(torch.float32)
    signal = MixtureSignal(teachers, _weights("by token").float().log(), by_likelihood=True)
    terms = Terms(losses.ForwardKL(), 0.7, 2.0, 2.0, 0.0)
    call = partial(fused_loss, LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), terms)
    eager, compiled = (call(num_ids=V, compiled=compiled) for compiled in (False, True))
    for mine, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    for mine, other in zip(*(torch.autograd.grad(one[0], (hidden, weight)) for one in (compiled, eager)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_the_objective_names_what_is_known_of_each_teacher_and_counts_valid_tokens_alone():
    hidden, weight, teachers, labels, _ = _case()
    masked = labels.clone()
    masked[[1, 5]] = IGNORE_INDEX
    signal = MixtureSignal(teachers, _weights("fixed").log())
    student = DenseSignal(LinearLogits((hidden,), (weight,)))
    batch = Batch(labels[None], masked[None])
    found = Objective(num_ids=V)(student, signal, batch)
    assert found.num_tokens == T - 2
    names = [f"teacher_{name}/{value}" for name in teachers for value in ("cross_entropy", "weight")]
    assert list(found.sums)[-len(names) :] == names
    for name, share in zip(teachers, FIXED, strict=True):
        assert float(found.sums[f"teacher_{name}/weight"]) == pytest.approx(share * (T - 2))
    nothing = Objective(num_ids=V)(student, signal, Batch(labels[None], torch.full_like(masked[None], IGNORE_INDEX)))
    assert list(nothing.sums) == list(found.sums)
    assert all(float(value) == 0 for value in nothing.sums.values())
    nothing.total.backward()
