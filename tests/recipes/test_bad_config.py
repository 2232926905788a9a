"""Wrong settings: one clear message, before weights load where it can be known, and nothing touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Rejected, WriteConfig, problems

from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe


# ------------------------------------------------------------------------------------------------------- the config
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["temprature=2"], "temprature: got 'temprature', wanted a known key. Did you mean `temperature`?"),
        (["model.num_layer=3"], "model.num_layer: got 'num_layer', wanted a known argument"),
        (["model.num_layer=3"], "Did you mean `num_layers`?"),
        (["batch_size=four"], "batch_size: got 'four', wanted sequences in a micro-batch, above 0"),
        (["batch_size=0"], "batch_size: got 0, wanted sequences in a micro-batch, above 0"),
        (["batch_size=1.5"], "batch_size: got 1.5, wanted sequences in a micro-batch, above 0"),
        (["batch_size=True"], "batch_size: got True, wanted sequences in a micro-batch, above 0"),
        (["~batch_size"], "batch_size: got None, wanted sequences in a micro-batch, above 0. It has to be"),
        (["~optimizer"], "optimizer: got None, wanted a section with _component_. It has to be in the config"),
        (["optimizer=null"], "optimizer: got None, wanted a section with _component_. It has to be in the config"),
        (["optimizer.lr=fast"], "optimizer.lr: got 'fast', wanted a number"),
        (["optimizer.lr=-1"], "optimizer: got 'torch.optim.AdamW', wanted one that can be built. Invalid learning"),
        (["optimizer.lr=null"], "optimizer: got 'torch.optim.AdamW', wanted one that can be built"),
        (["save_adapter_weights_only=True"], "wanted False: this student has no adapter, all of it is trained"),
        (["enable_activation_offloading=True"], "enable_activation_offloading: got True, wanted False on cpu"),
        (["loss._component_=torch.nn.CrossEntropyLoss"], "wanted no loss beside a divergence of ours"),
        (["shuffle=maybe"], "shuffle: got 'maybe', wanted True or False"),
        (["optimizer=AdamW"], "optimizer._component_: got 'AdamW', wanted an importable function or class"),
        (["optimizer._component_=torch.optim.AdamX"], "optimizer._component_: got 'torch.optim.AdamX', wanted"),
        (["optimizer._component_=nowhere.AdamW"], "optimizer._component_: got 'nowhere.AdamW', wanted an importable"),
        (["optimizer._component_=math.pi"], "math.pi is a float, which cannot be called"),
        (["kd_ratio=1.5"], "kd_ratio: got 1.5, wanted a number in [0, 1]"),
        (["kd_ratio=-0.1"], "kd_ratio: got -0.1, wanted a number in [0, 1]"),
        (["kd_ratio=.nan"], "kd_ratio: got nan, wanted a number in [0, 1]"),
        (["temperature=0"], "temperature: got 0, wanted a number above 0"),
        (["temperature=-1"], "temperature: got -1, wanted a number above 0"),
        (["temperature=.nan"], "temperature: got nan, wanted a number above 0"),
        (["temperature=nan"], "temperature: got"),
        (["temperature=.inf"], "temperature: got inf, wanted a number above 0"),
        (["clip_grad_norm=-1"], "clip_grad_norm: got -1, wanted a number above 0"),
        (["clip_grad_norm=tight"], "clip_grad_norm: got 'tight', wanted a number above 0"),
        (["clip_grad_norm=[1]"], "clip_grad_norm: got [1], wanted a number above 0"),
        (["seed=-1"], "seed: got -1, wanted a whole number from 0"),
        (["cudnn_deterministic_mode=often"], "cudnn_deterministic_mode: got 'often', wanted default, warn or error"),
        (["dtype=fp16"], "dtype: got 'fp16', wanted auto, bf16 or fp32"),
        (["best_metric=bleu"], "best_metric: got 'bleu', wanted objective, perplexity or kl"),
        (["seed=${sed}"], "seed: got 'an interpolation', wanted one that resolves. Interpolation key 'sed' not found"),
        (["recipe=distil"], "recipe: got 'distil', wanted `distill`, as on the command line"),
        (["noequals"], "overrides: got ['noequals'], wanted key=value or ~key"),
        (["--lr", "1"], "flags are not settings: ['--lr']; write key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_wanted(rejected: Rejected, overrides: list[str], message: str) -> None:
    assert message in rejected(*overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "AdamW"}, "optimizer: got 'AdamW', wanted a section with _component_"),
        ({"optimizer": {"lr": 1}}, "optimizer: got {'lr': 1}, wanted a section with _component_"),
        ({"dataset": []}, "dataset: got [], wanted at least one section with _component_"),
        ({"dataset": ["alpaca"]}, "dataset[0]: got 'alpaca', wanted a section with _component_"),
        ({"output_dir": "???"}, "Missing mandatory value: output_dir"),
        ({"output_dir": 5}, "output_dir: got 5, wanted a directory for everything that the run writes"),
        ({"1": 5}, "1: got '1', wanted a known key"),
    ],
)
def test_a_wrong_setting_in_the_file(rejected: Rejected, settings: dict[str, Any], message: str) -> None:
    assert message in rejected(**settings)


def test_several_mistakes_are_reported_at_once(rejected: Rejected) -> None:
    message = rejected("temprature=2", "batch_size=four", "model.num_layer=3", "kd_ratio=2", "~tokenizer")
    found = [line.split(": ")[0].removeprefix("  - ") for line in message.splitlines()]
    assert {"temprature", "batch_size", "model.num_layer", "kd_ratio", "tokenizer"} <= set(found)


def test_mistakes_about_files_are_reported_at_once(rejected: Rejected) -> None:
    message = rejected(
        "device=banana", "teacher_device=mars", "checkpointer.checkpoint_dir=nowhere", "output_dir=/dev/null"
    )
    found = [line.split(": ")[0].removeprefix("  - ") for line in message.splitlines()]
    assert found == ["device", "teacher_device", "output_dir", "checkpointer.checkpoint_dir"]


def test_a_missing_config_names_those_that_there_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("distill", ["--config", "quickstrt"]) == EXIT_BAD_INPUT
    message = "--config: got 'quickstrt', wanted a YAML file. Shipped configs: quickstart"
    assert message in problems(capfd.readouterr().err)


@pytest.mark.parametrize("text", ["model: [", "a: b: c", "- one\n- two\n", "just words", "\x00", "", "1: 2"])
def test_a_file_that_is_no_yaml_mapping(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert run_recipe("distill", ["--config", str(tmp_path / "config.yaml")]) == EXIT_BAD_INPUT
    assert problems(capfd.readouterr().err)


def test_a_run_from_the_command_line_ends_with_the_message_alone(write_config: WriteConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kd_recipes", "--config", str(write_config(tmp_path)), "kd_ratio=2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_BAD_INPUT
    assert result.stdout == ""
    assert result.stderr.splitlines()[-2:] == [
        "kd_recipes.distill cannot run:",
        "  - kd_ratio: got 2, wanted a number in [0, 1]",
    ]
    assert "Traceback" not in result.stderr


def test_an_unknown_recipe_lists_the_known_ones(write_config: WriteConfig, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "kd_recipes", "--config", str(write_config(tmp_path)), "recipe=distell"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_BAD_INPUT
    assert "recipe: got 'distell', wanted one of cache_teacher, compress, correct_teacher, distill" in result.stderr
    assert "Did you mean `distill`?" in result.stderr
    assert "Traceback" not in result.stderr


# ----------------------------------------------------------------------------------------------- device and teacher
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_cuda(rejected: Rejected) -> None:
    assert "device: got 'cuda', wanted a device that is there. torch sees no CUDA device" in rejected("device=cuda")


@pytest.mark.parametrize("device", ["banana", "meta", "cpu:x", "xpu", ""])
def test_no_such_device(device: str, rejected: Rejected) -> None:
    assert f"device: got {device!r}, wanted a device" in rejected(f"device='{device}'")


def test_distilling_needs_a_teacher(rejected: Rejected) -> None:
    message = rejected("~teacher_model", "~teacher_checkpointer")
    assert "teacher_model: got None, wanted a teacher, since kd_ratio is 0.5. kd_ratio=0 trains on labels" in message
    assert "teacher_checkpointer: got None, wanted a teacher" in message
    assert "teacher_checkpointer: got None" in rejected("~teacher_checkpointer", "kd_ratio=0")  # half a teacher
