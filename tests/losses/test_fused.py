"""Every divergence on the fused path, against formulas that share no code with it and against torch's own gradients."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_recipes import losses
from kd_recipes.losses.fused import Tokens, fused_loss
from kd_recipes.losses.rows import TOKEN_VALUES, Terms, likeliest
from kd_recipes.signals import DenseSignal, LinearLogits, SparseSignal
from loss_oracle import DIVERGENCES, kl

T, V, WIDTH, TEACHER_WIDTH = 7, 301, 8, 12
PLAIN = Terms(losses.ForwardKL(), 0.6, 1.0, 1.0, 0.0)


def _tensors(seed=0, *, size=V, dtype=torch.float64, num_tokens=T, scale=0.5):
    torch.manual_seed(seed)
    hidden, weight = torch.randn(num_tokens, WIDTH), torch.randn(size, WIDTH) * scale
    teacher_hidden, teacher_weight = torch.randn(num_tokens, TEACHER_WIDTH), torch.randn(size, TEACHER_WIDTH) * scale
    labels, weights = torch.randint(0, size, (num_tokens,)), torch.rand(num_tokens)
    models = [t.to(dtype) for t in (hidden, weight, teacher_hidden, teacher_weight)]
    return models[0].requires_grad_(), models[1].requires_grad_(), *models[2:], labels, weights


def _objective(z, t, labels, formula, terms):
    """Per token, from whole logits."""
    q, p = F.softmax(z / terms.temperature, -1), F.softmax(t / terms.teacher_temperature, -1)
    ce = F.cross_entropy(z, labels, reduction="none", label_smoothing=terms.label_smoothing)
    return terms.kd_ratio * terms.temperature**2 * formula(p, q) + (1 - terms.kd_ratio) * ce


def _sparse(logits, k, temperature):
    """The teacher's k likeliest ids, computed here in the dtype of the logits."""
    log_p = F.log_softmax(logits / temperature, -1)
    top, ids = log_p.topk(k, -1)
    return SparseSignal(ids, top, log_p.scatter(1, ids, -torch.inf).logsumexp(-1), temperature)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    ("kd_ratio", "temperature", "teacher_temperature", "label_smoothing"),
    [(0.6, 1.0, 1.0, 0.0), (0.6, 2.0, 1.5, 0.1), (1.0, 0.7, 0.7, 0.0), (0.3, 3.0, 3.0, 0.2), (0.3, 1.0, 2.0, 0.2)],
)
@pytest.mark.parametrize("form", ["hidden states", "logits", "all ids"])
def test_equals_the_formula_in_value_and_gradient(
    name, kd_ratio, temperature, teacher_temperature, label_smoothing, form
):
    ours, formula = DIVERGENCES[name]
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors()
    terms = Terms(ours, kd_ratio, temperature, teacher_temperature, label_smoothing)
    teacher_logits = teacher_hidden @ teacher_weight.T
    signal = {
        "hidden states": DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,))),
        "logits": DenseSignal(LinearLogits(given_TV=teacher_logits)),
        "all ids": _sparse(teacher_logits, V, teacher_temperature),  # k = V is the dense teacher
    }[form]
    total, sums = fused_loss(
        LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), terms, num_ids=V, chunk_size=3
    )
    truth = (weights * _objective(hidden @ weight.T, teacher_logits, labels, formula, terms)).sum()
    torch.testing.assert_close(total, truth, rtol=1e-9, atol=1e-9)
    found, expected = (torch.autograd.grad(value, (hidden, weight)) for value in (total, truth))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    assert torch.isfinite(sums).all()


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])  # whose weights are constants
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradcheck(name, temperature):
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors(size=11, num_tokens=3)
    terms = Terms(DIVERGENCES[name][0], 0.7, temperature, temperature, 0.1)
    signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))

    def total(hidden, weight):
        logits = LinearLogits((hidden,), (weight,))
        return fused_loss(logits, signal, Tokens(None, labels, weights.double()), terms, num_ids=11, chunk_size=2)[0]

    assert torch.autograd.gradcheck(lambda *inputs: _Again.apply(total, *inputs), (hidden, weight))


