"""What is converted is what was trained, and what is shipped: bit for bit, by torchao's and llama.cpp's own readers."""

from __future__ import annotations

import math
from collections.abc import Callable

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from lattice_weights import INT, NAMES, errors, heavy_tailed, weight
from torch import Tensor

from kd_recipes import lattices
from kd_recipes.compression.torchao_tensors import as_torchao
from kd_recipes.errors import ConfigError
from kd_recipes.lattices import (
    Quantized,
    Scheme,
    fake_quantize,
    fake_quantize_activations,
    pack,
    quantize,
    unpack,
)


@pytest.mark.parametrize(
    ("name", "kind", "bits", "group_size", "scale_dtype", "is_dynamic"),
    [
        ("gguf_q8_0", "int", 8, 32, torch.float16, False),
        ("gguf_q4_0", "int", 4, 32, torch.float16, False),
        ("int3", "int", 3, None, torch.float16, False),
        ("int5_g48", "int", 5, 48, torch.float16, False),
        ("ternary_g256", "ternary", 2, 256, torch.float16, False),
        ("binary", "binary", 1, None, torch.float16, False),
        ("8da4w_g32", "int", 4, 32, torch.bfloat16, True),
        ("8da8w", "int", 8, None, torch.float32, True),
        ("float8", "float8", 8, None, torch.float32, False),
    ],
)
def test_a_name_is_a_scheme(
    name: str, kind: str, bits: int, group_size: int | None, scale_dtype: torch.dtype, is_dynamic: bool
) -> None:
    assert Scheme.parse(name) == Scheme(name, kind, bits, group_size, scale_dtype, is_dynamic)


@pytest.mark.parametrize(
    "name", ["int9", "int1", "int4_g0", "int4_g", "int4-g32", "8da4w", "8da8w_g32", "float8_g32", ""]
)
def test_another_name_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"scheme: got .*wanted gguf_q8_0, gguf_q4_0, int2 to int8.*8da8w, or float8"):
        Scheme.parse(name)


def test_a_group_that_does_not_fit_is_refused_with_those_that_do() -> None:
    scheme = Scheme.parse("int4_g64")
    scheme.check(128, "method.scheme")
    with pytest.raises(
        ConfigError, match=r"method\.scheme: got 'int4_g64', wanted .*divides 96 inputs. These do: 16, 32$"
    ):
        scheme.check(96, "method.scheme")
    with pytest.raises(ConfigError, match=r"divides 10 inputs. No power of two from 16 to 256 does"):
        scheme.check(10, "method.scheme")
    with pytest.raises(ConfigError, match="divides 96 inputs"):
        quantize(weight(2, 96), scheme)
    Scheme.parse("int4").check(97, "method.scheme")


def test_bits_per_weight_count_the_scale() -> None:
    counted = {name: Scheme.parse(name).bits_per_weight(1024) for name in NAMES}
    # those of llama.cpp's blocks: 34 bytes for 32 weights, 18 for 32, 66 for 256, 18 for 128
    assert counted["gguf_q8_0"] == 8.5
    assert counted["gguf_q4_0"] == 4.5
    assert counted["ternary_g256"] == 2.0625
    assert counted["binary_g128"] == 1.125
    assert counted["8da8w"] == 8 + 32 / 1024
    assert counted["int2"] == 2 + 16 / 1024


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (2, 129), (4, 0), (0, 9)])
def test_packed_codes_come_back(bits: int, shape: tuple[int, int]) -> None:
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(lowest, highest, shape, dtype=torch.int8, generator=generator)
    codes = codes * 2 + 1 if bits == 1 else codes
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (shape[0], math.ceil(shape[1] * bits / 8))
    unpacked = unpack(packed, bits, shape[1])
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_lie_least_significant_first(bits: int) -> None:
    stored = np.random.default_rng(bits).integers(0, 2**bits, size=(3, 11))
    codes = stored * 2 - 1 if bits == 1 else stored - 2 ** (bits - 1)
    wide = [sum(int(code) << (place * bits) for place, code in enumerate(row)) for row in stored]
    expected = [list(row.to_bytes(math.ceil(11 * bits / 8), "little")) for row in wide]
    assert pack(torch.from_numpy(codes).to(torch.int8), bits).tolist() == expected


