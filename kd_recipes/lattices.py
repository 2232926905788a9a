"""The lattices that weights are quantized to, each named by the format that it is shipped in: pure functions.

One function serves both quantization after training and fake quantization during it, so that what is converted is, bit
for bit, what was trained; on another kind of device a sum may round otherwise, and a scale with it. A code counts steps
of a scale that a group of inputs shares, and scales are rounded to the dtype that the format keeps before codes are.
"""

# O outputs, I inputs, G groups of a row, g inputs of a group, B inputs of a block, b bytes of a packed row

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_recipes.errors import ConfigError, Problem

_FORMS = (
    "gguf_q8_0, gguf_q4_0, int2 to int8, ternary, binary (each of these also with a group size: int4_g32), "
    "8da4w_g32 (or another group size), 8da8w, or float8"
)
HQQ_FORMS = "a scheme of integers for hqq: gguf_q8_0, gguf_q4_0, int2 to int8 (also int4_g32), 8da4w_g32, or 8da8w"
_FORM = re.compile(r"(int[2-8]|ternary|binary|8da4w(?=_g))(?:_g([1-9][0-9]*))?")
# Weights at a time: temporaries stay small beside an embedding, and on a CPU in its cache (twice as fast).
_WEIGHTS_ON_CPU, _WEIGHTS_ELSEWHERE = 2**20, 2**24
_BLOCK = 128  # columns of GPTQ between two updates of all that follow

# What the first scale is multiplied by before least squares sets in, and how often codes and scale then alternate: the
# least that pays. Fewer bits clip more; ternary's 1.75 times the mean is about where Gaussian and Laplace weights end.
_REFINEMENTS: dict[tuple[str, int], tuple[tuple[float, ...], int]] = {
    ("ternary", 2): ((1.75,), 2),
    ("int", 2): ((0.85, 0.6), 1),
    ("int", 3): ((0.85, 0.7), 1),
    ("int", 4): ((1.0, 0.85), 1),
    **{("int", bits): ((1.0,), 1) for bits in (5, 6, 7)},
}


