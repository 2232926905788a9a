"""A GGUF file becomes a Hugging Face directory: weights dequantized one at a time, config, tokenizer, chat template.

The GGUF is often the only copy of a model at hand (a laptop, a wheel, an air-gapped machine). transformers can read
one too, but dequantizes the whole model in memory and leaves nothing that torchtune's checkpointer loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from kd_recipes.compression.checkpoint import RECORD
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.gguf_format.names import ROPE_DIVISORS, hf_name, tensor_shapes
from kd_recipes.importing import gguf_config, gguf_tokenizer
from kd_recipes.storage import atomic_directory, require_free_space, require_vacant, write_json
from kd_recipes.tensor_files import TensorSpec, write_safetensors

# Everything beside the weights: the tokenizer of a vocabulary of 150,000 is about 16 MB in its three forms.
_TOKENIZER_BYTES = 64_000_000
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class GGUFModel:
    """An opened GGUF file; its tensors are still on disk.

    Args:
        metadata: the file's key-value pairs.
        tensors: GGUF name -> ``gguf.ReaderTensor``, memory-mapped.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Any]


def import_gguf(gguf_file: Path, output_dir: Path, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """Write the Hugging Face form of a GGUF file.

    Args:
        gguf_file: of architecture llama or qwen2, in any quantization that the ``gguf`` package dequantizes.
        output_dir: the directory to make; absent or empty.
        dtype: of the weights written.

    Returns:
        The config.json written.

    Raises:
        ConfigError: something is wrong with the arguments or the file; nothing has been written.

    Weights that were quantized are said to be so in ``compression.json``: their zeros are not those of a pruned model.
    """
    require_vacant(output_dir)
    model = open_gguf(gguf_file)
    config = _config(model, dtype)
    tokenizer = gguf_tokenizer.read_tokenizer(model.metadata)
    specs = [TensorSpec(name, dtype, shape) for name, shape in tensor_shapes(config).items()]
    num_bytes = sum(spec.num_bytes for spec in specs)
    require_free_space(output_dir, num_bytes + _TOKENIZER_BYTES, key="output_dir")
    with atomic_directory(output_dir) as directory:
        write_safetensors(directory / "model.safetensors", specs, _tensors(model, config, specs))
        write_json(directory / "config.json", config)
        if quantizations := _quantizations(model.tensors):
            record = {"step": "import_gguf", "quantizations": quantizations}
            write_json(directory / RECORD, {"steps": [record]})
        write_json(directory / "generation_config.json", _generation_config(model.metadata))
        gguf_tokenizer.write_tokenizer(directory, tokenizer)
    return config


def open_gguf(gguf_file: Path) -> GGUFModel:
    """Read a GGUF file's metadata and map its tensors.

    Raises:
        ConfigError: no such file, not GGUF, truncated, or the ``gguf`` package is not installed.
    """
    if not gguf_file.is_file():
        raise ConfigError(Problem("gguf_file", str(gguf_file), "a file that exists"))
    with gguf_file.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ConfigError(Problem("gguf_file", str(gguf_file), "a GGUF file (it does not begin with GGUF)"))
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ConfigError(Problem("gguf_file", str(gguf_file), "the gguf package", "pip install gguf")) from error
    try:
        reader = GGUFReader(gguf_file)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        wanted = f"a whole GGUF file ({error})"
        raise ConfigError(Problem("gguf_file", str(gguf_file), wanted, "Download it again.")) from error
    return GGUFModel(metadata, {tensor.name: tensor for tensor in reader.tensors})


def _config(model: GGUFModel, dtype: torch.dtype) -> dict[str, Any]:
    """config.json, after checking that the tensors are the ones it describes and can all be dequantized."""
    tensors = dict(model.tensors)
    if "token_embd.weight" not in tensors:
        raise ConfigError(Problem("gguf_file", "no tensor token_embd.weight", "a whole language model"))
    divisors = tensors.pop(ROPE_DIVISORS, None)
    config = gguf_config.hf_config(
        model.metadata,
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        is_tied="output.weight" not in tensors,
        dtype=str(dtype).removeprefix("torch."),
    )
    # GGUF gives the fastest-varying axis first, torch last
    shapes = {hf_name(name) or name: tuple(map(int, t.shape))[::-1] for name, t in tensors.items()}
    gguf_config.check_tensors(shapes, config)
    _check_quantizations(tensors)
    if divisors is not None and (scaling := gguf_config.llama3_rope_scaling(_dequantize(divisors), config)):
        config["rope_scaling"] = scaling
    return config


def _quantizations(tensors: Mapping[str, Any]) -> list[str]:
    """GGUF's names of the lattices that the blocks' weights are on."""
    kinds = {tensor.tensor_type.name for name, tensor in tensors.items() if name.startswith("blk.")}
    return sorted(kinds - _FLOATS)


def _check_quantizations(tensors: Mapping[str, Any]) -> None:
    """Dequantize one row of each kind: the package's own answer to what it supports."""
    import gguf

    one_of_each = {tensor.tensor_type: tensor for tensor in tensors.values()}
    problems = []
    for kind, tensor in one_of_each.items():
        try:
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            wanted = "a quantization that the gguf package dequantizes"
            problems.append(Problem("gguf_file", kind.name, wanted, "Take the F16 or Q8_0 file of this model."))
    if problems:
        raise ConfigError(*problems)


def _dequantize(tensor: Any) -> npt.NDArray[np.float32]:
    import gguf

    return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _tensors(model: GGUFModel, config: Mapping[str, Any], specs: Sequence[TensorSpec]) -> Iterator[torch.Tensor]:
    """The tensors in the order of ``specs``, each dequantized when it is asked for."""
    by_hf_name = {hf_name(name): tensor for name, tensor in model.tensors.items()}
    for spec in tqdm(specs, desc="Dequantizing", unit="tensor"):
        yield _convert(by_hf_name[spec.name], spec, config)


def _convert(stored: Any, spec: TensorSpec, config: Mapping[str, Any]) -> torch.Tensor:
    # A float32 tensor comes as a view of the file, which torch must not write to: require() copies that one alone.
    tensor = torch.from_numpy(np.require(_dequantize(stored), requirements=["C", "W"]))
    heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    key = heads.get(".".join(spec.name.split(".")[-2:]))
    if config["model_type"] == "llama" and key is not None:
        tensor = unpermute(tensor, config[key])
    tensor = tensor.to(spec.dtype)
    if not torch.isfinite(tensor).all():
        wanted = f"a dtype that holds the values of {spec.name}"
        raise ConfigError(Problem("dtype", str(spec.dtype), wanted, "Try bf16 or fp32; or the file is damaged."))
    return tensor


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of query and key rows.

    llama.cpp rotates neighbouring rows of a head (2i, 2i + 1), Hugging Face rows half a head apart (i, i + E/2).

    Args:
        weight: (num_heads * E, D) in llama.cpp's order.
        num_heads: query heads for a query weight, key-value heads for a key weight.

    Returns:
        (num_heads * E, D) in Hugging Face's order.
    """
    rows, hidden = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    ids: dict[str, Any] = dict(gguf_config.special_token_ids(metadata))
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    if end_of_turn is not None and "eos_token_id" in ids and int(end_of_turn) != ids["eos_token_id"]:
        ids["eos_token_id"] = [ids["eos_token_id"], int(end_of_turn)]
    return ids