def test_ternary_codes_are_stored_with_one_added() -> None:
    codes = torch.tensor([[-1, 0, 1, 1, -1]], dtype=torch.int8)
    packed = pack(codes, 2, is_ternary=True)
    assert packed.tolist() == [[0b10_10_01_00, 0b00]]
    assert torch.equal(unpack(packed, 2, 5, is_ternary=True), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_converted_is_what_was_trained(name: str, dtype: torch.dtype) -> None:
    scheme, trained = Scheme.parse(name), heavy_tailed().to(dtype)
    quantized = quantize(trained, scheme)
    assert quantized.codes.dtype == torch.int8
    assert quantized.codes.shape == trained.shape
    assert quantized.scales.dtype == scheme.scale_dtype
    assert quantized.scales.shape == (24, 512 // (scheme.group_size or 512))
    faked = fake_quantize(trained, scheme)
    assert faked.dtype == dtype
    assert torch.equal(faked.view(torch.uint8), quantized.dequantize(dtype).view(torch.uint8))
    assert torch.equal(quantized.dequantize(dtype), quantized.dequantize().to(dtype))
    # computed in float32 whatever the dtype
    assert torch.equal(quantize(trained.float(), scheme).codes, quantized.codes)
    assert 0 < errors(trained, quantized).sum() < trained.double().square().sum() * 0.6


@pytest.mark.parametrize("name", ["gguf_q4_0", "ternary", "float8"])
def test_rows_are_quantized_each_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme, whole = Scheme.parse(name), quantize(weight(), Scheme.parse(name))
    monkeypatch.setattr(lattices, "_WEIGHTS_ON_CPU", 7 * 512)
    by_seven = quantize(weight(), scheme)
    assert torch.equal(by_seven.codes, whole.codes)
    assert torch.equal(by_seven.scales, whole.scales)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_goes_straight_through(name: str) -> None:
    trained = weight().requires_grad_()
    upstream = weight(seed=2)
    (fake_quantize(trained, Scheme.parse(name)) * upstream).sum().backward()
    assert trained.grad is not None
    assert torch.equal(trained.grad, upstream)


@pytest.mark.parametrize("name", NAMES)
def test_a_shape_is_enough(name: str) -> None:
    faked = fake_quantize(torch.empty(4, 512, device="meta", dtype=torch.bfloat16), Scheme.parse(name))
    assert faked.device.type == "meta"
    assert (faked.shape, faked.dtype) == ((4, 512), torch.bfloat16)
    assert fake_quantize_activations(torch.empty(2, 3, 8, device="meta")).shape == (2, 3, 8)


@pytest.mark.parametrize("name", NAMES)
def test_a_group_of_zeros_stays_zeros(name: str) -> None:
    scheme, with_zeros = Scheme.parse(name), weight()
    with_zeros[3, :256] = 0
    with_zeros[5] = 0
    dequantized = quantize(with_zeros, scheme).dequantize()
    assert dequantized.isfinite().all()
    assert not dequantized[5].any()
    assert not dequantized[3, :256].any() or scheme.group_size is None


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_weight_stays_pruned(name: str) -> None:
    scheme, pruned = Scheme.parse(name), weight()
    pruned[:, ::2] = 0
    assert scheme.zero_is_exact is not bool(fake_quantize(pruned, scheme)[:, ::2].any())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-6, 1e4])
def test_tiny_and_huge_weights_do_no_harm(name: str, size: float) -> None:
    extreme = weight() * size
    quantized = quantize(extreme, Scheme.parse(name))
    assert quantized.dequantize().isfinite().all()
    codes_OGg = quantized.codes.view(*quantized.scales.shape, -1)
    assert not codes_OGg[quantized.scales == 0].any() or not quantized.scheme.zero_is_exact
    assert (errors(extreme, quantized) <= 1.000001 * errors(extreme, quantize(extreme * 0, quantized.scheme))).all()


@pytest.mark.parametrize("name", NAMES)
def test_codes_stay_in_their_range(name: str) -> None:
    scheme = Scheme.parse(name)
    quantized = quantize(heavy_tailed(), scheme)
    used = set(quantized.codes.unique().tolist())
    assert min(used) >= scheme.code_range[0]
    assert max(used) <= scheme.code_range[1]
    if scheme.kind != "float8":
        expected = {"ternary": {-1, 0, 1}, "binary": {-1, 1}}.get(scheme.kind)
        assert expected is None or used == expected
    assert scheme.code_range[0] == -128 or len(used) <= 2**scheme.bits
    has_negative = bool((quantized.scales < 0).any())
    assert has_negative is (scheme.kind == "int" and scheme.bits < 8 and not scheme.dynamic_activations)
    if scheme.dynamic_activations:
        assert (quantized.scales >= torch.finfo(scheme.scale_dtype).tiny).all()
        assert (quantize(torch.zeros(2, 64), scheme).scales >= torch.finfo(scheme.scale_dtype).tiny).all()


