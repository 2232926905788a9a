"""Pruned widths: what is chosen, what is written, and what it computes."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as F
from torchtune import config as tune_config

from kd_recipes.compression import Form, Stream, WidthPruning, choose_width, read_checkpoint, width
from kd_recipes.errors import ConfigError
from kd_recipes.models import lora_decoder, model_section
from kd_recipes.parts import load_model
from toy import calibration, checkpointer_section, save_model

GENERATOR = torch.Generator().manual_seed(0)
BATCHES: list[tuple[Tensor, Tensor | None]] = [
    (torch.randint(320, (2, 64), generator=GENERATOR), None) for _ in range(8)
]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
TEXT = calibration(BATCHES)


def _load(directory: Path) -> Any:
    section = OmegaConf.create(model_section(json.loads((directory / "config.json").read_text())))
    checkpointer = OmegaConf.create({**checkpointer_section(directory), "output_dir": str(directory)})
    arguments: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    return load_model("model", section, checkpointer, **arguments).model.eval()


def _prune(source: Path, destination: Path, **settings: Any) -> Any:
    method, checkpoint = WidthPruning(multiple_of=8, **settings), read_checkpoint(source)
    return choose_width(checkpoint, TEXT, method), method.apply(checkpoint, destination, TEXT)


@pytest.fixture(params=["llama, tied", "llama, untied", "qwen2, tied"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model_type, tied = request.param.split(", ")
    save_model(tmp_path / "source", model_type, tie_word_embeddings=tied == "tied", num_key_value_heads=2)
    return tmp_path / "source"


def test_all_three_widths_give_a_model_that_everybody_loads(source: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, pruned = _prune(source, tmp_path / "pruned", intermediate_dim=0.5, num_kv_heads=1, embed_dim=48)
    config = pruned.config
    assert (config["intermediate_size"], config["num_key_value_heads"], config["hidden_size"]) == (48, 1, 48)
    assert (config["num_attention_heads"], config["head_dim"]) == (2, 16)
    theirs = AutoModelForCausalLM.from_pretrained(pruned.directory).eval()
    tokens_BS = BATCHES[0][0]
    with torch.no_grad():
        torch.testing.assert_close(_load(pruned.directory)(tokens_BS), theirs(tokens_BS).logits, atol=1e-4, rtol=1e-4)
    section = OmegaConf.load(pruned.directory / "model.yaml").model
    assert section._component_ == "kd_recipes.models.decoder"
    (step,) = json.loads((pruned.directory / "compression.json").read_text())["steps"]
    assert (step["step"], step["embed_dim"], len(step["kept_channels"])) == ("WidthPruning", 48, 48)
    again = _prune(pruned.directory, tmp_path / "again", intermediate_dim=40)[1]
    assert again.config["intermediate_size"] == 40
    assert len(json.loads((again.directory / "compression.json").read_text())["steps"]) == 2


@torch.no_grad()
def test_parts_that_add_nothing_go_and_nothing_changes(tmp_path: Path) -> None:
    """Neurons and a key-value head without effect, and channels that nobody writes or reads."""
    theirs = save_model(tmp_path / "source")
    neurons, channels = list(range(1, 96, 2)), list(range(0, 64, 4))
    for block in theirs.model.layers:
        block.mlp.down_proj.weight[:, neurons] = 0
        block.self_attn.o_proj.weight[:, :32] = 0
        for layer in (block.mlp.down_proj, block.self_attn.o_proj):
            layer.weight[channels] = 0
    theirs.model.embed_tokens.weight[:, channels] = 0
    theirs.save_pretrained(tmp_path / "source")
    kept, pruned = _prune(tmp_path / "source", tmp_path / "pruned", intermediate_dim=48, num_kv_heads=1)
    assert all(not set(neurons) & set(indices.tolist()) for indices in kept.neurons_LK)
    assert [indices.tolist() for indices in kept.groups_LK] == [[1], [1]]
    tokens_BS = BATCHES[0][0]
    expected = _load(tmp_path / "source")(tokens_BS)
    torch.testing.assert_close(_load(pruned.directory)(tokens_BS), expected, atol=1e-3, rtol=1e-3)
    kept, pruned = _prune(tmp_path / "source", tmp_path / "narrow", embed_dim=48)
    assert not set(channels) & set(kept.channels_K.tolist())
    torch.testing.assert_close(_load(pruned.directory)(tokens_BS), expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_importance_and_fit_against_their_definitions(tmp_path: Path) -> None:
    save_model(tmp_path / "source")
    model, checkpoint = _load(tmp_path / "source"), read_checkpoint(tmp_path / "source")
    moments_FF = [block.grams(["mlp.w2"])["mlp.w2"] for block in Stream(checkpoint, TEXT, "test")][1]
    inputs: list[Tensor] = []
    model.layers[1].mlp.w2.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].flatten(0, 1)))
    for tokens_BS, _ in BATCHES:
        model(tokens_BS)
    x_TF, weight_DF = torch.cat(inputs), model.layers[1].mlp.w2.weight
    torch.testing.assert_close(moments_FF, x_TF.T @ x_TF, rtol=1e-3, atol=1e-2)
    added_F = torch.stack([(x_TF[:, f : f + 1] * weight_DF[:, f]).square().sum() for f in range(96)])
    kept = choose_width(checkpoint, TEXT, WidthPruning(intermediate_dim=64))
    assert kept.neurons_LK[1].tolist() == sorted(added_F.argsort(descending=True)[:64].tolist())
    assert kept.fitted.keys() == {f"model.layers.{index}.mlp.down_proj.weight" for index in range(2)}
    fitted_DK, cut_K = kept.fitted["model.layers.1.mlp.down_proj.weight"], kept.neurons_LK[1]
    error = F.mse_loss(x_TF[:, cut_K] @ fitted_DK.T, x_TF @ weight_DF.T)
    best_DK = torch.linalg.lstsq(x_TF[:, cut_K], x_TF @ weight_DF.T).solution.T
    assert 0.95 * error < F.mse_loss(x_TF[:, cut_K] @ best_DK.T, x_TF @ weight_DF.T) <= error
    assert error < 0.9 * F.mse_loss(x_TF[:, cut_K] @ weight_DF[:, cut_K].T, x_TF @ weight_DF.T)
    plain = choose_width(checkpoint, TEXT, WidthPruning(intermediate_dim=64, refit=False)).fitted
    assert torch.equal(plain["model.layers.1.mlp.down_proj.weight"], weight_DF[:, cut_K])


def test_what_was_fitted_is_not_held_until_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three blocks, two projections of each: when one is fitted, those of the blocks before are not in memory."""
    save_model(tmp_path / "source", num_hidden_layers=3)
    fitted: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    refit = width._refit

    def watched(*args: Any) -> Tensor:
        gc.collect()
        alive.append(sum(reference() is not None for reference in fitted))
        new_DK = refit(*args)
        fitted.append(weakref.ref(new_DK))
        return new_DK

    monkeypatch.setattr(width, "_refit", watched)
    method = WidthPruning(intermediate_dim=48, num_kv_heads=1, multiple_of=8)
    method.apply(read_checkpoint(tmp_path / "source"), tmp_path / "made" / "pruned", TEXT)
    assert len(alive) == 6
    assert max(alive) <= 1  # the one before, which the loop's variable names
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["pruned"]


