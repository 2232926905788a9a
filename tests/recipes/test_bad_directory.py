"""Output directories, resumption, full disks and lost numbers: one clear message, and nothing that is whole touched."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bad_input import SAVING, Rejected, WriteConfig, snapshot, use

from kd_recipes.entry import EXIT_STOPPED, run_recipe
from toy import Toys, distill, lora_section


# -------------------------------------------------------------------------------------------------- output directory
def test_a_directory_that_holds_another_run(write_config: WriteConfig, tmp_path: Path, rejected: Rejected) -> None:
    distill(write_config(tmp_path), "max_steps=1")
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    message = rejected("device=banana")
    assert "output_dir: got" in message
    assert "wanted a directory that holds no other run" in message
    assert "resume_from_checkpoint=True" in message
    assert "device: got 'banana'" in message


@pytest.mark.parametrize("name", ["final", "best", "checkpoints"])
def test_results_without_a_run_are_not_written_over(name: str, tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / name / "precious.txt").write_text("mine")
    assert "wanted a directory that holds no other run" in rejected()


def test_an_output_directory_inside_a_checkpoint(toys: Toys, rejected: Rejected) -> None:
    message = rejected(f"output_dir={toys.student}")
    assert f"wanted a directory outside checkpointer.checkpoint_dir ({toys.student})" in message
    message = rejected(f"output_dir={toys.teacher}/runs/first")
    assert f"wanted a directory outside teacher_checkpointer.checkpoint_dir ({toys.teacher})" in message
    assert not (toys.teacher / "runs").exists()


def test_a_student_is_not_read_from_where_it_will_be_written(
    write_config: WriteConfig, tmp_path: Path, toys: Toys, rejected: Rejected
) -> None:
    distill(write_config(tmp_path), *SAVING)
    files = "[model-00001-of-00001.safetensors]"
    message = rejected(
        use(tmp_path / "run" / "final"), f"checkpointer.checkpoint_files={files}", "resume_from_checkpoint=True"
    )
    assert "wanted a checkpoint that the run does not write over" in message


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_an_output_directory_that_is_a_file(path: str, tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "file").write_text("mine")
    assert f"output_dir: got '{tmp_path / path}', wanted a" in rejected(f"output_dir={tmp_path / path}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_an_output_directory_that_nobody_can_make(rejected: Rejected) -> None:
    message = rejected("output_dir=/proc/kd_recipes")
    assert "output_dir: got '/proc/kd_recipes', wanted a place that can be written to" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_directory_without_permission(tmp_path: Path, rejected: Rejected) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "wanted a place that can be written to" in rejected(f"output_dir={tmp_path / 'locked' / 'run'}")


def test_a_logger_that_cannot_be_built_leaves_nothing(rejected: Rejected) -> None:
    logger = {"_component_": "importlib.import_module", "name": "wandb_that_is_not_installed"}  # as W&B's would fail
    message = rejected(metric_logger=logger, loads=True)
    assert "metric_logger: got 'importlib.import_module', wanted one that can be built. No module named" in message


# ----------------------------------------------------------------------------------------------------------- resume
def test_resuming_where_there_is_no_run(rejected: Rejected) -> None:
    message = rejected("resume_from_checkpoint=True")
    assert "resume_from_checkpoint: got True, wanted a checkpoint in" in message
    assert "Set resume_from_checkpoint=False to start anew" in message


def test_resuming_a_run_without_a_checkpoint(write_config: WriteConfig, tmp_path: Path, rejected: Rejected) -> None:
    distill(write_config(tmp_path), "max_steps=1")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    message = rejected("resume_from_checkpoint=True")
    assert "resume_from_checkpoint: got True, wanted a checkpoint in" in message
    assert f"delete {tmp_path / 'run'}" in message


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "one bit"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str,
    damage: str,
    write_config: WriteConfig,
    tmp_path: Path,
    rejected: Rejected,
    capfd: pytest.CaptureFixture[str],
) -> None:
    unbroken = distill(write_config(tmp_path), *SAVING)
    newest = tmp_path / "run" / "checkpoints" / "step_00000002"
    content = bytearray((newest / name).read_bytes())
    (newest / name).unlink()
    if damage == "truncated":
        (newest / name).write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
    message = rejected("resume_from_checkpoint=True", f"checkpointer.recipe_checkpoint={newest}")
    found = "" if damage == "one bit" else name  # a bit of the manifest is another file's sum
    assert f"resume_from_checkpoint: got '{newest}', wanted a checkpoint that is whole ({found}" in message
    assert "others here: ['step_00000001']" in message
    resumed = distill(tmp_path / "config.yaml", *SAVING, "resume_from_checkpoint=auto")
    assert f"{newest} is damaged; going on from step_00000001" in capfd.readouterr().err
    assert resumed.step == 2
    for key, parameter in resumed._updates.parameters.items():
        assert torch.equal(parameter, unbroken._updates.parameters[key])


def test_no_checkpoint_is_whole(write_config: WriteConfig, tmp_path: Path, rejected: Rejected) -> None:
    distill(write_config(tmp_path), *SAVING)
    for file in (tmp_path / "run" / "checkpoints").glob("*/state.pt"):
        file.unlink()
    message = rejected("resume_from_checkpoint=auto")
    assert "wanted a checkpoint that is whole (state.pt is missing)" in message


@pytest.mark.parametrize(
    "override", ["optimizer._component_=torch.optim.SGD", "model._component_=kd_recipes.models.lora_llama"]
)
def test_resuming_with_another_optimizer_or_student(
    override: str, toys: Toys, write_config: WriteConfig, tmp_path: Path, rejected: Rejected
) -> None:
    distill(write_config(tmp_path), "save_every_n_steps=1", "max_steps=1")
    settings = {"model": lora_section(toys.student)} if override.startswith("model") else {}
    message = rejected("resume_from_checkpoint=True", override, *SAVING, loads=True, **settings)
    assert "resume_from_checkpoint: got True, wanted a checkpoint of the same model, optimizer and data" in message


# ------------------------------------------------------------------------------------------------------ a full disk
def test_no_room_is_known_before_anything_is_loaded(small_disk: Callable[[int], Path], rejected: Rejected) -> None:
    disk = small_disk(64)
    message = rejected(f"output_dir={disk / 'run'}")
    assert f"output_dir: got '{disk / 'run'}', wanted a place with" in message
    assert "Free some space or choose another disk" in message
    assert not list(disk.iterdir())


def test_a_resumed_run_needs_no_room_for_what_it_writes_over(
    small_disk: Callable[[int], Path], write_config: WriteConfig, tmp_path: Path
) -> None:
    disk = small_disk(6 * 1024)
    overrides = [f"output_dir={disk / 'run'}", "save_every_n_steps=1", "keep_last_n_checkpoints=1"]
    distill(write_config(tmp_path), *overrides, "max_steps=2")
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(b"\0" * (free - 1800 * 1024))
    assert distill(tmp_path / "config.yaml", *overrides, "max_steps=3", "resume_from_checkpoint=True").step == 3


@pytest.mark.parametrize("free_kib", [40, 700])  # the weights do not fit; they do, and the optimizer's state does not
def test_a_disk_that_fills_up_leaves_the_last_checkpoint_to_resume_from(
    free_kib: int, small_disk: Callable[[int], Path], write_config: WriteConfig, tmp_path: Path
) -> None:
    disk = small_disk(16 * 1024)
    run = disk / "run"
    overrides = [f"output_dir={run}", "save_every_n_steps=1", "keep_last_n_checkpoints=2"]
    config = write_config(tmp_path)
    distill(config, *overrides, "max_steps=1")
    shutil.rmtree(run / "final")
    before = snapshot(run / "checkpoints" / "step_00000001")
    argv = ["--config", str(config), *overrides, "max_steps=3", "resume_from_checkpoint=True"]
    # another program takes the room after the check for it
    code = f"""
