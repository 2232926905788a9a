"""A model with factors is the same model in transformers, which gets the code for it beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kd_recipes.compression import LowRank, Quantization, read_checkpoint
from kd_recipes.exporting.factored import write_factored
from toy import calibration, load_sections, save_model, save_tokenizer

TEXT = calibration([(torch.arange(3, 67)[None], None)])
IDS = torch.tensor([[5, 9, 70, 33, 12, 8, 100]])


@pytest.mark.parametrize(
    ("model_type", "model", "step"),
    [
        ("llama", {}, {}),
        ("llama", {}, {"embedding_rank": 24, "three_factors": True}),
        ("qwen2", {"tie_word_embeddings": False}, {"embedding_rank": 24}),
    ],
)
def test_transformers_computes_what_torchtune_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, model: dict[str, Any], step: dict[str, Any]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_model(tmp_path / "dense", model_type, **model)
    save_tokenizer(tmp_path / "dense")
    decomposition = LowRank(ratio=0.5, whiten=False, multiple_of=4, **step)
    source = decomposition.apply(read_checkpoint(tmp_path / "dense"), tmp_path / "low_rank", TEXT)
    write_factored(source, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = theirs(IDS).logits - load_sections(source.directory)(IDS)
    assert difference.abs().max() < 2e-5
    assert theirs.num_parameters() == sum(t.numel() for t in load_file(tmp_path / "hf" / "model.safetensors").values())
    assert {"tokenizer.json", "modeling_factored.py"} <= {path.name for path in (tmp_path / "hf").iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_factors_on_a_lattice_become_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    save_model(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    low_rank = LowRank(ratio=0.9, whiten=False, multiple_of=16)
    factors = low_rank.apply(read_checkpoint(tmp_path / "dense"), tmp_path / "low_rank", TEXT)
    source = Quantization("int8_g16", None, method="round").apply(factors, tmp_path / "coded", TEXT)
    write_factored(source, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        difference = theirs(IDS).logits - load_sections(source.directory)(IDS)
    assert difference.abs().max() < 2e-5