def test_float8_rounds_to_four_bits_below_the_largest() -> None:
    of, quantized = heavy_tailed(), quantize(heavy_tailed(), Scheme.parse("float8"))
    assert torch.equal(quantized.scales, of.abs().amax(1, keepdim=True) / 448)
    assert (quantized.codes.view(torch.float8_e4m3fn).float().abs().amax(1) == 448).all()
    difference, normal = (quantized.dequantize() - of).abs(), of.abs() >= quantized.scales * 2**-6
    assert (difference <= of.abs() * 2**-4 * 1.00001)[normal].all()
    assert (difference <= quantized.scales * 2**-10 * 1.00001)[~normal].all()


def plainly_rounded(of: Tensor, scheme: Scheme) -> Tensor:
    """The absmax rule of llama.cpp (signed) or of torchao (positive), BitNet's for ternary; a scale kept as it is."""
    groups = of.view(of.shape[0], -1, scheme.group_size or of.shape[1]).double()
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    if scheme.kind == "ternary":
        lowest, highest, scale = -1, 1, groups.abs().mean(-1, keepdim=True)
    else:
        lowest, highest = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
        scale = largest.abs() / (highest + 0.5) if scheme.dynamic_activations else largest / lowest
    scale = scale.to(scheme.scale_dtype).double()
    return (groups - scale * (groups / scale).round().clamp(lowest, highest)).square().sum(-1)


@pytest.mark.parametrize("make", [weight, heavy_tailed])
@pytest.mark.parametrize("name", ["int2_g64", "int3_g64", *(f"int{b}_g32" for b in range(2, 8)), "int4", "8da4w_g32"])
def test_refining_never_costs(name: str, make: Callable[..., Tensor]) -> None:
    scheme, of = Scheme.parse(name), make(64, 512)
    refined, plain = errors(of, quantize(of, scheme)), plainly_rounded(of, scheme)
    assert (refined <= plain * 1.0001).all()
    gain = {2: 0.90, 3: 0.93, 4: 0.96, 5: 0.99, 6: 0.999, 7: 0.9999}[scheme.bits]
    assert refined.sum() < gain * plain.sum()


@pytest.mark.parametrize("make", [weight, heavy_tailed])
def test_refining_ternary_never_costs_and_ends_near_the_best(make: Callable[..., Tensor]) -> None:
    scheme, of = Scheme.parse("ternary_g256"), make(64, 512)
    refined, plain = errors(of, quantize(of, scheme)), plainly_rounded(of, scheme)
    assert (refined <= plain * 1.0001).all()
    assert refined.sum() < 0.75 * plain.sum()
    # the best of all: the k largest share a scale, their mean, for the best k
    magnitudes = of.view(64, 2, 256).double().abs().sort(-1, descending=True).values
    explained = magnitudes.cumsum(-1).square() / torch.arange(1, 257)
    best = magnitudes.square().sum(-1) - explained.max(-1).values
    assert (refined > best * 0.9999).all()
    assert refined.sum() < 1.02 * best.sum()


@pytest.mark.parametrize("make", [weight, heavy_tailed])
def test_the_error_falls_as_bits_rise(make: Callable[..., Tensor]) -> None:
    of = make()
    names = ["binary_g32", "ternary_g32", *(f"int{bits}_g32" for bits in range(2, 9))]
    found = [errors(of, quantize(of, Scheme.parse(name))).sum().item() for name in names]
    assert found == sorted(found, reverse=True)
    # a bit more is a step half as long, from where clipping no longer matters
    assert found[-2] < found[-3] / 3.5 < found[-4] / 12


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith(("8da", "float8"))])
def test_a_point_of_the_lattice_with_its_largest_element_stays_where_it_is(name: str) -> None:
    scheme = Scheme.parse(name)
    lowest, highest = scheme.code_range
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(lowest, highest + 1, (8, 512), generator=generator).float()
    codes[:, :: scheme.group_size or 512] = lowest
    if scheme.kind == "binary":
        codes = torch.where(codes >= 0, 1.0, -1.0)
    point = codes * 0.03125
    assert torch.equal(quantize(point, scheme).dequantize(), point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*INT, "ternary_g256"])