import shutil
from pathlib import Path
from kd_recipes import distill, entry
prepare = distill.DistillRecipe.setup
def setup(self, cfg):
    prepare(self, cfg)
    free = shutil.disk_usage("{disk}").free
    Path("{disk}/ballast").write_bytes(b"0" * (free - {free_kib} * 1024))
distill.DistillRecipe.setup = setup
raise SystemExit(entry.run_recipe("distill", {argv!r}))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == EXIT_STOPPED, result.stderr
    assert "kd_recipes.distill stopped:" in result.stderr
    assert os.strerror(errno.ENOSPC) in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000001"]  # no temporary ones either
    assert snapshot(run / "checkpoints" / "step_00000001") == before
    (disk / "ballast").unlink()
    assert distill(config, *overrides, "max_steps=3", "resume_from_checkpoint=True").step == 3


# ------------------------------------------------------------------------------------------------------- not finite
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    distill(config, "save_every_n_steps=1", "max_steps=1")
    before = snapshot(tmp_path / "run" / "checkpoints")
    argv = ["--config", str(config), "resume_from_checkpoint=True", "max_steps=9", "optimizer.lr=1e30"]
    capfd.readouterr()
    code = run_recipe("distill", argv)
    stderr = capfd.readouterr().err
    assert code == EXIT_STOPPED, stderr
    assert "Traceback" not in stderr
    assert re.search(
        r"distill stopped:\n  - step 3: loss \S+, gradient norm (nan|inf); the weights are those of step 2", stderr
    )
    assert re.search(r"Its batch: rows \[\d+, \d+\] of `dataset` in epoch 0", stderr)
    assert "Lower optimizer.lr" in stderr
    assert snapshot(tmp_path / "run" / "checkpoints") == before
    assert distill(config, "resume_from_checkpoint=True", "max_steps=3").step == 3
