"""ExecuTorch's programs answer as the model does that they were made of, in ExecuTorch's own runtime."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kd_recipes._torchtune.static import StaticDecoder
from kd_recipes.compression import LowRank, Quantization, read_checkpoint
from kd_recipes.compression.checkpoint import HFCheckpoint
from kd_recipes.errors import ConfigError
from kd_recipes.exporting.executorch import refuse, write_program
from kd_recipes.tokenizers import hf_tokenizer
from toy import calibration, load_sections, save_model, save_tokenizer

TEXT = calibration([(torch.arange(3, 67)[None], None)])
IDS = [5, 9, 70, 33, 12, 8, 100, 41]
needs_executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is not installed")


def checkpoint(directory: Path, model_type: str = "llama", **settings: Any) -> HFCheckpoint:
    save_model(directory, model_type, **settings)
    save_tokenizer(directory)
    return read_checkpoint(directory)


def on_lattice(source: HFCheckpoint, directory: Path, scheme: str, embeddings: str | None = None) -> HFCheckpoint:
    return Quantization(scheme, embeddings, method="round").apply(source, directory, TEXT)


def expected(source: HFCheckpoint) -> Tensor:
    """Logits ``[S, V]`` of torchtune's model."""
    with torch.no_grad():
        logits: Tensor = load_sections(source.directory)(torch.tensor([IDS]))[0]
    return logits


def attend(query: Tensor, new: tuple[Tensor, Tensor], cached: tuple[Tensor, Tensor], start: int) -> Tensor:
    """Attention in torch's own operations, ``[1, S, H, E]``."""
    end = start + query.shape[1]
    for part, whole in zip(new, cached, strict=True):
        whole[:, start:end] = part
    keys, values = (whole[:, :end].transpose(1, 2) for whole in cached)
    mask = torch.arange(end) <= torch.arange(start, end)[:, None]
    attended = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
    )
    return attended.transpose(1, 2)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "wide_heads", "factored_table"])
def test_a_decoder_of_fixed_size_computes_what_torchtunes_does(tmp_path: Path, kind: str) -> None:
    settings: dict[str, Any] = {"qwen2": {"tie_word_embeddings": False}, "wide_heads": {"head_dim": 24}}.get(kind, {})
    source = checkpoint(tmp_path / "model", "qwen2" if kind == "qwen2" else "llama", **settings)
    if kind == "factored_table":
        low_rank = LowRank(ratio=0.5, whiten=False, multiple_of=4, embedding_rank=24)
        source = low_rank.apply(source, tmp_path / "low_rank", TEXT)
    decoder = StaticDecoder(load_sections(source.directory), 16, attend)
    wanted = expected(source)
    with torch.no_grad():
        for first, last in ((0, 5), (5, 6), (6, 8), (0, 8)):  # the last begins anew
            found = decoder(torch.tensor([IDS[first:last]]), torch.tensor([first]))[0]
            assert (found - wanted[last - 1]).abs().max() < 2e-5


@needs_executorch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["rounded", "trained", "trained_table"])
def test_the_runtime_computes_what_torchtune_does(tmp_path: Path, kind: str) -> None:
    from kd_recipes.exporting.runtimes import ExecuTorch

    untied = {} if kind == "trained" else {"tie_word_embeddings": False}
    source = checkpoint(tmp_path / "model", "qwen2" if untied else "llama", num_hidden_layers=1, **untied)
    if kind == "trained":
        source = on_lattice(source, tmp_path / "coded", "8da4w_g32", "8da8w")
    if kind == "trained_table":  # a lattice that XNNPACK has not: numbers, or codes to look up
        source = on_lattice(source, tmp_path / "coded", "8da4w_g32", "gguf_q8_0")
    write_program(source, tmp_path / "model.pte", 32, is_quantized=True)
    program = ExecuTorch(tmp_path / "model.pte", 32, 1)
    difference = np.abs(program.logits(IDS) - expected(source).numpy()).max()
    if kind == "rounded":  # only now: another model, though a near one
        assert 1e-3 < difference < 3
    else:
        # a tied head that is codes has its inputs rounded, which training cannot have done
        assert difference < (0.2 if kind == "trained" else 2e-5)


@needs_executorch
@pytest.mark.filterwarnings("ignore")
def test_executorchs_llm_runner_takes_it(tmp_path: Path) -> None:
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner
    from executorch.runtime import Runtime

    from kd_recipes.exporting.runtimes import ExecuTorch

    source = checkpoint(tmp_path / "model", num_hidden_layers=1)
    tokenizer = hf_tokenizer(str(tmp_path / "model"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    for index in range(
        tokenizer.vocab_size
    ):  # so that it writes ASCII: the runner's binding takes whole characters only
        if not tokenizer.decode([index]).isascii() or index in tokenizer.special_tokens.values():
            weights["model.embed_tokens.weight"][index] = 0
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    write_program(source, tmp_path / "model.pte", 32, is_quantized=False)
    program = Runtime.get().load_program(tmp_path / "model.pte")
    wanted = {"get_max_seq_len": 32, "get_max_context_len": 32, "get_vocab_size": 320, "get_n_layers": 1}
    wanted |= {"use_kv_cache": True, "use_sdpa_with_kv_cache": True, "enable_dynamic_shape": True, "get_eos_ids": 0}
    for name, value in wanted.items():
        (found,) = program.load_method(name).execute([])
        assert found == value
    ours = ExecuTorch(tmp_path / "model.pte", 32, 1)
    assert np.abs(ours.logits(IDS) - expected(source).numpy()).max() < 2e-5
    runner = TextLLMRunner(str(tmp_path / "model.pte"), str(tmp_path / "model" / "tokenizer.json"))
    pieces: list[str] = []
    runner.generate("the cat sat", GenerationConfig(echo=False, max_new_tokens=6, temperature=0.0), pieces.append)
    continuation = ours.greedy(tokenizer.encode("the cat sat", add_eos=False))
    assert "".join(pieces) == tokenizer.decode([next(continuation) for _ in range(6)])


def test_what_xnnpack_has_not_is_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    refuse(source)
    refuse(on_lattice(source, tmp_path / "eight", "8da4w_g32"))
    with pytest.raises(ConfigError, match=r"weights in gguf_q4_0', wanted no second rounding.*executorch_fp32"):
        refuse(on_lattice(source, tmp_path / "four", "gguf_q4_0"))
    factors = LowRank(ratio=0.5, whiten=False, multiple_of=4).apply(source, tmp_path / "low_rank", TEXT)
    with pytest.raises(ConfigError, match=r"products of factors', wanted matrices. Multiply its factors first"):
        refuse(factors)
    odd = checkpoint(tmp_path / "odd", intermediate_size=100)
    with pytest.raises(ConfigError, match=r"of mlp\.w2 with 100 inputs', wanted inputs that 32 divides"):
        refuse(odd)