class _Again(torch.autograd.Function):
    """Lets gradcheck differentiate many times what can be differentiated once."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function, ctx.inputs = function, inputs
        return function(*(tensor.detach() for tensor in inputs))

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.inputs]
            found = torch.autograd.grad(ctx.function(*inputs), inputs)
        return None, *(grad * tensor for tensor in found)


def test_a_second_backward_is_an_error():
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors()
    signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
    total, _ = fused_loss(LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), PLAIN, num_ids=V)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("sparse", [False, True])
def test_is_zero_with_zero_gradient_where_student_and_teacher_agree(name, sparse):
    hidden, weight, *_, labels, weights = _tensors()
    logits = LinearLogits((hidden,), (weight,))
    teacher = (hidden @ weight.T).detach()
    signal = _sparse(teacher, 20, 2.0) if sparse else DenseSignal(LinearLogits(given_TV=teacher))
    terms = Terms(DIVERGENCES[name][0], 1.0, 2.0, 2.0, 0.0)
    total, _ = fused_loss(logits, signal, Tokens(None, labels, weights), terms, num_ids=V)
    grads = torch.autograd.grad(total, (hidden, weight))
    assert abs(float(total.detach())) < 1e-12
    if sparse and name == "total_variation":
        return  # at the kink of |p - q|, the last bit of the tail bucket's sum chooses the side
    assert max(float(grad.abs().max()) for grad in grads) < 1e-12


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_sparse_teacher_is_the_dense_one_over_its_ids_and_one_bucket_for_the_rest(name):
    ours, formula = DIVERGENCES[name]
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors()
    teacher = teacher_hidden @ teacher_weight.T
    signal = _sparse(teacher, 12, 2.0)
    signal = dataclasses.replace(signal, log_p_TK=signal.log_p_TK.clone())
    p_last = signal.log_p_TK[0, -1].exp()  # a row that has one id fewer, whose mass goes to the rest
    signal.log_p_TK[0, -1] = -torch.inf
    signal.log_tail_T[0] = torch.log(signal.log_tail_T[0].exp() + p_last)
    terms = Terms(ours, 0.8, 2.0, 2.0, 0.0)
    total, sums = fused_loss(
        LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), terms, num_ids=V, chunk_size=4
    )

    truth = 0.0
    z = hidden @ weight.T
    for row in range(T):
        ids = signal.ids_TK[row, : 11 if row == 0 else 12]
        q, p = F.softmax(z[row] / 2, -1)[ids], F.softmax(teacher[row] / 2, -1)[ids]
        q, p = (torch.cat((x, 1 - x.sum(0, keepdim=True))).unsqueeze(0) for x in (q, p))
        ce = F.cross_entropy(z[row], labels[row])
        truth = truth + weights[row] * (0.8 * 4 * formula(p, q)[0] + 0.2 * ce)
    torch.testing.assert_close(total, truth, rtol=1e-8, atol=1e-8)
    found, expected = (torch.autograd.grad(value, (hidden, weight)) for value in (total, truth))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)
    assert torch.isfinite(sums).all()


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_with_bias_adapter_cap_and_padding(soft_cap, frozen):
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors()
    weight = torch.cat((weight.detach(), torch.randn(3, WIDTH, dtype=torch.float64))).requires_grad_(not frozen)
    low, factor = torch.randn(T, 2).double().requires_grad_(), torch.randn(V + 3, 2).double().requires_grad_()
    bias = torch.randn(V + 3).double().requires_grad_()
    teacher = LinearLogits((teacher_hidden,), (teacher_weight,), soft_cap=soft_cap)
    student = LinearLogits((hidden, low), (weight, factor), bias, soft_cap)
    positions = torch.tensor([0, 2, 3, 6])
    terms = dataclasses.replace(PLAIN, student_cap=soft_cap, teacher_cap=soft_cap)
    tokens = Tokens(positions, labels[positions], weights[positions])
    total, _ = fused_loss(student, DenseSignal(teacher), tokens, terms, num_ids=V, chunk_size=3)
    z, t = hidden @ weight.T + low @ factor.T + bias, teacher_hidden @ teacher_weight.T
    if soft_cap is not None:
        z, t = soft_cap * torch.tanh(z / soft_cap), soft_cap * torch.tanh(t / soft_cap)
    torch.testing.assert_close(student.compute(), z)
    rows = _objective(z[positions, :V], t[positions], labels[positions], kl, terms)
    truth = (weights[positions] * rows).sum()
    torch.testing.assert_close(total, truth, rtol=1e-9, atol=1e-9)
    wanted = [hidden, low, factor, bias, *([] if frozen else [weight])]
    found, expected = (torch.autograd.grad(value, wanted) for value in (total, truth))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    assert found[2][V:].abs().max() == 0  # the padding leaks nothing


def test_what_is_known_of_each_token():
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors()
    signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
    z, t = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    labels[0], labels[1] = z[0].argmax(), t[1].argmax()
    _, sums = fused_loss(LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), PLAIN, num_ids=V)
    p, q = F.softmax(t, -1), F.softmax(z, -1).detach()
    expected = {
        "cross_entropy": F.cross_entropy(z, labels, reduction="sum"),
        "divergence": kl(p, q).sum(),
        "accuracy": (z.argmax(-1) == labels).sum(),
        "agreement": (z.argmax(-1) == t.argmax(-1)).sum(),
        "forward_kl": kl(p, q).sum(),
        "reverse_kl": kl(q, p).sum(),
        "teacher_entropy": -(p * p.log()).sum(),
        "student_entropy": -(q * q.log()).sum(),
        "teacher_label_mass": p.gather(1, labels[:, None]).sum(),
        "teacher_cross_entropy": F.cross_entropy(t, labels, reduction="sum"),
    }
    assert set(expected) == set(TOKEN_VALUES[1:])
    for name, value in expected.items():
        torch.testing.assert_close(float(sums[TOKEN_VALUES.index(name)]), float(value.detach()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, 60.0])
def test_logits_of_any_size_give_finite_gradients(name, size):
    torch.manual_seed(0)
    z = ((torch.rand(4, 50) * 2 - 1) * size).requires_grad_()
    teacher = DenseSignal(LinearLogits(given_TV=(torch.rand(4, 50) * 2 - 1) * size))
    terms = Terms(DIVERGENCES[name][0], 0.5, 1.0, 1.0, 0.0)
    total, sums = fused_loss(
        LinearLogits(given_TV=z), teacher, Tokens(None, torch.arange(4), torch.ones(4)), terms, num_ids=50
    )
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(z.grad).all()
    assert torch.isfinite(sums).all()


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(DIVERGENCES)),
    st.integers(2, 300),
    st.integers(1, 9),
    st.integers(1, 10),
    st.floats(0.3, 5.0),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
def test_chunks_make_no_difference(name, size, num_tokens, chunk_size, temperature, kd_ratio, seed):
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors(
        seed, size=size, num_tokens=num_tokens, scale=0.3
    )
    terms = Terms(DIVERGENCES[name][0], kd_ratio, temperature, 1.0, 0.0)
    signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
    tokens = Tokens(None, labels, weights)
    logits = LinearLogits((hidden,), (weight,))
    totals = [
        fused_loss(logits, signal, tokens, terms, num_ids=size, chunk_size=chunk)[0]
        for chunk in (num_tokens, chunk_size)
    ]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-10, atol=1e-12)
    whole, chunked = (torch.autograd.grad(total, (hidden, weight)) for total in totals)
    for mine, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
@pytest.mark.parametrize(
    ("chunk_size", "grad_dtype", "bound"),
    [(256, None, 1.005), (64, None, 1.45), (64, torch.float32, 1.035), (16, torch.float32, 1.035)],
)
def test_bf16_gradients_are_no_worse_than_the_textbook_version_in_bf16(name, chunk_size, grad_dtype, bound):
    """In one chunk; over several, the weight's gradient is rounded to bf16 once a chunk, unless float32 is wanted."""
    ours, formula = DIVERGENCES[name]
    *exact, labels, weights = _tensors(size=1000, num_tokens=256, scale=0.4)
    terms = Terms(ours, 0.5, 1.0, 1.0, 0.0)
    rounded = [tensor.detach().bfloat16() for tensor in exact]

    def grads(dtype, total):
        inputs = [tensor.detach().to(dtype).requires_grad_(index < 2) for index, tensor in enumerate(rounded)]
        if dtype is torch.bfloat16:
            inputs[1].grad_dtype = grad_dtype
        return [grad.double() for grad in torch.autograd.grad(total(*inputs), inputs[:2])]

    def textbook(hidden, weight, teacher_hidden, teacher_weight):
        z, t = F.linear(hidden, weight), F.linear(teacher_hidden, teacher_weight)
        z, t = (logits if logits.dtype is torch.float64 else logits.float() for logits in (z, t))
        return (weights * _objective(z, t, labels, formula, terms)).sum()

    def fused(hidden, weight, teacher_hidden, teacher_weight):
        signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
        student, tokens = LinearLogits((hidden,), (weight,)), Tokens(None, labels, weights)
        return fused_loss(student, signal, tokens, terms, num_ids=1000, chunk_size=chunk_size)[0]

    truth = grads(torch.float64, textbook)
    for exact_grad, naive, mine in zip(
        truth, grads(torch.bfloat16, textbook), grads(torch.bfloat16, fused), strict=True
    ):
        ratio = float((mine - exact_grad).norm() / (naive - exact_grad).norm())
        assert ratio <= bound


