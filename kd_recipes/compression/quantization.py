"""Weights on a lattice: of a finished model, or of a student that is trained with its weights on it (QAT, and QAD).

A scheme is named by the format that it is shipped in (:meth:`kd_recipes.lattices.Scheme.parse`). What is written are
the codes and scales themselves, so no conversion rounds a second time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kd_recipes.compression.checkpoint import HFCheckpoint, write_checkpoint
from kd_recipes.compression.constraint import Constraint
from kd_recipes.compression.convert import as_tune, packed, to_file
from kd_recipes.compression.form import Form
from kd_recipes.compression.step import Step
from kd_recipes.compression.stream import INPUT_OF, Block, Stream, Text
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import HQQ_FORMS, Quantized, Scheme, fake_quantize, gptq, hqq, quantize
from kd_recipes.layers import LowRankEmbedding, LowRankLinear
from kd_recipes.models import round_activations

# By torchtune's names; a tied head is the embedding.
_TABLES = ("tok_embeddings", "output")
_LAYERS = (nn.Linear, nn.Embedding, LowRankLinear, LowRankEmbedding)


@dataclass(frozen=True)
class _Schemes:
    """Which scheme each parameter has.

    Args:
        scheme: of the blocks' linear layers; None leaves them as they are.
        embeddings: of the embedding and the head; None leaves them as they are.
        overrides: pattern of torchtune's layer names, such as ``layers.0.*`` or ``*.w2`` -> a scheme, or None; the last
            that fits counts.
    """

    scheme: str | None
    embeddings: str | None = None
    overrides: Mapping[str, str | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {".scheme": self.scheme, ".embeddings": self.embeddings}
        named |= {f".overrides.{pattern}": name for pattern, name in self.overrides.items()}
        if not any(named.values()):
            raise ConfigError(Problem(".scheme", None, "a scheme, of the blocks, the embedding, or some layers"))
        for key, name in named.items():
            if name is not None:
                Scheme.parse(name, key)

    def of(self, layer: str) -> Scheme | None:
        """The scheme of a layer's weight; None for none."""
        name = self.embeddings if layer in _TABLES else self.scheme
        for pattern, other in self.overrides.items():
            name = other if fnmatchcase(layer, pattern) else name
        return Scheme.parse(name) if name is not None else None

    def _check(self, form: Form) -> frozenset[str]:
        """The schemes' names, if they fit the model."""
        layers = {f"layers.{i}.{name}": shape[1] for i in range(form.num_layers) for name, shape in form.shapes.items()}
        is_tied = form.config.get("tie_word_embeddings", False)
        layers |= dict.fromkeys(_TABLES[:1] if is_tied else _TABLES, form.embed_dim)
        if unused := [pattern for pattern in self.overrides if not any(fnmatchcase(name, pattern) for name in layers)]:
            raise ConfigError(Problem(".overrides", unused, f"patterns of layers such as {', '.join(layers)[:80]} …"))
        schemes = {}
        for layer, in_dim in layers.items():
            scheme = self.of(layer)
            if scheme is None:
                continue
            schemes[scheme.name] = scheme
            key = ".embeddings" if layer in _TABLES else ".scheme"
            scheme.check(math.gcd(in_dim, form.table_rank if layer in _TABLES else form.rank_multiple), key)
            if form.zeros != "none" and not scheme.zero_is_exact and layer not in _TABLES:
                wanted = f"a scheme that has a zero, for a model with {form.zeros} zeros"
                raise ConfigError(Problem(key, scheme.name, wanted, "binary weights are -s and +s"))
        return frozenset(schemes)