def test_torchao_reads_the_same_weights(name: str, dtype: torch.dtype) -> None:
    quantized = quantize(heavy_tailed(), Scheme.parse(name))
    assert torch.equal(as_torchao(quantized, dtype).dequantize(), quantized.dequantize(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["8da4w_g32", "8da8w"])
def test_torchao_rounds_the_same_inputs(name: str, dtype: torch.dtype) -> None:
    scheme, inputs = Scheme.parse(name), (heavy_tailed(60, 512) * 100).to(dtype).view(3, 20, 512)
    inputs[0, 0] = 0
    inputs[0, 1] = inputs[0, 1].abs() + 1  # zero is outside of what is there
    inputs[0, 2] = -inputs[0, 1]
    inputs[0, 3, 1:] = 0
    inputs[0, 4] *= 1e-4
    quantized = quantize(weight(), scheme)
    expected = torch.nn.functional.linear(inputs, as_torchao(quantized, dtype))
    faked = fake_quantize_activations(inputs)
    assert torch.equal(torch.nn.functional.linear(faked, quantized.dequantize(dtype)), expected)
    eye = Quantized(torch.eye(512, dtype=torch.int8), torch.ones(512, 16, dtype=dtype), Scheme.parse("8da4w_g32"))
    assert torch.equal(torch.nn.functional.linear(inputs, as_torchao(eye, dtype)), faked)
    assert not torch.equal(faked, inputs)


def test_the_gradient_of_inputs_goes_straight_through() -> None:
    inputs = weight().requires_grad_()
    (fake_quantize_activations(inputs) * weight(seed=2)).sum().backward()
    assert inputs.grad is not None
    assert torch.equal(inputs.grad, weight(seed=2))


def blocks(quantized: Quantized, codes_offset: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Codes ``[block, weight]`` with an offset, and the two bytes of each block's scale."""
    group_size = quantized.scheme.group_size
    codes = (quantized.codes.view(-1, group_size) + codes_offset).view(torch.uint8).numpy()
    return codes, quantized.scales.view(-1, 1).numpy().view(np.uint8)


def gguf_bytes(quantized: Quantized) -> tuple[npt.NDArray[np.uint8], gguf.GGMLQuantizationType]:
    """The blocks of a row after each other, as ggml-common.h declares them."""
    scheme = quantized.scheme
    if scheme.bits == 8:
        codes, scales = blocks(quantized, 0)
        return np.hstack([scales, codes]), gguf.GGMLQuantizationType.Q8_0
    if scheme.bits == 4:
        codes, scales = blocks(quantized, 8)
        return np.hstack([scales, codes[:, :16] | codes[:, 16:] << 4]), gguf.GGMLQuantizationType.Q4_0
    codes, scales = blocks(quantized, 1)
    quarters = codes.reshape(-1, 2, 4, 32)
    packed = sum(quarters[:, :, place] << (2 * place) for place in range(4))
    return np.hstack([packed.reshape(-1, 64), scales]), gguf.GGMLQuantizationType.TQ2_0


@pytest.mark.parametrize("make", [weight, heavy_tailed])
@pytest.mark.parametrize("name", ["gguf_q8_0", "gguf_q4_0", "ternary_g256"])
def test_gguf_reads_the_same_weights(name: str, make: Callable[..., Tensor]) -> None:
    quantized = quantize(make(), Scheme.parse(name))
    data, qtype = gguf_bytes(quantized)
    read = gguf.dequantize(data.reshape(quantized.codes.shape[0], -1), qtype)
    assert read.view(np.int32).tolist() == quantized.dequantize().numpy().view(np.int32).tolist()


@pytest.mark.parametrize(("name", "margin"), [("gguf_q8_0", 1.0), ("gguf_q4_0", 0.95), ("ternary_g256", 0.5)])
def test_gguf_own_rounding_is_no_better(name: str, margin: float) -> None:
    of = weight(64, 512)
    quantized = quantize(of, Scheme.parse(name))
    _, qtype = gguf_bytes(quantized)
    theirs = torch.from_numpy(gguf.dequantize(gguf.quantize(of.numpy(), qtype), qtype))
    assert errors(of, quantized).sum() <= margin * (theirs - of).double().square().sum()