def test_the_compiled_kernel_is_the_same_arithmetic():
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors(dtype=torch.float32)
    signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
    logits = LinearLogits((hidden,), (weight,))
    grads = []
    for compiled in (False, True):
        total, _ = fused_loss(logits, signal, Tokens(None, labels, weights), PLAIN, num_ids=V, compiled=compiled)
        grads.append(torch.autograd.grad(total, (hidden, weight)))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [5, 255, 256, 301, 384, 1000])
def test_the_likeliest_id_is_the_first_of_the_largest(size):
    torch.manual_seed(size)
    logits = torch.randint(0, 4, (50, size)).float()  # full of ties
    logits[torch.arange(50), torch.randint(0, size, (50,))] += 4
    assert torch.equal(likeliest(logits), logits.argmax(-1, keepdim=True))
    assert torch.equal(likeliest(logits.clamp_max(3)), logits.clamp_max(3).argmax(-1, keepdim=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.SymmetricKL(1.5),
        lambda: losses.JensenShannon(-0.1),
        lambda: losses.SkewForwardKL(1.0),
        lambda: losses.SkewReverseKL(2.0),
        lambda: losses.AlphaBeta(0.0, 0.0),
        lambda: losses.AlphaBeta(-1.0, 2.0),
        lambda: losses.AdaptiveKL(1.0),
    ],
)
def test_a_setting_out_of_range_is_an_error(make):
    with pytest.raises(ValueError, match="to be"):
        make()


