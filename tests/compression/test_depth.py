"""Block influence against a slow oracle; a pruned checkpoint computes what the original does without those blocks."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchtune import config as tune_config
from torchtune.training import FullModelHFCheckpointer

from kd_recipes.compression import (
    DepthPruning,
    HFCheckpoint,
    block_influence,
    choose_blocks,
    cross_entropy,
    read_checkpoint,
    sections,
)
from kd_recipes.compression.depth import keep_blocks, report
from kd_recipes.errors import ConfigError
from kd_recipes.models import checkpointer_model_type
from toy import calibration

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS_BS = torch.arange(60).reshape(3, 20) * 7 % 48
KEEP = (1, 3)


@pytest.fixture(params=["llama, tied", "llama, untied", "qwen2, tied"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model_type, tied = request.param.split(", ")
    return save_random_checkpoint(tmp_path / "source", model_type, tie_word_embeddings=tied == "tied")


def save_random_checkpoint(directory: Path, model_type: str = "llama", **settings: Any) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shard_size = settings.pop("max_shard_size", "1GB")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory, max_shard_size=shard_size)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "notes.md").write_text("not part of the checkpoint")
    return directory


def load_hf(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def load_in_torchtune(directory: Path) -> Any:
    hf_config = json.loads((directory / "config.json").read_text())
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=sorted(path.name for path in directory.glob("*.safetensors")),
        model_type=checkpointer_model_type(hf_config),
        output_dir=str(directory.parent / "unused"),
    )
    model = tune_config.instantiate(OmegaConf.load(directory / "model.yaml").model)
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.eval()


def write_sections(directory: Path) -> None:
    """model.yaml, as a compressed checkpoint has it."""
    OmegaConf.save(sections(directory), directory / "model.yaml")


def prune(source: Path, destination: Path, keep: tuple[int, ...], **settings: Any) -> HFCheckpoint:
    return keep_blocks(read_checkpoint(source), destination, keep, record={"step": "test"}, **settings)


def oracle_influence(model: Any, batches: list[tuple[torch.Tensor, torch.Tensor | None]]) -> np.ndarray:
    """From all hidden states in float64, token by token."""
    cosines: list[list[float]] = [[] for _ in model.layers]
    model.output_hidden_states = list(range(len(model.layers)))
    with torch.no_grad():
        for tokens_BS, valid_BS in batches:
            *hidden, _logits = model(tokens_BS)
            hidden.append(model.layers[-1](hidden[-1]))
            counted = range(tokens_BS.numel()) if valid_BS is None else valid_BS.flatten().nonzero().flatten().tolist()
            for block, (before, after) in enumerate(pairwise(state.flatten(0, 1).double().numpy() for state in hidden)):
                for i in counted:
                    norms = np.linalg.norm(before[i]) * np.linalg.norm(after[i])
                    cosines[block].append(float(before[i] @ after[i] / norms))
    model.output_hidden_states = []
    return 1 - np.array([np.mean(values) for values in cosines])


def test_influence_is_one_minus_the_mean_cosine_of_valid_tokens(source: Path) -> None:
    ragged_BS = torch.arange(20).expand(3, 20) < torch.tensor([[20], [3], [0]])
    batches = [(TOKENS_BS, ragged_BS), (TOKENS_BS[:1, :5], None)]
    write_sections(source)
    influence_L = block_influence(read_checkpoint(source), calibration(batches))
    assert influence_L.dtype == torch.float32
    np.testing.assert_allclose(influence_L.numpy(), oracle_influence(load_in_torchtune(source), batches), atol=2e-7)


def test_what_stands_in_masked_places_does_not_matter(source: Path) -> None:
    valid_BS = torch.arange(20).expand(3, 20) < 11
    padded_BS = torch.where(valid_BS, TOKENS_BS, 0)
    checkpoint = read_checkpoint(source)
    torch.testing.assert_close(
        block_influence(checkpoint, calibration([(padded_BS, valid_BS)])),
        block_influence(checkpoint, calibration([(TOKENS_BS[:, :11], None)])),
    )


def test_influence_of_nothing_or_of_damaged_weights_is_refused(tmp_path: Path) -> None:
    source = save_random_checkpoint(tmp_path / "source")
    checkpoint = read_checkpoint(source)
    for text in ([], [(TOKENS_BS, torch.zeros_like(TOKENS_BS, dtype=torch.bool))]):
        with pytest.raises(ConfigError, match="calibration text"):
            block_influence(checkpoint, calibration(text))
    model = load_hf(source)
    torch.nn.init.constant_(model.model.layers[2].mlp.up_proj.weight, float("nan"))
    model.save_pretrained(source)
    with pytest.raises(ConfigError, match="not finite"):
        block_influence(checkpoint, calibration([(TOKENS_BS, None)]))


def test_by_loss_the_block_that_is_missed_least_goes_first(tmp_path: Path) -> None:
    """A block without effect turns nothing; one whose absence the text likes is found by the loss alone."""
    source = read_checkpoint(save_random_checkpoint(tmp_path / "source"))
    text = calibration([(TOKENS_BS, None)])
    losses = {block: cross_entropy(source, text, [i for i in range(4) if i != block]) for block in range(4)}
    method = DepthPruning(num_blocks=3, protected=(), criterion="loss", shortlist=4)
    pruned = method.apply(source, tmp_path / "pruned", text)
    (record,) = json.loads((tmp_path / "pruned" / "compression.json").read_text())["steps"]
    assert set(range(4)) - set(record["kept_blocks"]) == {min(losses, key=losses.__getitem__)}
    assert cross_entropy(pruned, text) == pytest.approx(min(losses.values()), abs=1e-5)
    assert (record["step"], record["criterion"], record["num_blocks"]) == ("DepthPruning", "loss", 3)


def test_report_marks_what_goes() -> None:
    lines = report([1.0, 0.02, 0.04, 0.04], keep=(0, 2, 3)).splitlines()
    assert lines[1].endswith(">  kept")
    assert lines[2].split() == ["1", "0.0200", "####", "dropped"]
    assert report([0.0, 0.0], keep=(0, 1)).count("kept") == 2


@pytest.mark.parametrize(
    ("influence", "num_keep", "protected", "expected"),
    [
        ([0.1, 0.2, 0.4, 0.3, 0.1], 3, (0, -1), (0, 2, 4)),
        ([0.1, 0.2, 0.4, 0.3, 0.1], 3, (), (1, 2, 3)),
        ([0.5, 0.5, 0.5, 0.5, 0.5], 4, (0, -1), (0, 1, 2, 4)),
        ([0.1, 0.2, 0.4, 0.3, 0.1], 5, (0, -1), (0, 1, 2, 3, 4)),
        ([0.1, 0.2, 0.4, 0.3, 0.1], 2, (0, 4, -1), (0, 4)),
        ([0.1], 1, (0, -1), (0,)),
    ],
)
def test_the_most_influential_blocks_are_kept(
    influence: list[float], num_keep: int, protected: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert choose_blocks(influence, num_keep, protected=protected) == expected
    assert choose_blocks(torch.tensor(influence), num_keep, protected=protected) == expected


@pytest.mark.parametrize(
    ("num_keep", "protected", "message"),
    [
        (0, (0, -1), "from 1 to 4"),
        (5, (0, -1), "from 1 to 4"),
        (1, (0, -1), "at least 2, the protected"),
        (2, (7,), "indices of the model's 4 blocks"),
    ],
)
def test_numbers_of_blocks_that_cannot_be_kept(num_keep: int, protected: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_blocks([0.1, 0.2, 0.3, 0.4], num_keep, protected=protected)


@pytest.mark.parametrize("settings", [{"keep_ratio": 0.1}, {"num_blocks": 5}, {"num_blocks": 1}, {"keep_ratio": 0.25}])
def test_settings_that_do_not_suit_the_model(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="blocks to keep"):
        DepthPruning(**settings).num_keep(4)


@pytest.mark.parametrize(
    "settings", [{}, {"num_blocks": 2, "keep_ratio": 0.5}, {"num_blocks": 0}, {"keep_ratio": 0.0}, {"keep_ratio": 1.5}]
)
def test_settings_that_say_nothing_or_too_much(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"\.num_blocks|\.keep_ratio"):
        DepthPruning(**settings)


def test_a_ratio_is_rounded_to_whole_blocks() -> None:
    assert DepthPruning(keep_ratio=0.667).num_keep(30) == 20
    assert DepthPruning(num_blocks=20).num_keep(30) == 20


@pytest.mark.parametrize("max_file_bytes", [10**9, 20_000], ids=["one file", "several"])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_pruned_checkpoint_computes_what_the_model_without_the_blocks_does(
    tmp_path: Path, shard_size: str, max_file_bytes: int
) -> None:
    source = save_random_checkpoint(tmp_path / "source", max_shard_size=shard_size)
    pruned = prune(source, tmp_path / "pruned", KEEP, max_file_bytes=max_file_bytes)
    is_sharded = max_file_bytes == 20_000
    assert (len(pruned.shards) > 1) is is_sharded
    assert (tmp_path / "pruned" / "model.safetensors.index.json").exists() is is_sharded
    assert_same_function(source, tmp_path / "pruned")


def test_every_family_survives(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "pruned", KEEP)
    assert_same_function(source, tmp_path / "pruned")


@torch.no_grad()
def assert_same_function(source: Path, pruned: Path) -> None:
    """``pruned`` = the source with blocks removed in memory, in transformers and in torchtune; no difference at all."""
    expected = load_hf(source)
    expected.model.layers = torch.nn.ModuleList(expected.model.layers[index] for index in KEEP)
    expected.config.num_hidden_layers = expected.model.config.num_hidden_layers = len(KEEP)
    logits_BSV = expected(TOKENS_BS, use_cache=False).logits
    assert torch.equal(load_hf(pruned)(TOKENS_BS, use_cache=False).logits, logits_BSV)
    torch.testing.assert_close(load_in_torchtune(pruned)(TOKENS_BS), logits_BSV, atol=2e-5, rtol=1e-5)


def test_what_lies_beside_the_weights(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "pruned", KEEP)
    names = {path.name for path in (tmp_path / "pruned").iterdir()}
    companions = {"tokenizer.json", "generation_config.json"}
    assert names == {"model.safetensors", "config.json", "model.yaml", "compression.json", *companions}
    before, after = (json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "pruned"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"num_hidden_layers", "layer_types", "max_window_layers"}
    assert len(after.get("layer_types") or KEEP) == after["num_hidden_layers"] == len(KEEP)
    (record,) = json.loads((tmp_path / "pruned" / "compression.json").read_text())["steps"]
    assert record == {"step": "test"}


@pytest.mark.parametrize("keep", [(), (0, 4), (2, 0), (1, 1), (-1,)])
def test_blocks_that_are_not_there_are_refused(tmp_path: Path, keep: tuple[int, ...]) -> None:
    source = save_random_checkpoint(tmp_path / "source")
    with pytest.raises(ConfigError, match="ascending indices"):
        prune(source, tmp_path / "pruned", keep)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damaged_sources_are_refused(tmp_path: Path) -> None:
    source = save_random_checkpoint(tmp_path / "source", max_shard_size="20KB")
    shard = next(source.glob("model-00002-*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ConfigError, match="a whole safetensors file"):
        read_checkpoint(source)
    shard.unlink()
    with pytest.raises(ConfigError, match="without model-00002"):
        read_checkpoint(source)
    shard.write_bytes(content)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    with pytest.raises(ConfigError, match="for the 5 blocks"):
        read_checkpoint(source)
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match="a readable JSON file"):
        read_checkpoint(source)
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_checkpoint(tmp_path / "nowhere")
