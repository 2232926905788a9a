"""Tensors of files as torchtune has them, and back: other names, another order of rows, codes for some of them."""

# O outputs, I inputs, G groups of a row

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from kd_recipes._torchtune.names import rows_to_hf, rows_to_tune, to_hf, to_tune
from kd_recipes.compression.checkpoint import HFCheckpoint, lineage
from kd_recipes.compression.form import Form, zero_pattern
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.lattices import Quantized, Scheme, pack, unpack

TABLES = ("tok_embeddings", "output")  # by torchtune's names; a tied head is the embedding
_KEEP_ZEROS = {"KeepZeros", "GradualSparsity"}


def as_tune(source: HFCheckpoint, names: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by torchtune's names, rows in its order; codes have become what they stand for.

    Left out is what a model has no place for; see :func:`has_place`.

    Raises:
        ConfigError: a tensor that no Llama or Qwen2 has.
    """
    state: dict[str, Tensor] = {}
    coded = [name.removesuffix(".codes") for name in names if name.endswith(".codes")]
    plain = [name for name in names if not name.endswith((".codes", ".scales"))]
    for name, tensor in source.tensors(name for name in plain if has_place(name, source)):
        key = tune_name(name, source)
        state[key] = rows_to_tune(key, tensor, source.config)
    for name in coded:
        key, quantized = _quantized(source, name)
        state[key] = quantized.dequantize()
    return state


def quantized_weights(source: HFCheckpoint) -> Iterator[tuple[str, Quantized]]:
    """The parameters that a checkpoint has as codes, by torchtune's names, rows in its order."""
    for spec in source.specs:
        if spec.name.endswith(".codes"):
            yield _quantized(source, spec.name.removesuffix(".codes"))


def _quantized(source: HFCheckpoint, name: str) -> tuple[str, Quantized]:
    (_, packed_codes), (_, scales_OG) = source.tensors([f"{name}.codes", f"{name}.scales"])
    key = tune_name(name, source)
    scheme = Scheme.parse(source.schemes[key])
    codes_OI = unpack(packed_codes, scheme.bits, _in_dim(key, source), is_ternary=scheme.kind == "ternary")
    codes_OI, scales_OG = (rows_to_tune(key, tensor, source.config) for tensor in (codes_OI, scales_OG))
    return key, Quantized(codes_OI, scales_OG, scheme)


def has_place(name: str, source: HFCheckpoint) -> bool:
    """Whether a model has a place for a tensor; not for a tied head that is repeated, or frequencies of rotations."""
    is_repeated = name == "lm_head.weight" and source.config.get("tie_word_embeddings", False)
    return not is_repeated and not name.endswith(".inv_freq")


def form_of(source: HFCheckpoint) -> Form:
    """Of a checkpoint; of its weights one is read, for what zeros there are.

    On a lattice weights are zero by chance: such zeros count where the lineage says that they have been put there and
    kept since, or the pattern is 2:4. What a quantized GGUF file was imported as is on a lattice, too.
    """
    names = [name for name in source.names(0) if ".up_proj.weight" in name]  # or its codes
    patterns = [zero_pattern(tensor) for tensor in as_tune(source, names).values()]
    if patterns == ["unstructured"] and _zeros_by_chance(source):
        patterns = []
    blocks, tables = (
        math.gcd(*(rank for layer, ranks in source.ranks.items() for rank in ranks if (layer in TABLES) == are_tables))
        for are_tables in (False, True)
    )
    return Form(
        source.config,
        zeros=patterns[0] if patterns else "none",
        rank_multiple=blocks,
        table_rank=tables,
        schemes=frozenset(source.schemes.values()),
    )


def _zeros_by_chance(source: HFCheckpoint) -> bool:
    """Whether weights are on a lattice, or were and have not been trained off it, and nothing has put zeros there."""
    is_rounded = are_put = False
    for record in lineage(source.directory):
        name = record.get("step")
        if name == "distillation" and "constraints" in record:
            held = {constraint["constraint"] for constraint in record["constraints"]}
            is_rounded, are_put = "QuantizationAwareTraining" in held, not held.isdisjoint(_KEEP_ZEROS)
        is_rounded |= name == "Quantization" or bool(record.get("quantizations"))
        are_put |= name == "Sparsification"
    return (is_rounded or bool(source.schemes)) and not are_put


def _in_dim(key: str, source: HFCheckpoint) -> int:
    """Inputs of a parameter; bytes of packed codes do not tell them, since the last one may not be full."""
    layer, _, part = key.rpartition(".")
    if part in ("u", "s"):
        return int(source.ranks[layer][0])
    form = Form(source.config)
    return form.shapes[layer.split(".", 2)[2]][1] if layer.startswith("layers.") else form.embed_dim


def tune_name(name: str, source: HFCheckpoint) -> str:
    """torchtune's name of a tensor in a checkpoint.

    Raises:
        ConfigError: a tensor that no Llama or Qwen2 has.
    """
    try:
        return to_tune(name)
    except KeyError as error:
        wanted = "the tensors of a Llama or Qwen2"
        raise ConfigError(Problem("checkpoint_dir", f"{name} in {source.directory}", wanted)) from error


def packed(key: str, quantized: Quantized) -> dict[str, Tensor]:
    """A quantized parameter as files have it."""
    scheme = quantized.scheme
    codes = pack(quantized.codes, scheme.bits, is_ternary=scheme.kind == "ternary")
    return {f"{key}.codes": codes.cpu(), f"{key}.scales": quantized.scales.cpu()}


def to_file(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by the names and in the order of rows of Hugging Face's files."""
    for key, tensor in state.items():
        yield to_hf(key), rows_to_hf(key, tensor, config)
