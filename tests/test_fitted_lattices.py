"""Codes and scales that are fitted to weights (HQQ) or to what they multiply (GPTQ): how near, and where they end."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lattice_weights import INT, errors, heavy_tailed, weight
from torch import Tensor

from kd_recipes.errors import ConfigError
from kd_recipes.lattices import Quantized, Scheme, gptq, hqq, quantize


def solved(of: Tensor, scheme: Scheme) -> Tensor:
    """Where 20 rounds of codes for scales, and scales for codes, lead from the largest magnitude on, in float32."""
    groups = of.view(of.shape[0], -1, scheme.group_size or of.shape[1])
    scales = groups.abs().amax(-1) / -scheme.code_range[0]
    for _ in range(20):
        codes = (groups / scales[..., None]).round().clamp(*scheme.code_range)
        scales = (groups * codes).sum(-1) / codes.square().sum(-1)
    return scales.to(scheme.scale_dtype)


@pytest.mark.parametrize("make", [weight, heavy_tailed])
@pytest.mark.parametrize("name", INT)
def test_hqq_alternates_between_codes_and_positive_scales(name: str, make: Callable[..., Tensor]) -> None:
    scheme, of = Scheme.parse(name), make()
    found = hqq(of, scheme)
    assert (found.codes.dtype, found.codes.shape) == (torch.int8, of.shape)
    assert (found.scales.dtype, found.scales.shape) == (scheme.scale_dtype, quantize(of, scheme).scales.shape)
    assert (found.scales > 0).all()
    torch.testing.assert_close(found.scales, solved(of, scheme), rtol=2e-3, atol=0)  # a sum may tip a code
    # codes are the nearest under the scales as they are kept
    steps = of.view(*found.scales.shape, -1).double() / found.scales.double()[..., None]
    nearest = steps.clamp(*scheme.code_range)
    assert ((found.codes.view_as(steps) - nearest).abs() <= 0.5000001).all()
    # computed in float32 whatever the dtype, and of each row by itself
    half = of.to(torch.bfloat16)
    assert torch.equal(hqq(half, scheme).codes, hqq(half.float(), scheme).codes)
    assert torch.equal(hqq(of[5:8], scheme).dequantize(), found.dequantize()[5:8])


@pytest.mark.parametrize("name", [name for name in INT if "8" not in name.removeprefix("8da")])
def test_hqq_costs_less_than_the_largest_magnitude_over_the_lowest_code(name: str) -> None:
    scheme, of = Scheme.parse(name), heavy_tailed(64, 512)
    groups = of.view(64, -1, scheme.group_size or 512).double()
    scales = groups.abs().amax(-1, keepdim=True) / -scheme.code_range[0]
    plain = (groups - scales * (groups / scales).round().clamp(*scheme.code_range)).square().sum()
    assert errors(of, hqq(of, scheme)).sum() < {2: 0.9, 3: 0.95}.get(scheme.bits, 1.0) * plain


@pytest.mark.parametrize(
    ("name", "is_nearer"),
    [
        *((name, True) for name in ("gguf_q8_0", "int8_g64", "int8", "8da8w", "8da4w_g32", "int4")),
        *((name, False) for name in ("gguf_q4_0", "int2_g64", "int3_g64", "int4_g64", "int5_g32", "int6_g32")),
    ],
)
def test_hqq_is_nearer_than_quantize_where_that_does_not_refine(name: str, is_nearer: bool) -> None:
    """In sum |e|^0.7, on heavy tails: where few weights share a scale, a negative one and two starts are worth more."""
    scheme, of = Scheme.parse(name), heavy_tailed(256, 512)
    solved_norm, rounded_norm = (
        float((quantized.dequantize().double() - of.double()).abs().pow(0.7).sum())
        for quantized in (hqq(of, scheme), quantize(of, scheme))
    )
    assert (solved_norm < rounded_norm) is is_nearer


@pytest.mark.parametrize("name", INT)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8, 1e4])
def test_hqq_of_tiny_and_huge_weights_and_zeros(name: str, size: float) -> None:
    scheme, extreme = Scheme.parse(name), weight() * size
    extreme[3, :256] = 0
    extreme[5] = 0
    found = hqq(extreme, scheme)
    assert found.dequantize().isfinite().all()
    assert (found.scales > 0).all()
    assert not found.dequantize()[5].any()
    assert (errors(extreme, found) <= 1.000001 * errors(extreme, hqq(extreme * 0, scheme))).all()


@pytest.mark.parametrize("name", ["ternary", "ternary_g256", "binary_g128", "float8"])
def test_hqq_takes_integers_alone(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"scheme: got '{name}', wanted a scheme of integers for hqq: gguf_q8_0, "):
        hqq(weight(), Scheme.parse(name))
    with pytest.raises(ConfigError, match="divides 512 inputs"):
        hqq(weight(), Scheme.parse("int4_g96"))


def correlated_inputs(columns: int = 512, tokens: int = 2048) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return torch.randn(tokens, columns, generator=generator) @ mixing


def output_error(of: Tensor, gram: Tensor, quantized: Quantized) -> float:
    difference = (of - quantized.dequantize()).double()
    return float((difference @ gram.double() * difference).sum())


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        *(("int2_g64", 0.6), ("int3_g64", 0.5), ("gguf_q4_0", 0.5), ("8da4w_g32", 0.5), ("int8_g32", 0.6)),
        *(("int4", 0.5), ("int3_g256", 0.5), ("ternary_g256", 0.7), ("binary_g128", 0.8)),
    ],
)
def test_gptq_gives_better_outputs(name: str, margin: float) -> None:
    scheme, of, inputs = Scheme.parse(name), weight(32, 512), correlated_inputs()
    gram = inputs.T @ inputs / len(inputs)
    before = gram.clone(), of.clone()
    found = gptq(of, gram, scheme)
    assert torch.equal(gram, before[0])
    assert torch.equal(of, before[1])
    rounded = quantize(of, scheme)
    assert (found.codes.dtype, found.codes.shape) == (torch.int8, of.shape)
    assert (found.scales.dtype, found.scales.shape) == (scheme.scale_dtype, rounded.scales.shape)
    assert found.codes.min() >= scheme.code_range[0]
    assert found.codes.max() <= scheme.code_range[1]
    assert output_error(of, gram, found) < margin * output_error(of, gram, rounded)
    unseen = correlated_inputs(tokens=4096)[2048:]
    assert output_error(of, unseen.T @ unseen, found) < output_error(of, unseen.T @ unseen, rounded)


@pytest.mark.parametrize("name", ["gguf_q4_0", "int3", "ternary_g256", "binary_g128"])
def test_gptq_without_correlation_is_rounding(name: str) -> None:
    scheme, of = Scheme.parse(name), weight()
    found, rounded = gptq(of, torch.rand(512).add(0.5).diag(), scheme), quantize(of, scheme)
    assert torch.equal(found.codes, rounded.codes)
    assert torch.equal(found.scales, rounded.scales)


@pytest.mark.parametrize("name", ["int4_g16", "int4_g96", "int4_g48", "int4_g384", "int4"])
def test_gptq_in_blocks_is_gptq_column_by_column(name: str) -> None:
    """Against the paper's first form: the inverse Gram matrix itself, shrunk by an elimination step a column."""
    scheme, of, inputs = Scheme.parse(name), weight(4, 384).double(), correlated_inputs(384).double()
    gram = inputs.T @ inputs
    found = gptq(of.float(), gram, scheme, ridge=0.01)
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(384))
    expected, size = of.clone(), scheme.group_size or 384
    for i in range(384):
        if i % size == 0:
            scales = quantize(expected[:, i : i + size].float(), Scheme("group", "int", 4, None)).scales.double()[:, 0]
        rounded = scales * (expected[:, i] / scales).round().clamp(-8, 7)
        expected[:, i + 1 :] -= torch.outer((expected[:, i] - rounded) / inverse[i, i], inverse[i, i + 1 :])
        expected[:, i] = rounded
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    same = (found.dequantize().double() - expected).abs() < 1e-6
    assert same.double().mean() > 0.98  # float32 may tip a tie, and what comes after it in its row


def test_gptq_rounds_dead_inputs_by_themselves() -> None:
    of, inputs, scheme = weight(32, 256), correlated_inputs(256), Scheme.parse("int3_g32")
    inputs[:, 7] = 0
    inputs[:, 64:96] = 0
    gram = inputs.T @ inputs
    found = gptq(of, gram, scheme)
    assert torch.equal(found.codes[:, 64:96], quantize(of[:, 64:96].contiguous(), scheme).codes)
    assert output_error(of, gram, found) < output_error(of, gram, quantize(of, scheme))
    assert torch.equal(gptq(of, gram, scheme, ridge=0.0).codes[:, 64:96], found.codes[:, 64:96])
    assert torch.equal(gptq(of, torch.zeros(256, 256), scheme).codes, quantize(of, scheme).codes)


def test_gptq_has_no_float8() -> None:
    with pytest.raises(ConfigError, match="scheme: got 'float8', wanted int, ternary or binary for GPTQ"):
        gptq(weight(), torch.eye(512), Scheme.parse("float8"))
