"""A checkpoint as one GGUF file, a tensor in memory at a time; codes on a lattice that GGUF has go in as they are."""

# O outputs, I inputs

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from kd_recipes._torchtune.names import rows_to_tune, to_hf
from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.compression.convert import as_tune, has_place, quantized_weights, tune_name
from kd_recipes.errors import ConfigError, Problem, RunError
from kd_recipes.exporting.gguf_tokenizer import tokenizer_metadata
from kd_recipes.gguf_format.blocks import Bytes, dequantize_q1_0, ggml_type, lay_out
from kd_recipes.gguf_format.names import ROPE_DIVISORS, gguf_name, llama3_divisors, tensor_shapes
from kd_recipes.lattices import Quantized, Scheme
from kd_recipes.models import rope_settings
from kd_recipes.storage import atomic_file, require_free_space

# What matrices are stored as; `trained` is what they are: codes on their own lattice, numbers in their own dtype.
KINDS = ("trained", "f32", "f16", "bf16", "q8_0", "q4_0")
_OF_DTYPE = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Lattices of at most so many bits keep their points in a type's blocks: half a step of Q8_0 is about an eighth of a
# lattice's step at 6 bits and a thirtieth at 4, so each weight stays nearest to what was trained. In Q4_0 it need not.
_BITS_KEPT = {"Q8_0": 6}
_METADATA_BYTES = 32_000_000  # of a vocabulary of 150,000 and its merges, generously


@dataclass(frozen=True)
class _Stored:
    """A tensor of the file: its key in torchtune's model, its shape ``[O, I]`` or ``[O]``, and GGML's type."""

    key: str
    shape: tuple[int, ...]
    type: str