@dataclass(frozen=True)
class Scheme:
    """A lattice; see :meth:`parse` for those that there are.

    Args:
        name: as in a config.
        kind: ``int``, ``ternary`` (-1, 0, 1), ``binary`` (-1, 1) or ``float8`` (e4m3fn).
        bits: of a stored code.
        group_size: inputs that share a scale; None is a whole row.
        scale_dtype: what a scale is kept in.
        dynamic_activations: whether the inputs are rounded too, to int8, token by token.
    """

    name: str
    kind: str
    bits: int
    group_size: int | None
    scale_dtype: torch.dtype = torch.float16
    dynamic_activations: bool = False

    @classmethod
    def parse(cls, name: str, key: str = "scheme") -> Scheme:
        """The scheme of a name; ``key`` is the setting that it comes from.

        ``gguf_q8_0`` and ``gguf_q4_0`` are llama.cpp's (and the same as ``int8_g32`` and ``int4_g32``), its TQ2_0 is
        ``ternary_g256`` and Q1_0 ``binary_g128``; without a group size a row has one scale. ``8da4w_g32`` and
        ``8da8w`` are ExecuTorch's, whose scales are positive; ``float8`` has a float32 scale a row.

        Raises:
            ConfigError: there is none of this name.
        """
        if isinstance(name, str) and name in _NAMED:
            return _NAMED[name]
        if not (form := _FORM.fullmatch(str(name))):
            raise ConfigError(Problem(key, name, _FORMS))
        group_size = int(form[2]) if form[2] else None
        match form[1]:
            case "8da4w":
                return cls(name, "int", 4, group_size, torch.bfloat16, dynamic_activations=True)
            case "ternary" | "binary" as kind:
                return cls(name, kind, 2 if kind == "ternary" else 1, group_size)
        return cls(name, "int", int(form[1][-1]), group_size)

    @property
    def zero_is_exact(self) -> bool:
        """Whether a weight of zero stays zero, as a pruned model needs it."""
        return self.kind != "binary"

    @property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code; of float8, the bits read as int8."""
        if self.kind in ("ternary", "binary"):
            return -1, 1
        highest = 2 ** (self.bits - 1) - 1
        return (-highest if self.kind == "int" and self.bits == 8 else -highest - 1), highest

    def bits_per_weight(self, in_dim: int) -> float:
        """Bits of a code and its share of the scale, in a row of ``in_dim`` inputs."""
        return self.bits + 8 * self.scale_dtype.itemsize / (self.group_size or in_dim)

    def check(self, in_dim: int, key: str) -> None:
        """Raise a ConfigError, with the setting ``key``, where the group size does not divide ``in_dim`` inputs."""
        if self.group_size and in_dim % self.group_size:
            fitting = ", ".join(str(size) for size in (16, 32, 64, 128, 256) if in_dim % size == 0)
            remedy = f"These do: {fitting}" if fitting else "No power of two from 16 to 256 does"
            raise ConfigError(Problem(key, self.name, f"a group size that divides {in_dim} inputs", remedy))


_NAMED = {
    "gguf_q8_0": Scheme("gguf_q8_0", "int", 8, 32),
    "gguf_q4_0": Scheme("gguf_q4_0", "int", 4, 32),
    "8da8w": Scheme("8da8w", "int", 8, None, torch.float32, dynamic_activations=True),
    "float8": Scheme("float8", "float8", 8, None, torch.float32),
}


@dataclass(frozen=True)
class Quantized:
    """A weight on a lattice: int8 codes ``[O, I]`` (of float8, the bits) and scales ``[O, G]`` in ``scale_dtype``."""

    codes: Tensor
    scales: Tensor
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Codes times scales ``[O, I]``, multiplied in float32 and then cast."""
        codes = self.codes.view(torch.float8_e4m3fn) if self.scheme.kind == "float8" else self.codes
        values_OGg = codes.to(torch.float32).view(*self.scales.shape, codes.shape[1] // self.scales.shape[1])
        return values_OGg.mul_(self.scales.to(torch.float32)[..., None]).flatten(1).to(dtype)


@torch.no_grad()
def quantize(weight_OI: Tensor, scheme: Scheme) -> Quantized:
    """The point of a lattice near a weight, computed in float32.

    The scale is that of the largest magnitude (int, float8) or of the mean one (binary, and ternary as in BitNet b1.58,
    arXiv 2402.17764); for 2 to 7 bits and ternary least squares then refine it, ``s = <w, q> / <q, q>`` and
    ``q = round(w / s)`` by turns, and a group keeps the scale with the least squared error; zeros get 0, or nearly.

    Squared error relative to the weight's, Gaussian / Laplace: int2_g64 .127 / .163 (.156 / .213 unrefined), int3_g64
    .032 / .050 (.037 / .060), gguf_q4_0 .0070 / .0108 (.0074 / .0114), ternary_g256 .189 / .261 (.262 / .391).

    Raises:
        ConfigError: the scheme's group size does not divide I.
    """
    return _quantize(weight_OI, scheme, _scales)


@torch.no_grad()
def hqq(weight_OI: Tensor, scheme: Scheme) -> Quantized:
    """As :func:`quantize`, with the scales that torchao's half-quadratic solver ends at, all of them positive.

    From the largest magnitude over the lowest code on, ``q = round(w / s)`` and ``s = <w, q> / <q, q>`` by turns, 20
    times: the scale's half of https://mobiusml.github.io/hqq_blog/, without its zero points and its norm below 1.

    Raises:
        ConfigError: a scheme of another kind than int, or whose group size does not divide I.
    """
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_scale_only_hqq as solve

    if scheme.kind != "int":
        raise ConfigError(Problem("scheme", scheme.name, HQQ_FORMS))

    def solved(weight_OGg: Tensor, scheme: Scheme) -> Tensor:
        # its tolerance looks at all rows together, and where a row ends must not depend on the others
        block = [1, weight_OGg.shape[-1]]
        _, scales_OG = solve(weight_OGg.flatten(1), block, *scheme.code_range, early_stop_tol=0.0)
        return _as_kept(scales_OG, scheme)

    return _quantize(weight_OI, scheme, solved)


def _quantize(weight_OI: Tensor, scheme: Scheme, choose: Callable[[Tensor, Scheme], Tensor]) -> Quantized:
    num_inputs = weight_OI.shape[1]
    scheme.check(num_inputs, "scheme")
    codes, scales = [], []
    at_a_time = _WEIGHTS_ON_CPU if weight_OI.device.type == "cpu" else _WEIGHTS_ELSEWHERE
    for rows in weight_OI.split(max(1, at_a_time // num_inputs)):
        weight_OGg = rows.to(torch.float32).contiguous().unflatten(1, (-1, scheme.group_size or num_inputs))
        scales.append(choose(weight_OGg, scheme))
        values = _codes(weight_OGg, scales[-1], scheme).flatten(1)
        codes.append(values.to(torch.float8_e4m3fn if scheme.kind == "float8" else torch.int8).view(torch.int8))
    return Quantized(torch.cat(codes), torch.cat(scales), scheme)


def _scales(weight_OGg: Tensor, scheme: Scheme) -> Tensor:
    """The scale of each group ``[O, G]``, in the dtype that it is kept in."""
    first_OG = _first_scales(weight_OGg, scheme)
    best_OG = _as_kept(first_OG, scheme)
    if (scheme.kind, scheme.bits) not in _REFINEMENTS:
        return best_OG
    starts, num_alternations = _REFINEMENTS[scheme.kind, scheme.bits]
    error_OG = _squared_error(weight_OGg, best_OG, scheme)
    for factor in starts:
        scales_OG = first_OG * factor
        for _ in range(num_alternations):
            codes_OGg = _codes(weight_OGg, scales_OG, scheme)
            scales_OG = (codes_OGg * weight_OGg).sum(-1) / codes_OGg.square_().sum(-1).clamp_min_(1.0)
        refined_OG = _as_kept(scales_OG, scheme)
        refined_error_OG = _squared_error(weight_OGg, refined_OG, scheme)
        best_OG = torch.where(refined_error_OG < error_OG, refined_OG, best_OG)
        error_OG = torch.minimum(refined_error_OG, error_OG)
    return best_OG


def _first_scales(weight_OGg: Tensor, scheme: Scheme) -> Tensor:
    if scheme.kind in ("ternary", "binary"):
        return weight_OGg.abs().mean(-1)
    smallest_OG, largest_OG = weight_OGg.amin(-1), weight_OGg.amax(-1)  # aminmax takes five times as long
    lowest, highest = scheme.code_range
    if scheme.kind == "int" and scheme.bits < 8 and not scheme.dynamic_activations:
        # the element of largest magnitude gets the lowest code, which may take a negative scale
        return torch.where(largest_OG > -smallest_OG, largest_OG, smallest_OG) / lowest
    magnitude_OG = torch.maximum(largest_OG, -smallest_OG)
    return magnitude_OG / (448 if scheme.kind == "float8" else (highest - lowest) / 2)


def _as_kept(scales_OG: Tensor, scheme: Scheme) -> Tensor:
    kept_OG = scales_OG.to(scheme.scale_dtype)
    # XNNPACK refuses a scale that is zero or subnormal. float16, which llama.cpp keeps, may be both.
    return kept_OG if scheme.scale_dtype == torch.float16 else kept_OG.clamp_min_(torch.finfo(scheme.scale_dtype).tiny)


def _codes(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """The codes ``[..., g]``, in float32, of weights ``[..., g]`` under scales ``[...]``; of float8, its values."""
    if scheme.kind == "binary":
        return torch.where(weight >= 0, 1.0, -1.0)
    scales = scales.to(torch.float32)
    codes = weight * torch.where(scales == 0, 0.0, scales.reciprocal())[..., None]
    return codes if scheme.kind == "float8" else codes.round_().clamp_(*scheme.code_range)


def _squared_error(weight_OGg: Tensor, scales_OG: Tensor, scheme: Scheme) -> Tensor:
    codes_OGg = _codes(weight_OGg, scales_OG, scheme)
    return codes_OGg.mul_(scales_OG.to(torch.float32)[..., None]).sub_(weight_OGg).square_().sum(-1)


class _StraightThrough(torch.autograd.Function):
    """Applies a function that rounds; the gradient passes as if it had not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def fake_quantize(weight_OI: Tensor, scheme: Scheme) -> Tensor:
    """``quantize(weight_OI, scheme).dequantize(weight_OI.dtype)``, with the identity for a gradient."""
    result: Tensor = _StraightThrough.apply(weight_OI, lambda w: quantize(w, scheme).dequantize(w.dtype))
    return result


def fake_quantize_activations(x: Tensor) -> Tensor:
    """Inputs ``[..., I]`` rounded to int8 with a scale and a zero point a token, with the identity for a gradient.

    The rule is torchao's of ``Int8DynamicActivationIntxWeightConfig`` to the bit, and computed as there in the dtype of
    ``x``: the range of a token and zero is cut into 255 steps, and zero is one of them.
    """
    result: Tensor = _StraightThrough.apply(x, _round_tokens)
    return result


def _round_tokens(x: Tensor) -> Tensor:
    lowest = x.amin(-1, keepdim=True).clamp_max_(0)
    highest = x.amax(-1, keepdim=True).clamp_min_(0)
    scale = ((highest - lowest) / 255.0).clamp_min_(torch.finfo(x.dtype).eps)
    zero_point = (-128 - (lowest / scale).round_()).clamp_(-128, 127)
    # exact in bfloat16 too: a sum that needs more than its 8 bits is clamped
    return (x * (1.0 / scale)).round_().add_(zero_point).clamp_(-128, 127).sub_(zero_point).mul_(scale)


def pack(codes_OI: Tensor, bits: int, *, is_ternary: bool = False) -> Tensor:
    """Codes without the bits that they do not need, least significant bits first; each row begins at a byte.

    A code of 2 to 8 bits is stored with ``2 ** (bits - 1)`` added to it, or 1 if it ``is_ternary``; one of a single bit
    as whether it is 1 rather than -1. Returns uint8 ``[O, b]`` with ``b = ceil(I * bits / 8)``.
    """
    num_outputs, num_inputs = codes_OI.shape
    offset = 1 if is_ternary else 2 ** (bits - 1)
    num_words = -(-num_inputs // 8)  # eight codes fill `bits` bytes, the low ones of a 64-bit word
    unsigned = (codes_OI.contiguous().view(torch.uint8) + offset) >> int(bits == 1)
    octets = torch.nn.functional.pad(unsigned, (0, -num_inputs % 8)).view(num_outputs, num_words, 8)
    words = torch.zeros(num_outputs, num_words, dtype=torch.int64, device=codes_OI.device)
    for place in range(8):
        words |= octets[..., place].to(torch.int64) << (place * bits)
    packed = words.view(torch.uint8).view(num_outputs, num_words, 8)[..., :bits]
    return packed.reshape(num_outputs, num_words * bits)[:, : -(-num_inputs * bits // 8)].contiguous()


def unpack(packed_Ob: Tensor, bits: int, in_dim: int, *, is_ternary: bool = False) -> Tensor:
    """The int8 codes ``[O, I]`` that :func:`pack` was given, where I is ``in_dim``."""
    num_outputs, num_words = packed_Ob.shape[0], -(-in_dim // 8)
    offset = 1 if is_ternary else 2 ** (bits - 1)
    octets = torch.nn.functional.pad(packed_Ob, (0, num_words * bits - packed_Ob.shape[1]))
    words = torch.nn.functional.pad(octets.view(num_outputs, num_words, bits), (0, 8 - bits)).view(torch.int64)[..., 0]
    unsigned = [(words >> (place * bits)) & (2**bits - 1) for place in range(8)]
    codes = [((code << int(bits == 1)) - offset).to(torch.int8) for code in unsigned]
    return torch.stack(codes, -1).view(num_outputs, num_words * 8)[:, :in_dim].contiguous()


@torch.no_grad()
def gptq(weight_OI: Tensor, gram_II: Tensor, scheme: Scheme, *, ridge: float = 0.01) -> Quantized:
    """The point of a lattice whose *outputs* are near a weight's: GPTQ (arXiv 2210.17323), inputs in their order.

    Each input's rounding error is made up for by the inputs after it, as far as they are correlated with it. A group's
    scales are what :func:`quantize` would choose for the weights as they are when their turn comes.

    Args:
        weight_OI: of any floating dtype.
        gram_II: sum, or mean, of ``x x^T`` over the inputs; an input that was always zero is rounded by itself.
        scheme: the lattice, of any kind but float8.
        ridge: added to the diagonal, in units of its mean; more of it trusts the inputs seen less.

    Raises:
        ConfigError: the scheme is float8, or its group size does not divide I.
        torch.linalg.LinAlgError: the Gram matrix is not positive definite, for all its ridge.
    """
    num_inputs = weight_OI.shape[1]
    scheme.check(num_inputs, "scheme")
    if scheme.kind == "float8":
        raise ConfigError(Problem("scheme", scheme.name, "int, ternary or binary for GPTQ", "Use rounding for float8"))
    group_size = scheme.group_size or num_inputs
    # No group may begin inside a block and end behind it: what is there has not been updated yet.
    starts_with_blocks = group_size % _BLOCK == 0 or group_size == num_inputs
    block_size = _BLOCK if starts_with_blocks else max(group_size, _BLOCK // group_size * group_size)
    factor_II = _inverse_factor(gram_II, ridge)
    weight_IO = weight_OI.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    codes_IO = torch.empty_like(weight_IO, dtype=torch.int8)
    scales: list[Tensor] = []
    for start in range(0, num_inputs, block_size):
        end = min(start + block_size, num_inputs)
        error_BO = torch.empty_like(weight_IO[start:end])
        for i in range(start, end):
            if i % group_size == 0:
                scales.append(_scales(weight_IO[i : i + group_size].T.contiguous()[:, None], scheme)[:, 0])
            codes_IO[i] = codes_O = _codes(weight_IO[i][:, None], scales[-1], scheme)[:, 0]
            error_BO[i - start] = (weight_IO[i] - codes_O * scales[-1].to(torch.float32)) / factor_II[i, i]
            weight_IO[i + 1 : end].addr_(factor_II[i, i + 1 : end], error_BO[i - start], alpha=-1)
        weight_IO[end:].addmm_(factor_II[start:end, end:].T, error_BO, alpha=-1)
    return Quantized(codes_IO.T.contiguous(), torch.stack(scales, 1), scheme)


def _inverse_factor(gram_II: Tensor, ridge: float) -> Tensor:
    """The upper triangular U with ``U^T U`` the inverse of the Gram matrix with its ridge, in float32."""
    gram_II = gram_II.to(torch.promote_types(gram_II.dtype, torch.float32), copy=True)
    diagonal_I = gram_II.diagonal()
    diagonal_I += ridge * diagonal_I.mean()
    diagonal_I[diagonal_I == 0] = 1.0
    # Turned about, its lower Cholesky factor is an upper one R with R R^T the matrix: U is the inverse of R.
    upper_II = torch.linalg.cholesky(gram_II.flip(0, 1)).flip(0, 1)
    inverse_II: Tensor = torch.linalg.solve_triangular(upper_II, torch.eye(len(upper_II)).to(upper_II), upper=True)
    return inverse_II.to(torch.float32)