def test_a_function_that_is_no_divergence_is_an_error():
    hidden, weight, teacher_hidden, teacher_weight, labels, weights = _tensors()
    signal = DenseSignal(LinearLogits((teacher_hidden,), (teacher_weight,)))
    terms = dataclasses.replace(PLAIN, divergence=losses.Differentiated(lambda log_p, log_q: (log_p * log_q).sum()))
    with pytest.raises(ValueError, match="one value a token"):
        fused_loss(LinearLogits((hidden,), (weight,)), signal, Tokens(None, labels, weights), terms, num_ids=V)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_position_of_which_nothing_is_named_teaches_nothing(name):
    ours, _ = DIVERGENCES[name]
    hidden, weight, _, _, labels, weights = _tensors(dtype=torch.float32)
    nothing_TK = torch.full((T, 3), -torch.inf)
    silent = SparseSignal(torch.zeros(T, 3, dtype=torch.long), nothing_TK, torch.zeros(T))
    total, _ = fused_loss(
        LinearLogits((hidden,), (weight,)),
        silent,
        Tokens(None, labels, weights),
        Terms(ours, 1.0, 1.0, 1.0, 0.0),
        num_ids=V,
    )
    assert total.item() == pytest.approx(0, abs=1e-5)
    for gradient in torch.autograd.grad(total, (hidden, weight)):
        assert float(gradient.abs().max()) < 1e-4
