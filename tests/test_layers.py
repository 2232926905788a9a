"""Layers of factors compute what the dense layers with their product for a weight compute, gradients included."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchtune.modules import TiedLinear

from kd_recipes.errors import ConfigError
from kd_recipes.layers import LowRankEmbedding, LowRankLinear

FORMS = pytest.mark.parametrize("bias", [False, True])
FACTORS = pytest.mark.parametrize("three_factors", [False, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def _linear(bias: bool, three_factors: bool) -> LowRankLinear:
    layer = LowRankLinear(7, 5, 3, bias=bias, three_factors=three_factors)
    if layer.s is not None:
        nn.init.normal_(layer.s)  # the identity would hide a transposition
    return layer


def _gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@FORMS
@FACTORS
@pytest.mark.usefixtures("float64")
def test_linear_is_the_dense_one_with_its_weight(bias: bool, three_factors: bool) -> None:
    layer, x = _linear(bias, three_factors), torch.randn(2, 4, 7)
    assert layer.weight.shape == (5, 7)
    assert torch.linalg.matrix_rank(layer.weight) == 3
    dense = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), dense)
    target = torch.randn(2, 4, 5)
    expected = _gradients(layer, (dense * target).sum())
    torch.testing.assert_close(_gradients(layer, (layer(x) * target).sum()), expected)
    assert all(gradient.abs().max() > 0 for gradient in expected.values())


@FORMS
@FACTORS
@pytest.mark.usefixtures("float64")
def test_gradients_of_the_linear_layer_are_those_of_its_outputs(bias: bool, three_factors: bool) -> None:
    layer = _linear(bias, three_factors)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))
        return outputs

    assert torch.autograd.gradcheck(forward, (torch.randn(3, 7, requires_grad=True), *parameters))


@pytest.mark.usefixtures("float64")
def test_embedding_is_the_dense_one_with_its_table() -> None:
    layer, ids = LowRankEmbedding(11, 6, 4), torch.tensor([[0, 3, 10], [3, 3, 1]])
    assert (layer.num_embeddings, layer.embedding_dim, layer.weight.shape) == (11, 6, (11, 6))
    dense = F.embedding(ids, layer.weight)
    torch.testing.assert_close(layer(ids), dense)
    target = torch.randn(2, 3, 6)
    expected = _gradients(layer, (dense * target).sum())
    torch.testing.assert_close(_gradients(layer, (layer(ids) * target).sum()), expected)
    assert expected["u"][[2, 4, 5]].abs().max() == 0


@pytest.mark.usefixtures("float64")
def test_a_head_of_torchtune_is_tied_to_the_factors() -> None:
    """Both uses of the table give gradients to the same factors, and a step changes what both compute."""
    embedding, ids = LowRankEmbedding(11, 6, 4), torch.tensor([[0, 3, 10]])
    head = TiedLinear(embedding)
    logits, table = head(embedding(ids)), embedding.u @ embedding.v
    expected = F.linear(table[ids], table)
    torch.testing.assert_close(logits, expected)
    gradients = _gradients(embedding, logits.square().sum())
    torch.testing.assert_close(gradients, _gradients(embedding, expected.square().sum()))
    assert gradients["u"].abs().amin(1).min() > 0  # every token has a logit, so none is without gradient
    with torch.no_grad():
        embedding.v.mul_(2)
    torch.testing.assert_close(head(embedding(ids)), 4 * expected)


def test_a_model_with_factors_learns_a_matrix_of_their_rank() -> None:
    target = torch.randn(12, 2) @ torch.randn(2, 10)
    layer, x = LowRankLinear(10, 12, 2), torch.randn(256, 10)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(400):
        loss = F.mse_loss(layer(x), F.linear(x, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-3 * float(F.linear(x, target).square().mean())


@FACTORS
def test_fresh_weights_are_as_wide_as_the_dense_ones(three_factors: bool) -> None:
    linear, dense = LowRankLinear(400, 300, 200, bias=True, three_factors=three_factors), nn.Linear(400, 300)
    assert linear.weight.std().item() == pytest.approx(dense.weight.std().item(), rel=0.05)
    assert linear.bias is not None
    assert linear.bias.std().item() == pytest.approx(dense.bias.std().item(), rel=0.15)
    assert LowRankEmbedding(400, 300, 200).weight.std().item() == pytest.approx(1, rel=0.05)


@FACTORS
def test_layers_are_made_on_the_meta_device_and_in_the_default_dtype(three_factors: bool) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            layers = [LowRankLinear(7, 5, 3, bias=True, three_factors=three_factors), LowRankEmbedding(11, 6, 4)]
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in layers:
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}
        assert layer.weight.device.type == "meta"
    real = LowRankLinear(7, 5, 3, bias=True, three_factors=three_factors)
    layers[0].load_state_dict(copy.deepcopy(real.state_dict()), assign=True)
    x = torch.randn(2, 7)
    torch.testing.assert_close(layers[0](x), real(x), rtol=0, atol=0)


def test_only_the_factors_are_saved() -> None:
    layer = LowRankLinear(7, 5, 3, bias=True, three_factors=True)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "u": (5, 3),
        "s": (3, 3),
        "v": (3, 7),
        "bias": (5,),
    }
    assert LowRankLinear(7, 5, 3).state_dict().keys() == LowRankEmbedding(11, 6, 4).state_dict().keys() == {"u", "v"}
    assert (layer.in_features, layer.out_features, layer.rank) == (7, 5, 3)
    assert "in_features=7, out_features=5, rank=3, bias=True, three_factors=True" in str(layer)
    assert "11, 6, rank=4" in str(LowRankEmbedding(11, 6, 4))


@pytest.mark.parametrize("rank", [0, 6])
def test_a_rank_that_no_such_matrix_has_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=rf"\.rank: got {rank}, wanted from 1 to 5.* 5 x 7 matrix"):
        LowRankLinear(7, 5, rank)
    with pytest.raises(ConfigError, match=rf"\.rank: got {rank}, wanted from 1 to 5.* 11 x 5 matrix"):
        LowRankEmbedding(11, 5, rank)
