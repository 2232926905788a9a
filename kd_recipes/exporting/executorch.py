"""A student as ExecuTorch's program (.pte) for XNNPACK, with a key-value cache and what ExecuTorch's LLM runner asks.

``forward(tokens [1, S], input_pos [1]) -> logits [1, V]`` and constant methods named as in ExecuTorch's
extension/llm/runner/constants.h. It needs the kernels that ExecuTorch's own Llamas need: XNNPACK, its custom attention
(EXECUTORCH_BUILD_KERNELS_LLM), and for 8da4w the quantized embedding (EXECUTORCH_BUILD_KERNELS_QUANTIZED).
"""

# S positions, V vocabulary rows, D hidden, G groups of a row

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_recipes._torchtune.static import StaticDecoder
from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.compression.convert import quantized_weights
from kd_recipes.compression.form import Form
from kd_recipes.compression.torchao_tensors import as_torchao, to_torchao
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.exporting.graphs import load_student
from kd_recipes.lattices import Quantized, Scheme, quantize
from kd_recipes.storage import atomic_file
from kd_recipes.tokenizers import hf_tokenizer

BLOCKS, TABLES = Scheme.parse("8da4w_g32"), Scheme.parse("8da8w")  # of a student that has been trained on no lattice
_TABLE = "tok_embeddings.weight"  # which a tied head has, too


def write_program(source: HFCheckpoint, file: Path, max_seq_len: int, *, is_quantized: bool) -> None:
    """Write the program, whole or not at all.

    Args:
        source: the checkpoint.
        file: to write.
        max_seq_len: positions of the cache, which is float32.
        is_quantized: whether linear layers hold codes, their inputs rounded to 8 bits: the checkpoint's own codes
            where it has some, and else :data:`BLOCKS`, with the embedding and the head on :data:`TABLES`.

    Raises:
        ConfigError: the checkpoint has no such form.
    """
    if is_quantized:
        refuse(source)
    with _quiet():
        program = _lowered(source, max_seq_len, is_quantized)
        with atomic_file(file) as unfinished, unfinished.open("wb") as opened:
            program.write_to_file(opened)


def refuse(source: HFCheckpoint) -> None:
    """Raise a ConfigError where a checkpoint's matrices cannot be codes in XNNPACK; only headers are looked at."""
    problems = []
    if source.ranks:
        remedy = "Multiply its factors first (configs/to_dense.yaml), or export executorch_fp32"
        got = f"executorch_8da4w of {len(source.ranks)} products of factors"
        problems.append(Problem("formats", got, "matrices", remedy))
    blocks = {name for key, name in source.schemes.items() if key.startswith("layers.")}
    for name in sorted(name for name in blocks if not _in_xnnpack(Scheme.parse(name))):
        remedy = "Distil it in 8da4w_g32, or export executorch_fp32, which holds the same numbers in more bytes"
        problems.append(Problem("formats", f"executorch_8da4w of weights in {name}", "no second rounding", remedy))
    form = Form(source.config)
    odd = [f"{name} with {shape[1]}" for name, shape in form.shapes.items() if shape[1] % 32]
    if odd and not source.schemes:
        problems.append(Problem("formats", f"executorch_8da4w of {odd[0]} inputs", "inputs that 32 divides"))
    if problems:
        raise ConfigError(*problems)


def _in_xnnpack(scheme: Scheme) -> bool:
    return scheme.dynamic_activations and (scheme.bits == 8 or (scheme.group_size or 0) % 32 == 0)


def _lowered(source: HFCheckpoint, max_seq_len: int, is_quantized: bool) -> Any:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    edge = to_edge_transform_and_lower(
        _traced(source, max_seq_len, is_quantized),
        partitioner=[XnnpackPartitioner()],
        constant_methods=_metadata(source, max_seq_len),
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    return edge.to_executorch(
        ExecutorchBackendConfig(
            extract_delegate_segments=True,
            memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
            sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
        )
    )


def _traced(source: HFCheckpoint, max_seq_len: int, is_quantized: bool) -> torch.export.ExportedProgram:
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  registers torch.ops.llama
    from executorch.kernels import quantized  # noqa: F401  registers its embeddings

    model = load_student(source)
    if is_quantized and source.schemes:
        to_torchao(model, source.directory, takes=_in_xnnpack)
    decoder = StaticDecoder(model, max_seq_len, _attend).eval()
    if is_quantized:
        _round(decoder, source)
    length = torch.export.Dim("length", min=1, max=max_seq_len)
    example = (torch.zeros(1, min(8, max_seq_len), dtype=torch.long), torch.zeros(1, dtype=torch.long))
    shapes = {"tokens": {1: length}, "input_pos": None}
    with torch.no_grad():
        return torch.export.export(decoder, example, dynamic_shapes=shapes, strict=False)


def _attend(query: Tensor, new: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], start: int) -> Tensor:
    for part, whole in zip(new, cached, strict=True):
        torch.ops.llama.update_cache(part, whole, start)
    attended: Tensor = torch.ops.llama.custom_sdpa(query, *cached, start, None, 0.0, True)
    return attended


def _round(decoder: StaticDecoder, source: HFCheckpoint) -> None:
    """Codes in the place of what :func:`to_torchao` leaves alone, or has not been asked for."""
    table, head = decoder.tok_embeddings, _linear(decoder.output)
    is_tied = head is not None and head.weight is table.weight
    if not source.schemes:
        for layer in filter(None, map(_linear, decoder.layers.modules())):
            _set_codes(layer, quantize(layer.weight, BLOCKS))
        codes: Quantized | None = quantize(table.weight, TABLES)
        if head is not None and not is_tied:
            _set_codes(head, quantize(head.weight, TABLES))
    else:
        codes = next((found for key, found in quantized_weights(source) if key == _TABLE), None)
    if codes is None or codes.scheme.bits != 8 or codes.scheme.kind != "int":
        return  # numbers that lie on their lattice
    if head is not None and is_tied and _in_xnnpack(codes.scheme):
        _set_codes(head, codes)
    decoder.tok_embeddings = _Embedding(codes)


def _linear(module: nn.Module) -> nn.Linear | None:
    return module if isinstance(module, nn.Linear) else None


def _set_codes(layer: nn.Linear, codes: Quantized) -> None:
    layer.weight = nn.Parameter(as_torchao(codes, torch.float32), requires_grad=False)


class _Embedding(nn.Module):
    """Rows of 8-bit codes, looked up by ExecuTorch's own operator."""

    def __init__(self, codes: Quantized) -> None:
        super().__init__()
        self.register_buffer("codes_VD", codes.codes)
        self.register_buffer("scales_VG", codes.scales.float())

    def forward(self, ids: Tensor) -> Tensor:
        """``[..., D]``, in float32."""
        settings: tuple[Any, ...] = (None, -128, 127)  # no zero points
        found: Tensor = torch.ops.quantized_decomposed.embedding_byte(self.codes_VD, self.scales_VG, *settings, ids)
        return found


def _metadata(source: HFCheckpoint, max_seq_len: int) -> dict[str, Any]:
    tokenizer = hf_tokenizer(str(source.directory))
    found: dict[str, Any] = {
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": max_seq_len,
        "get_vocab_size": int(source.config["vocab_size"]),
        "get_n_layers": source.num_layers,
        "get_eos_ids": list(tokenizer.stop_tokens),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    return found if tokenizer.bos_id is None else {**found, "get_bos_id": tokenizer.bos_id}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that ExecuTorch's passes and torch's exporter have for each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