def test_adapters_fit_on_a_pruned_model(tmp_path: Path) -> None:
    save_model(tmp_path / "source", "qwen2")
    _, pruned = _prune(tmp_path / "source", tmp_path / "pruned", num_kv_heads=1, embed_dim=48)
    section = OmegaConf.to_container(OmegaConf.load(pruned.directory / "model.yaml"))["model"]  # type: ignore[index,call-overload]
    plain, arguments = _load(pruned.directory), {k: v for k, v in section.items() if k != "_component_"}
    adapters: dict[str, Any] = {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True}
    adapted = lora_decoder(**adapters, **arguments, lora_rank=4, lora_alpha=8.0)
    result = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert all("lora" in name for name in result.missing_keys)
    assert len(result.missing_keys) == 2 * 2 * 5
    torch.testing.assert_close(adapted(BATCHES[0][0]), plain(BATCHES[0][0]))
    with pytest.raises(ConfigError, match="quantize_base: got True"):
        lora_decoder(**adapters, **arguments, lora_rank=4, lora_alpha=8.0, quantize_base=True)
    with pytest.raises(ConfigError, match="num_kv_heads: got 3, wanted a divisor of num_heads=2"):
        tune_config.instantiate(OmegaConf.create({**section, "num_kv_heads": 3}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "at least one of intermediate_dim, num_kv_heads, embed_dim"),
        ({"intermediate_dim": -1}, ".intermediate_dim: got -1, wanted a size .from 1. or a share .below 1."),
        ({"embed_dim": 1.5}, ".embed_dim: got 1.5"),
        ({"intermediate_dim": 128}, ".intermediate_dim: got 128, wanted from 1 to 96"),
        ({"intermediate_dim": 50}, "in multiples of 32"),
        ({"embed_dim": 0.1}, ".embed_dim: got 0.1, wanted from 1 to 64"),
        ({"embed_dim": math.nan}, ".embed_dim: got nan"),
        ({"num_kv_heads": 3}, ".num_kv_heads: got 3, wanted from 1 to 2"),
        ({"embed_dim": 32, "multiple_of": 0}, ".multiple_of"),
    ],
)
def test_what_leaves_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WidthPruning(**settings).check(Form(SIZES))


def test_no_text(tmp_path: Path) -> None:
    save_model(tmp_path / "source")
    with pytest.raises(ConfigError, match="no token that counts"):
        choose_width(read_checkpoint(tmp_path / "source"), calibration([]), WidthPruning(embed_dim=32))
