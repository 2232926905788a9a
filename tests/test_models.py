"""Built from its config.json and loaded by torchtune's checkpointer, a model computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer

from kd_recipes import models
from kd_recipes.errors import ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,  # far from every default, so that a lost one shows
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {**SIZES, "model_type": "llama", "rope_theta": 10_000.0}


def save_random_checkpoint(directory: Path, model_type: str, **settings: Any) -> Any:
    """A small random checkpoint written by transformers; biases and norms are random too. Returns the model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory)
    return model.eval()


def load_in_torchtune(directory: Path, output_dir: Path) -> torch.nn.Module:
    hf_config = json.loads((directory / "config.json").read_text())
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=["model.safetensors"],
        model_type=models.checkpointer_model_type(hf_config),
        output_dir=str(output_dir),
    )
    model: torch.nn.Module = tune_config.instantiate(OmegaConf.create(models.model_section(hf_config)))
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.eval()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    ("model_type", "rope", "component"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5_000.0}, "kd_recipes.models.llama"),
        ("llama", LLAMA3_ROPE, "torchtune.models.llama3_2.llama3_2"),
        ("qwen2", {"rope_type": "default", "rope_theta": 5_000.0}, "torchtune.models.qwen2.qwen2"),
        ("llama", {"rope_type": "default", "rope_theta": 5_000.0, "head_dim": 12}, "kd_recipes.models.decoder"),
        ("llama", {**LLAMA3_ROPE, "head_dim": 4}, "kd_recipes.models.decoder"),
        ("qwen2", {"rope_type": "default", "rope_theta": 5_000.0, "head_dim": 12}, "kd_recipes.models.decoder"),
    ],
)
def test_logits_equal_transformers(
    tmp_path: Path, model_type: str, rope: dict[str, Any], component: str, is_tied: bool
) -> None:
    widths = {name: value for name, value in rope.items() if name == "head_dim"}
    settings = {"rope_parameters": {name: value for name, value in rope.items() if name not in widths}, **widths}
    theirs = save_random_checkpoint(tmp_path / "hf", model_type, **settings, tie_word_embeddings=is_tied)
    section = models.model_section(json.loads((tmp_path / "hf" / "config.json").read_text()))
    assert section["_component_"] == component
    ours = load_in_torchtune(tmp_path / "hf", tmp_path / "out")
    tokens = torch.randint(SIZES["vocab_size"], (2, 64))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_fresh_adapters_change_nothing() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
    sizes |= {"max_seq_len": 32, "intermediate_dim": 40, "rope_base": 5_000, "norm_eps": 1e-3}
    plain = models.llama(**sizes)
    adapted = models.lora_llama(["q_proj", "v_proj"], True, **sizes, lora_rank=4, lora_alpha=8.0)
    result = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert result.missing_keys
    assert all("lora" in name for name in result.missing_keys)
    tokens = torch.randint(48, (2, 32))
    torch.testing.assert_close(adapted(tokens), plain(tokens))


def test_adapters_on_the_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="apply_lora_to_output"):
        models.lora_llama(
            ["q_proj"],
            apply_lora_to_output=True,
            vocab_size=48,
            num_layers=1,
            num_heads=4,
            num_kv_heads=2,
            embed_dim=32,
            max_seq_len=32,
            lora_rank=4,
            lora_alpha=8.0,
        )


def test_section_reads_the_form_of_transformers_4() -> None:
    old = {**PLAIN, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}}
    new = {**SIZES, "model_type": "llama", "rope_parameters": LLAMA3_ROPE}
    assert models.model_section(old) == models.model_section(new)
    assert models.model_section(old)["scale_factor"] == 8
    assert models.model_section({**PLAIN, "rope_scaling": None})["rope_base"] == 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, "model_type.*llama or qwen2"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type.*yarn"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 2.0}}, "high_freq_factor"),
        ({"model_type": "qwen2", "rope_scaling": LLAMA3_ROPE}, "rope_type"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_what_torchtune_cannot_build_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.model_section({**PLAIN, **change})


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        models.model_section({**PLAIN, "hidden_act": "gelu", "mlp_bias": True, "rope_scaling": {"rope_type": "linear"}})
    assert len(caught.value.problems) == 3


def test_unknown_model_has_no_checkpointer() -> None:
    with pytest.raises(ConfigError, match="llama, qwen2"):
        models.checkpointer_model_type({"model_type": "gemma"})
