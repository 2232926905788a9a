"""Configs and checkpoints that want to run code, or to reach files that are not theirs: none gets to."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Rejected, use
from omegaconf import OmegaConf

from kd_recipes.compression.checkpoint import read_checkpoint
from kd_recipes.config import (
    find_config,
    hide_environment,
    load_and_validate,
    shipped_configs,
    without_environment,
)
from kd_recipes.errors import ConfigError
from kd_recipes.storage import write_manifest
from kd_recipes.tensor_files import read_safetensors_header
from kd_recipes.trust import VARIABLE
from toy import distill

WriteConfig = Callable[..., Path]
COMPONENTS = [
    *("os.system", "posix.system", "os.popen", "subprocess.check_output", "builtins.exec", "builtins.eval"),
    *("pickle.loads", "shutil.rmtree", "importlib.import_module", "runpy.run_path", "ctypes.CDLL", "webbrowser.open"),
    *("logging.os.system", "antigravity.fly", "torch.load", "torch.hub.load", "torch.os.system"),
    *("torch.utils.cpp_extension.load_inline", "torch.distributed.run.main", "torch.nnx.Linear"),
    *("torch.nn.functional.importlib.import_module", "torch.optim.optimizer.functools.partial"),
    *("torchtune.training.metric_logging.os.system", "torchtune.config.instantiate", "torchtune.utils.torch.load"),
    *("torchao.quantization.quant_api.logging.os.system", "kd_recipes.storage.shutil.rmtree"),
    *("torchtune.training.checkpointing._utils.safe_torch_load", "torchao.prototype.spinquant.apply_spinquant"),
    *("kd_recipes.losses.build.inspect.getsource", "kd_recipes.quickstart.main", "", "."),
]


@pytest.fixture(autouse=True)
def _nothing_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_that_runs_something_else(component: str, tmp_path: Path, rejected: Rejected) -> None:
    marker = tmp_path / "executed"
    section = {"_component_": component, "command": f"touch {marker}", "args": [f"touch {marker}"]}
    message = rejected(metric_logger=section, optimizer={"_component_": "torch.optim.AdamW"})
    assert f"metric_logger._component_: got '{component}" in message
    assert "wanted a component of kd_recipes.compression" in message
    assert not marker.exists()
    assert "antigravity" not in sys.modules  # not even imported


def test_a_loader_of_pickles_among_the_trusted(tmp_path: Path, rejected: Rejected) -> None:
    torch.save({"x": Exploit(tmp_path / "executed")}, tmp_path / "evil.bin")
    loader = "torchtune.training.checkpointing._utils.safe_torch_load"
    settings = {"checkpoint_path": str(tmp_path / "evil.bin"), "weights_only": False, "mmap": False}
    message = rejected(metric_logger={"_component_": loader, **settings})
    assert "which is of torchtune.training.checkpointing._utils" in message
    assert not (tmp_path / "executed").exists()


def test_components_in_lists_are_looked_at(rejected: Rejected) -> None:
    message = rejected(feature_losses=[{"_component_": "os.system"}], dataset=[{"_component_": "os.popen"}])
    assert "feature_losses[0]._component_: got 'os.system'" in message
    assert "dataset[0]._component_: got 'os.popen'" in message


def test_a_config_cannot_vouch_for_itself(rejected: Rejected) -> None:
    message = rejected(trusted_components=["os"], metric_logger={"_component_": "os.system"})
    assert "trusted_components: got ['os'], wanted no such key in a file" in message


@pytest.mark.parametrize("how", ["override", "flag", "variable"])
def test_what_the_user_trusts(
    how: str, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, kd_loss={"_component_": f"{__name__}.no_divergence"})
    with pytest.raises(ConfigError, match=r"add trusted_components=\[tests\] on the command line"):
        load_and_validate(str(config))
    if how == "variable":
        monkeypatch.setenv(VARIABLE, f"some.thing,{__name__}")
    overrides = [f"trusted_components=[{__name__}]"] if how == "override" else []
    cfg = load_and_validate(str(config), overrides, trusts_all=how == "flag")
    assert cfg.kd_loss._component_ == f"{__name__}.no_divergence"
    assert "trusted_components" not in cfg


def no_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """What a user might write."""
    return (log_p - log_q).sum(-1)


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_need_no_trust(name: str) -> None:
    load_and_validate(str(find_config(name)), ["gguf_file=x", "output_dir=y"] if name == "import_gguf" else [])


# ------------------------------------------------------------------------------------------------------------- files
class Exploit:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._marker),)


def test_a_pickle_in_a_checkpoint(checkpoint: Path, tmp_path: Path, rejected: Rejected) -> None:
    (checkpoint / "model.safetensors").unlink()
    torch.save({"x": Exploit(tmp_path / "executed")}, checkpoint / "model.bin")
    message = rejected(use(checkpoint), "checkpointer.checkpoint_files=[model.bin]", loads=True)
    assert "wanted a checkpoint that can be read" in message
    assert not (tmp_path / "executed").exists()


def test_a_pickle_in_a_state_to_resume_from(write_config: WriteConfig, tmp_path: Path, rejected: Rejected) -> None:
    distill(write_config(tmp_path), "max_steps=1")
    directory = tmp_path / "run" / "checkpoints" / "step_00000001"
    torch.save({"step": 1, "x": Exploit(tmp_path / "executed")}, directory / "state.pt")
    (directory / "manifest.json").unlink()
    write_manifest(directory)  # whoever can write the one can write the other
    message = rejected("resume_from_checkpoint=True", loads=True)
    assert "resume_from_checkpoint: got" in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "/etc/passwd", "a/../../x.safetensors"])
def test_a_file_outside_its_checkpoint(name: str, checkpoint: Path, rejected: Rejected) -> None:
    message = rejected(use(checkpoint), f"checkpointer.checkpoint_files=[{name}]")
    assert "checkpointer.checkpoint_files: got ['" in message
    assert f"wanted files in checkpoint_dir ({checkpoint})" in message


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "/etc/passwd"])
def test_an_index_that_names_a_file_outside(name: str, checkpoint: Path) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="wanted files in its own directory"):
        read_checkpoint(checkpoint)


@pytest.mark.parametrize("length", [2**63, 10**9, 100_000_001])
def test_a_header_that_wants_all_memory(length: int, checkpoint: Path, rejected: Rejected) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ConfigError, match=f"a header of {length} bytes"):
        read_safetensors_header(file)
    assert "wanted a whole safetensors file" in rejected(use(checkpoint))


# ----------------------------------------------------------------------------------------------------------- secrets
def test_an_environment_value_reaches_no_file_and_no_message(
    write_config: WriteConfig, tmp_path: Path, rejected: Rejected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_very_secret_value")
    logger = {"_component_": "torchtune.training.metric_logging.TensorBoardLogger", "organize_logs": False}
    logger["log_dir"] = str(tmp_path / "logs")
    config = write_config(tmp_path, metric_logger=logger, **{"checkpointer.recipe_checkpoint": "${oc.env:MY_TOKEN}"})
    distill(config, "max_steps=1")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        assert b"hf_very_secret_value" not in path.read_bytes(), path
    (tmp_path / "other").mkdir()
    message = rejected("batch_size=${oc.env:MY_TOKEN}", f"output_dir={tmp_path / 'other'}")
    assert "batch_size: got '${oc.env:MY_TOKEN}', wanted" in message
    message += rejected("optimizer._component_=${oc.env:MY_TOKEN}", f"output_dir={tmp_path / 'other'}")
    assert "add trusted_components=[${oc.env:MY_TOKEN}]" in message
    assert "secret" not in message


def test_a_logger_that_resolves_what_it_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hf_very_secret_value")
    cfg = OmegaConf.create({"a": {"b": ["https://${oc.env:MY_TOKEN}@host", "${c}"]}, "c": 3})
    logged = OmegaConf.to_container(without_environment(cfg), resolve=True)
    assert logged == {"a": {"b": ["https://${oc.env:MY_TOKEN}@host", 3]}, "c": 3}
    said = hide_environment(cfg, r"got 'https://hf_very_secret_value@host' and 3")
    assert said == "got 'https://${oc.env:MY_TOKEN}@host' and 3"
