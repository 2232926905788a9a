"""The compress recipe as a user runs it, on a small random model with a real tokenizer and real text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers

from kd_recipes import compress, entry
from kd_recipes.config import load_and_validate

TUNE = Path(sys.executable).with_name("tune")
TEXT = "It was a bright cold day in April, and the clocks were striking thirteen."


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 128}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True))
    for block, scale in zip(model.model.layers, (1.0, 0.001, 0.3, 0.5), strict=True):  # block 1 does almost nothing
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=scale)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, "<eos>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return directory


@pytest.fixture
def config(teacher: Path, tmp_path: Path) -> Path:
    """A config of a run in ``tmp_path``, made from the shipped one."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{i} {TEXT}"}) + "\n" for i in range(8)))
    cfg = OmegaConf.load(Path(__file__).parents[2] / "configs" / "prune_depth.yaml")
    cfg.model.update(vocab_size=257, num_layers=4, num_heads=4, num_kv_heads=2, embed_dim=32)
    cfg.model.update(intermediate_dim=48, max_seq_len=128, rope_base=10_000, norm_eps=1e-6)
    cfg.checkpointer.checkpoint_dir = cfg.tokenizer.path = str(teacher)
    cfg.tokenizer.max_seq_len = 128
    cfg.dataset.update(data_files=str(tmp_path / "text.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    cfg.update(num_calibration_tokens=300, sequence_length=64, output_dir=str(tmp_path / "pruned"), dtype="fp32")
    cfg.method.num_blocks = 3
    OmegaConf.save(cfg, tmp_path / "config.yaml")
    return tmp_path / "config.yaml"


def tune_run(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [str(TUNE), "run", "kd_recipes/compress", "--config", str(config), *overrides]
    env = {**os.environ, "HF_HOME": str(config.parent / "hf")}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_tune_run_writes_a_smaller_model_that_loads(config: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = tune_run(config)
    assert result.returncode == 0, result.stderr
    dropped = [line for line in result.stdout.splitlines() if line.endswith("dropped")]
    assert [line.split()[0] for line in dropped] == ["1"]
    assert "Blocks:     4 -> 3" in result.stdout
    pruned = config.parent / "pruned"
    assert AutoModelForCausalLM.from_pretrained(pruned).config.num_hidden_layers == 3
    record = json.loads((pruned / "pruning.json").read_text())["steps"][-1]
    assert record["kept_blocks"] == [0, 2, 3]
    assert record["num_calibration_tokens"] == 300
    assert record["block_influence"][1] == min(record["block_influence"])
    assert (pruned / "tokenizer_config.json").is_file()
    section = OmegaConf.load(pruned / "model.yaml")
    assert OmegaConf.to_yaml(section) in result.stdout
    assert section.model == {**OmegaConf.load(config).model, "num_layers": 3, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~method.num_blocks", "method.keep_ratio=0.1"], "method: got '0 blocks to keep', wanted from 1 to 4"),
        (["method.num_blocks=5"], "method: got '5 blocks to keep', wanted from 1 to 4"),
        (["method.num_blocks=1"], "the protected blocks [0, 3]"),
        (["method.keep_ratio=0.5"], "exactly one of num_blocks and keep_ratio"),
        (["~method.num_blocks"], "exactly one of num_blocks and keep_ratio"),
        (["method._component_=torch.nn.Identity"], "wanted kd_recipes.compression.DepthPruning or WidthPruning"),
        (["dataset.split=train[:0]"], "dataset: "),
        (["dataset.data_files=nowhere.jsonl"], "dataset: "),
        (["sequence_length=129"], "at most 128, the model's max_seq_len"),
        (["model.num_layers=3"], "wanted the model that the checkpoint holds"),
        (["model.vocab_size=200"], "ids below 200"),
        (["model.num_heads=5"], "a model that can be built"),
        (["checkpointer.checkpoint_dir=nowhere"], "nowhere/config.json"),
        (["checkpointer.checkpoint_files=[other.safetensors]"], "a checkpoint that can be read"),
        (["device=abacus"], "device: got 'abacus'"),
        (["tokenizer.path=nowhere"], "tokenizer.path: got 'nowhere'"),
    ],
)
def test_bad_input_is_explained_and_nothing_written(
    config: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run_recipe("compress", ["--config", str(config), *overrides]) == entry.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (config.parent / "pruned").exists()
    assert not list(config.parent.glob(".pruned*"))


def test_an_occupied_directory_is_left_alone(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = config.parent / "pruned" / "result.txt"
    result.parent.mkdir()
    result.write_text("precious")
    argv = ["--config", str(config), "method.num_blocks=null", "device=abacus"]
    assert entry.run_recipe("compress", argv) == entry.EXIT_BAD_INPUT
    errors = capsys.readouterr().err
    assert all(f"  - {key}: got" in errors for key in ("output_dir", "device", "method"))  # all of them at once
    assert [path.name for path in result.parent.iterdir()] == ["result.txt"]


class Samples(list[dict[str, Any]]):
    """What of a data set is used: indexing and length."""


def test_calibration_windows_are_cut_from_single_samples() -> None:
    samples = Samples({"tokens": [i] * 5, "labels": [-100, i, i, i, i]} for i in range(4))
    windows = compress.calibration_windows(samples, num_tokens=12, sequence_length=3, seed=0)
    assert [tuple(tokens.shape) for tokens, _ in windows] == [(1, 3), (1, 2), (1, 3), (1, 2), (1, 2)]
    assert all(tokens.unique().numel() == 1 for tokens, _ in windows)
    assert [int(valid.sum()) for _, valid in windows] == [2, 2, 2, 2, 1]
    again = compress.calibration_windows(samples, num_tokens=12, sequence_length=3, seed=0)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(windows, again, strict=True))
    everything = compress.calibration_windows(samples, num_tokens=99, sequence_length=50, seed=1)
    assert sorted(int(tokens[0, 0]) for tokens, _ in everything) == [0, 1, 2, 3]


def test_report_marks_what_goes() -> None:
    lines = compress.report([1.0, 0.02, 0.04, 0.04], keep=(0, 2, 3)).splitlines()
    assert lines[1].endswith(">  kept")
    assert lines[2].split() == ["1", "0.0200", "####", "dropped"]
    assert compress.report([0.0, 0.0], keep=(0, 1)).count("kept") == 2


def test_the_shipped_config_is_valid() -> None:
    load_and_validate("prune_depth", recipe="compress")