def write_gguf(source: HFCheckpoint, file: Path, kind: str = "trained") -> None:
    """Write a Llama's or Qwen2's GGUF file, whole and as it was trained (:func:`verify_gguf`), or not at all.

    Vectors are float32, as llama.cpp wants them; where ``kind`` has blocks that do not divide a matrix's inputs, that
    matrix is F16; beside 4-bit blocks the embedding has 8-bit ones.

    Args:
        source: the checkpoint; of its weights one is in memory at a time.
        file: to write.
        kind: one of :data:`KINDS`.

    Raises:
        ConfigError: the checkpoint has no such form: factors, a lattice that GGUF has not, a second rounding, or a
            tokenizer that llama.cpp has not.
        RunError: the file does not hold what was trained.
    """
    import gguf

    refuse(source, kind)
    config = _complete(source.config)
    plan = _plan(source, config, kind)
    arch = _architecture(config)
    tokenizer = tokenizer_metadata(source.directory, config["vocab_size"])
    sizes = {name: _num_bytes(stored) for name, stored in plan.items()}
    require_free_space(file, sum(sizes.values()) + _METADATA_BYTES, key="output_dir")
    with atomic_file(file) as unfinished:
        writer = gguf.GGUFWriter(unfinished, arch)
        for key, value in {**_metadata(source, config, arch, kind), **tokenizer}.items():
            _add(writer, key, value)
        divisors = _divisors(config)
        if divisors is not None:
            writer.add_tensor_info(ROPE_DIVISORS, divisors.shape, divisors.dtype, divisors.nbytes)
        for name, stored in plan.items():
            type_ = gguf.GGMLQuantizationType[stored.type]
            writer.add_tensor_info(name, stored.shape, np.dtype(np.float32), sizes[name], raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        values = _values(source, config, plan)
        for value in tqdm(values, desc=file.name, total=len(plan), unit="tensor", leave=False):
            writer.write_tensor_data(value)
        writer.close()
        verify_gguf(source, unfinished)


def verify_gguf(source: HFCheckpoint, file: Path) -> int:
    """Read a file's lattices with the gguf package, and compare them with what was trained.

    Returns:
        How many matrices are the trained ones, bit for bit; 0 for a file that holds no codes of the checkpoint.

    Raises:
        RunError: one differs.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    num_equal = 0
    for key, quantized in quantized_weights(source):
        stored = found[str(gguf_name(to_hf(key)))]
        if stored.tensor_type.name != ggml_type(quantized.scheme):
            continue
        wanted = _reordered(key, quantized.dequantize(), _complete(source.config)).numpy()
        is_read = stored.tensor_type.name != "Q1_0"
        read = gguf.dequantize(stored.data, stored.tensor_type) if is_read else dequantize_q1_0(stored.data)
        if not np.array_equal(read.view(np.int32), wanted.view(np.int32)):
            remedy = "Export it again; if that changes nothing, it is a bug of kd_recipes"
            raise RunError(f"{file}: {stored.name} is not what was trained. {remedy}")
        num_equal += 1
    return num_equal


def refuse(source: HFCheckpoint, kind: str) -> None:
    """Raise a ConfigError where a checkpoint has no GGUF of that kind; only headers are looked at.

    Args:
        source: the checkpoint.
        kind: one of :data:`KINDS`, or one of llama.cpp's own, whose blocks are nobody's lattice.
    """
    problems = []
    if source.ranks:
        remedy = "Multiply its factors first (configs/to_dense.yaml), or export it as torch_export"
        problems.append(Problem("formats", f"gguf of {len(source.ranks)} products of factors", "matrices", remedy))
    schemes = [Scheme.parse(name) for name in sorted(set(source.schemes.values()))]
    if kind == "trained":
        for scheme in (scheme for scheme in schemes if ggml_type(scheme) is None):
            remedy = "Distil it on one of these, or export gguf_f32, which holds the same numbers in more bytes"
            lattices = "a lattice that GGUF has: gguf_q8_0, gguf_q4_0, ternary_g256, binary_g128"
            problems.append(Problem("formats", f"gguf_trained of weights in {scheme.name}", lattices, remedy))
    elif not source.ranks:
        remedy = _formats_that_keep(schemes)
        for name in _rounded_again(source, kind):
            problems.append(Problem("formats", f"gguf_{kind} of weights in {name}", "no second rounding", remedy))
    if problems:
        raise ConfigError(*problems)


def _rounded_again(source: HFCheckpoint, kind: str) -> list[str]:
    """The lattices that the blocks of a kind would move weights off."""
    shapes, found = tensor_shapes(_complete(source.config)), set()
    for spec in source.specs:
        if spec.name.endswith(".codes"):
            name = spec.name.removesuffix(".codes")
            scheme = Scheme.parse(source.schemes[tune_name(name, source)])
            type_ = _type_of_codes(name, shapes[name], scheme, kind)
            is_number = type_ in _OF_DTYPE.values()
            if not is_number and type_ != ggml_type(scheme) and scheme.bits > _BITS_KEPT.get(type_, 0):
                found.add(scheme.name)
    return sorted(found)


def _formats_that_keep(schemes: Sequence[Scheme]) -> str:
    """A remedy: what to export instead."""
    numbers = "gguf_f16, gguf_f32 and hf hold the same numbers in more bytes"
    if all(map(ggml_type, schemes)):
        return f"gguf_trained holds the codes themselves; {numbers}"
    if any(scheme.dynamic_activations for scheme in schemes):
        return f"executorch_8da4w holds the codes themselves; {numbers}"
    return numbers


def _complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what it leaves to defaults."""
    heads = int(config["num_attention_heads"])
    return {
        **config,
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _architecture(config: Mapping[str, Any]) -> str:
    """llama.cpp reads a Qwen2 whose heads are not as wide as it expects as a Llama with biases alone."""
    is_pruned = config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]
    return "llama" if config["model_type"] == "qwen2" and is_pruned else str(config["model_type"])


def _plan(source: HFCheckpoint, config: Mapping[str, Any], kind: str) -> dict[str, _Stored]:
    """GGUF's names of all tensors, in the order in which they are written: plain ones, then codes."""
    shapes = tensor_shapes(config)
    specs = {spec.name: spec for spec in source.specs if has_place(spec.name, source)}
    plain = {name: spec for name, spec in specs.items() if not name.endswith((".codes", ".scales"))}
    plan = {}
    for name, spec in plain.items():
        type_ = _type(name, spec.shape, spec.dtype, kind)
        plan[str(gguf_name(name))] = _Stored(tune_name(name, source), spec.shape, type_)
    for spec in specs.values():
        if spec.name.endswith(".codes"):
            name = spec.name.removesuffix(".codes")
            key = tune_name(name, source)
            type_ = _type_of_codes(name, shapes[name], Scheme.parse(source.schemes[key]), kind)
            plan[str(gguf_name(name))] = _Stored(key, shapes[name], type_)
    if missing := [name for name in shapes if gguf_name(name) not in plan]:
        raise ConfigError(Problem("checkpoint_dir", f"no {missing[0]} in {source.directory}", "a whole model"))
    return plan


def _type_of_codes(name: str, shape: tuple[int, ...], scheme: Scheme, kind: str) -> str:
    own = ggml_type(scheme)
    return own if own and kind in ("trained", own.lower()) else _type(name, shape, torch.float32, kind)


def _type(name: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> str:
    if len(shape) == 1:
        return "F32"
    if kind == "trained":
        return _OF_DTYPE[dtype]
    if kind in ("q8_0", "q4_0") and shape[1] % 32:
        return "F16"
    is_table = "embed_tokens" in name or name.startswith("lm_head")
    return "Q8_0" if kind == "q4_0" and is_table else kind.upper()


def _num_bytes(stored: _Stored) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[stored.type]]
    return int(np.prod(stored.shape)) // block * num_bytes


def _values(source: HFCheckpoint, config: Mapping[str, Any], plan: Mapping[str, _Stored]) -> Iterator[Any]:
    """The data of the tensors, in the order of the plan."""
    for stored in plan.values():
        if stored.key not in source.schemes:
            (tensor,) = as_tune(source, [to_hf(stored.key)]).values()
            yield _encode(_reordered(stored.key, tensor, config), stored.type)
    for key, quantized in quantized_weights(source):
        stored = plan[str(gguf_name(to_hf(key)))]
        if stored.type == ggml_type(quantized.scheme):
            codes_OI, scales_OG = (_reordered(key, part, config) for part in (quantized.codes, quantized.scales))
            yield lay_out(Quantized(codes_OI, scales_OG, quantized.scheme))
        else:
            yield _encode(_reordered(key, quantized.dequantize(), config), stored.type)


def _reordered(key: str, tensor: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Rows as llama.cpp rotates them, which is torchtune's order but where a Qwen2 is written as a Llama."""
    if _architecture(config) == config["model_type"]:
        return tensor
    return rows_to_tune(key, tensor, {**config, "model_type": "llama"}).contiguous()


def _encode(tensor: Tensor, type_: str) -> Bytes | npt.NDArray[Any]:
    import gguf

    values = tensor.to(torch.float32).contiguous().numpy()
    if type_ == "BF16":  # exact, where the package's own rounding need not be torch's
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    if type_ in ("F32", "F16"):
        return values.astype(np.float32 if type_ == "F32" else np.float16)
    data: Bytes = gguf.quantize(values, gguf.GGMLQuantizationType[type_])
    return data


def _divisors(config: Mapping[str, Any]) -> npt.NDArray[np.float32] | None:
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    return llama3_divisors(rope["factor"], rope["rope_theta"], config["head_dim"])


def _metadata(source: HFCheckpoint, config: Mapping[str, Any], arch: str, kind: str) -> dict[str, Any]:
    rope = rope_settings(config)
    of_arch = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    name = os.path.basename(os.path.abspath(source.directory))
    general = {"general.type": "model", "general.name": name, "general.file_type": _file_type(source, kind)}
    return {**general, **{f"{arch}.{key}": value for key, value in of_arch.items()}}


def _file_type(source: HFCheckpoint, kind: str) -> int:
    """llama.cpp's number for what most matrices are, which it shows and does not rely on."""
    from gguf import LlamaFileType

    names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    if kind == "trained":
        blocks = [ggml_type(Scheme.parse(name)) for key, name in source.schemes.items() if key.startswith("layers.")]
        kind = str(blocks[0]).lower() if blocks else _OF_DTYPE[source.specs[0].dtype].lower()
    number = LlamaFileType.__members__.get(names.get(kind, f"MOSTLY_{kind.upper()}"), LlamaFileType.GUESSED)
    return int(number)


def _add(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)