@dataclass(frozen=True)
class Quantization(_Schemes, Step):
    """Quantize a finished model.

    Args:
        scheme: of the blocks' linear layers, by the format they are shipped in: ``gguf_q4_0``, ``int3_g64``, …
        embeddings: of the embedding and the head; None leaves them as they are.
        overrides: as :class:`_Schemes` has them.
        method: ``round`` to the nearest, with the scale of least squared error; ``hqq``, with the scale of torchao's
            half-quadratic solver, for integers alone (https://mobiusml.github.io/hqq_blog/); or ``gptq``, which lets
            the inputs that come later make up for the error on the calibration text
            (https://arxiv.org/abs/2210.17323).

    Raises:
        ConfigError: a scheme that there is not.
    """

    method: Literal["round", "hqq", "gptq"] = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("round", "hqq", "gptq"):
            raise ConfigError(Problem(".method", self.method, "round, hqq or gptq"))

    def check(self, form: Form) -> Form:
        """See :class:`Step`."""
        form.require("quantization", dense=False, zeros=False)
        schemes = self._check(form)
        if form.zeros != "none" and self.method == "gptq":
            wanted = f"round or hqq for a model with {form.zeros} zeros, which gptq would fill in"
            raise ConfigError(Problem(".method", self.method, wanted))
        if self.method == "hqq" and (others := sorted(s for s in schemes if Scheme.parse(s).kind != "int")):
            got = f"hqq for {', '.join(others)}"
            raise ConfigError(Problem(".method", got, HQQ_FORMS, "round and gptq take all schemes"))
        return replace(form, schemes=schemes)

    def apply(self, source: HFCheckpoint, destination_dir: Path, text: Text) -> HFCheckpoint:
        """See :class:`Step`."""
        schemes: dict[str, str] = {}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in source.names(None):
                for key, tensor in as_tune(source, [name]).items():
                    scheme = self.of(key.rpartition(".")[0]) if tensor.ndim == 2 else None
                    if scheme is not None:
                        schemes[key] = scheme.name
                    coded = {key: tensor} if scheme is None else packed(key, self._nearest(tensor, scheme))
                    yield from to_file(coded, source.config)
            for block in Stream(source, text, "quantize"):
                self._quantize(block)
                prefix = f"layers.{block.index}."
                schemes.update({f"{prefix}{key}": name for key, name in block.schemes.items()})
                yield from block.tensors(source.config)

        record = self.describe()
        return write_checkpoint(source, destination_dir, tensors(), record=record, ranks=source.ranks, schemes=schemes)

    def _nearest(self, weight_OI: Tensor, scheme: Scheme) -> Quantized:
        return (hqq if self.method == "hqq" else quantize)(weight_OI, scheme)

    def _quantize(self, block: Block) -> None:
        schemes = {name: self.of(f"layers.{block.index}.{name}") for name in INPUT_OF}
        dense = [name for name, scheme in schemes.items() if scheme is not None and f"{name}.weight" in block.state]
        grams = block.grams(dense) if self.method == "gptq" and dense else {}
        for name, scheme in schemes.items():
            if scheme is None:
                continue
            for key in [key for key, value in block.state.items() if key.startswith(f"{name}.") and value.ndim == 2]:
                value_OI = block.state[key].to(block.text.device, torch.float32)
                is_fitted = name in grams and scheme.kind != "float8"
                codes = gptq(value_OI, grams[name], scheme) if is_fitted else self._nearest(value_OI, scheme)
                block.set_codes(key, codes)
        round_activations(block.layer, block.schemes)


class _OnLattice(nn.Module):
    """The parametrization of a weight that is trained as what it will be rounded to."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self.scheme = scheme

    def forward(self, weight_OI: Tensor) -> Tensor:
        return fake_quantize(weight_OI, self.scheme)


@dataclass(frozen=True)
class QuantizationAwareTraining(_Schemes, Constraint):
    """Train a student as what it will be when its weights are on a lattice.

    In every forward pass a weight is what :func:`kd_recipes.lattices.quantize` makes of it; the gradient passes
    straight through to the full-precision weight that the optimizer keeps (https://arxiv.org/abs/1308.3432). Against a
    full-precision teacher this is quantization-aware distillation. What is written are the codes of the last weights,
    so what is shipped is bit for bit what was trained and evaluated.

    Args:
        scheme: of the blocks' linear layers, by the format they are shipped in: ``gguf_q4_0``, ``int2_g64``, …
        embeddings: of the embedding and the head, tied or not; None leaves them as they are.
        overrides: pattern of torchtune's layer names, such as ``layers.0.*`` or ``*.w2`` -> a scheme, or None.

    Raises:
        ConfigError: a scheme that there is not.
    """

    def check(self, form: Form) -> None:
        """See :class:`Constraint`."""
        self._check(form)

    def attach(self, model: nn.Module) -> dict[str, str]:
        """See :class:`Constraint`."""
        schemes: dict[str, str] = {}
        for name, module in [*model.named_modules()]:
            scheme = self.of(name) if isinstance(module, _LAYERS) else None
            if scheme is None:
                continue
            for key, parameter in [*module.named_parameters(recurse=False)]:
                if parameter.ndim == 2:
                    scheme.check(parameter.shape[1], f"scheme of {name}.{key}")
                    parametrize.register_parametrization(module, key, _OnLattice(scheme), unsafe=True)
                    schemes[f"{name}.{key}"] = scheme.name
        return schemes
