"""The compress recipe as a user runs it, on a small random model with a real tokenizer and real text."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from kd_recipes import compress, entry
from kd_recipes.compression import read_checkpoint
from kd_recipes.config import load_and_validate
from toy import load_sections

TUNE = Path(sys.executable).with_name("tune")
TOKENS = torch.arange(24)[None]
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
    cfg.checkpoint_dir = cfg.tokenizer.path = str(teacher)
    cfg.tokenizer.max_seq_len = 128
    cfg.dataset.update(data_files=str(tmp_path / "text.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    cfg.update(
        num_calibration_tokens=300,
        num_held_out_tokens=100,
        sequence_length=64,
        output_dir=str(tmp_path / "pruned"),
        dtype="fp32",
    )
    cfg.compress.num_blocks = 3
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
    (record,) = json.loads((pruned / "compression.json").read_text())["steps"]
    assert record["kept_blocks"] == [0, 2, 3]
    assert record["block_influence"][1] == min(record["block_influence"])
    figures = record["figures"]
    assert figures["num_calibration_tokens"] + figures["num_held_out_tokens"] <= 400
    assert figures["perplexity_after"] == pytest.approx(figures["perplexity_before"], rel=0.02)  # block 1 is not missed
    assert f"-> {figures['perplexity_after']:.2f} on {figures['num_held_out_tokens']} tokens" in result.stdout
    assert (pruned / "tokenizer_config.json").is_file()
    found = OmegaConf.load(pruned / "model.yaml")
    assert OmegaConf.to_yaml(found) in result.stdout
    assert found.model.num_layers == 3
    assert found.checkpointer.checkpoint_dir == str(pruned)
    assert not list(config.parent.glob(".pruned*"))


STEPS = {
    "depth": {"_component_": "kd_recipes.compression.DepthPruning", "num_blocks": 3},
    "width": {"_component_": "kd_recipes.compression.WidthPruning", "intermediate_dim": 32},
    "budget": {"_component_": "kd_recipes.compression.Budget", "num_parameters": 0.8, "multiple_of": 1},
    "sparse": {"_component_": "kd_recipes.compression.Sparsification", "pattern": "2:4"},
    "low_rank": {"_component_": "kd_recipes.compression.LowRank", "ratio": 0.8},
    "tucker": {"_component_": "kd_recipes.compression.TensorDecomposition", "ratio": 0.8},
    "int8": {"_component_": "kd_recipes.compression.Quantization", "scheme": "int8_g8", "method": "round"},
    "binary": {"_component_": "kd_recipes.compression.Quantization", "scheme": "binary_g8"},
    "dense": {"_component_": "kd_recipes.compression.ToDense"},
}


def write_steps(config: Path, *names: str) -> Path:
    cfg = OmegaConf.load(config)
    cfg.compress = [STEPS[name] for name in names]
    OmegaConf.save(cfg, config)
    return config


@pytest.mark.parametrize("name", STEPS)
def test_every_step_alone(name: str, config: Path) -> None:
    assert entry.run_recipe("compress", ["--config", str(write_steps(config, name))]) == 0
    assert load_sections(config.parent / "pruned")(TOKENS).isfinite().all()


@pytest.mark.parametrize(
    "names",
    [
        ("depth", "width", "sparse", "int8"),
        ("width", "low_rank", "int8", "depth", "dense"),
        ("tucker", "low_rank", "dense", "width"),
        ("sparse", "depth", "sparse"),
    ],
)
def test_steps_in_sensible_orders(names: tuple[str, ...], config: Path) -> None:
    assert entry.run_recipe("compress", ["--config", str(write_steps(config, *names))]) == 0
    pruned = config.parent / "pruned"
    steps = json.loads((pruned / "compression.json").read_text())["steps"]
    kinds = [STEPS[name]["_component_"].rpartition(".")[2] for name in names]
    assert [step["step"] for step in steps] == kinds
    assert load_sections(pruned)(TOKENS).isfinite().all()
    assert not list(config.parent.glob(".pruned*"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("sparse", "binary"), "compress[1].scheme: got 'binary_g8', wanted a scheme that has a zero"),
        (("sparse", "width"), "compress[1]._component_: got 'pruning of widths of a model with 2:4 zeros"),
        (("sparse", "low_rank"), "compress[1]._component_: got 'decomposition of a model with 2:4 zeros"),
        (("int8", "width"), "compress[1]._component_: got 'pruning of widths of weights in int8_g8"),
        (("int8", "int8"), "compress[1]._component_: got 'quantization of weights in int8_g8"),
        (("low_rank", "width"), "kd_recipes.compression.ToDense between them"),
        (("low_rank", "sparse"), "got 'sparsification of factors', wanted whole matrices"),
        (("depth", "depth", "width", "binary", "tucker"), "compress[4]._component_"),
        (("budget", "width"), "multiples of 32 (multiple_of), with 4 blocks and 27 neurons"),
    ],
)
def test_a_step_that_would_undo_another_is_refused(
    names: tuple[str, ...], message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry.run_recipe("compress", ["--config", str(write_steps(config, *names))]) == entry.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err
    assert not list(config.parent.glob("*pruned*"))


def test_a_run_cut_off_goes_on_after_the_last_step_done(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(config, "depth", "width")
    with monkeypatch.context() as context:
        context.setattr("kd_recipes.compression.width.narrowed", fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            entry.run_recipe("compress", ["--config", str(config)])
    left = config.parent / ".pruned.steps"
    assert {path.name for path in left.iterdir()} == {"plan.json", "00_DepthPruning"}
    capsys.readouterr()
    assert entry.run_recipe("compress", ["--config", str(config)]) == 0
    assert "DepthPruning: done before" in capsys.readouterr().out
    assert not left.exists()


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("made to fail")


@pytest.mark.parametrize("names", [("depth",), ("depth", "width")])
def test_a_run_cut_off_before_its_figures_goes_on(
    names: tuple[str, ...], config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(config, *names)
    argv, pruned = ["--config", str(config)], config.parent / "pruned"
    measure = compress.cross_entropy
    with monkeypatch.context() as context:
        context.setattr(compress, "cross_entropy", lambda *args, what: fail() if what == "after" else measure(*args))
        with pytest.raises(RuntimeError, match="made to fail"):
            entry.run_recipe("compress", argv)
    before = (pruned / "model.safetensors").stat()
    assert "figures" not in json.loads((pruned / "compression.json").read_text())["steps"][-1]
    assert entry.run_recipe("compress", [*argv, "seed=1"]) == entry.EXIT_BAD_INPUT  # it is another run's
    capsys.readouterr()
    assert entry.run_recipe("compress", argv) == 0
    done = ", ".join(STEPS[name]["_component_"].rpartition(".")[2] for name in names)
    assert f"{done}: done before" in capsys.readouterr().out
    assert (pruned / "model.safetensors").stat() == before
    steps = json.loads((pruned / "compression.json").read_text())["steps"]
    assert steps[-1]["figures"]["perplexity_after"] > 1
    assert len(steps) == len(names)
    assert not list(config.parent.glob(".pruned*"))
    assert entry.run_recipe("compress", argv) == entry.EXIT_BAD_INPUT  # and done now


def test_what_somebody_has_put_into_the_directory_of_a_run_cut_off_is_left_alone(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as context:
        context.setattr("kd_recipes.compression.depth.keep_blocks", fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            entry.run_recipe("compress", ["--config", str(config)])
    result = config.parent / "pruned" / "result.txt"
    result.parent.mkdir()
    result.write_text("precious")
    assert entry.run_recipe("compress", ["--config", str(config)]) == entry.EXIT_BAD_INPUT
    assert "output_dir: got" in capsys.readouterr().err
    assert [path.name for path in result.parent.iterdir()] == ["result.txt"]


def test_a_run_cut_off_begins_anew_on_other_weights(
    config: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = config.parent / "source"
    shutil.copytree(teacher, source)
    argv = ["--config", str(write_steps(config, "depth", "width")), f"checkpoint_dir={source}"]
    with monkeypatch.context() as context:
        context.setattr("kd_recipes.compression.width.narrowed", fail)
        with pytest.raises(RuntimeError, match="made to fail"):
            entry.run_recipe("compress", argv)
    weights = load_file(source / "model.safetensors")
    matter = {name: 1000 * tensor if ".layers.1." in name else tensor for name, tensor in weights.items()}
    save_file(matter, source / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert entry.run_recipe("compress", argv) == 0
    assert "done before" not in capsys.readouterr().out
    steps = json.loads((config.parent / "pruned" / "compression.json").read_text())["steps"]
    assert 1 in steps[0]["kept_blocks"]


# ---------------------------------------------------------------------------------------------------------- free space
def free(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=num_bytes)
    monkeypatch.setattr("kd_recipes.storage.shutil.disk_usage", lambda path: usage)


def test_codes_need_less_room_than_the_model_that_they_are_of(
    config: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_bytes = read_checkpoint(teacher).num_bytes  # in float32
    argv = ["--config", str(write_steps(config, "int8"))]
    free(monkeypatch, num_bytes // 5)
    assert entry.run_recipe("compress", argv) == entry.EXIT_BAD_INPUT
    assert "output_dir: got" in capsys.readouterr().err
    assert not list(config.parent.glob("*pruned*"))
    free(monkeypatch, num_bytes // 2)
    assert entry.run_recipe("compress", argv) == 0


@pytest.mark.parametrize("name", ["depth", "width", "sparse", "dense", "tucker"])
def test_room_for_just_what_is_written_is_enough(
    name: str, config: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(config, name)
    argv = ["--config", str(config)]
    assert entry.run_recipe("compress", argv) == 0
    num_bytes = read_checkpoint(config.parent / "pruned").num_bytes
    shutil.rmtree(config.parent / "pruned")
    free(monkeypatch, num_bytes - 1)
    assert entry.run_recipe("compress", argv) == entry.EXIT_BAD_INPUT
    assert f"{num_bytes:,} bytes free" in capsys.readouterr().err
    free(monkeypatch, num_bytes)
    assert entry.run_recipe("compress", argv) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["~compress.num_blocks", "compress.keep_ratio=0.1"],
            "compress.num_blocks: got '0 blocks to keep', wanted from 1 to 4",
        ),
        (["compress.num_blocks=5"], "compress.num_blocks: got '5 blocks to keep', wanted from 1 to 4"),
        (["compress.num_blocks=1"], "the protected blocks [0, 3]"),
        (["compress.keep_ratio=0.5"], "exactly one of num_blocks and keep_ratio"),
        (["~compress.num_blocks"], "exactly one of num_blocks and keep_ratio"),
        (
            ["compress._component_=torch.nn.Identity", "~compress.num_blocks", "~compress.criterion"],
            "wanted a step of kd_recipes",
        ),
        (["dataset.split=train[:0]"], "dataset: "),
        (["dataset.data_files=nowhere.jsonl"], "dataset: "),
        (["sequence_length=129"], "at most 128, the model's max_position_embeddings"),
        (["checkpoint_dir=nowhere"], "nowhere/config.json"),
        (["compress=abc"], "compress._component_: got 'abc'"),
        (["compress.shortlist=0"], "compress.shortlist: got 0"),
        (["compress.criterion=luck"], "compress.criterion: got 'luck', wanted influence or loss"),
        (["num_calibration_tokens=1", "num_held_out_tokens=1"], "other text to judge by"),
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
    argv = ["--config", str(config), "compress.num_blocks=null", "device=abacus"]
    assert entry.run_recipe("compress", argv) == entry.EXIT_BAD_INPUT
    errors = capsys.readouterr().err
    assert all(
        f"  - {key}: got" in errors for key in ("output_dir", "device", "compress.num_blocks")
    )  # all of them at once
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


@pytest.mark.parametrize(
    "name", ["compress", "low_rank", "prune_budget", "prune_depth", "prune_width", "quantize", "sparsify", "to_dense"]
)
def test_the_shipped_configs_are_valid(name: str) -> None:
    load_and_validate(name, recipe="compress")
