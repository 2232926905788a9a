"""What happens to long runs: signals, kills while saving, numbers that are not finite, memory that runs out."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_recipes import storage
from kd_recipes.batch import Batch
from kd_recipes.entry import EXIT_STOPPED, run_recipe
from kd_recipes.students import Student
from kd_recipes.training import checkpoint
from kd_recipes.training.checkpoint import RunDirectory
from kd_recipes.training.parallel import Parallel
from kd_recipes.training.sharded import read_tensors
from kd_recipes.training.step import Updates
from toy import SignallingLogger, Toys, distill, logged, text_section

WriteConfig = Callable[..., Path]
RUN = {"max_steps": 20, "epochs": 2, "save_every_n_steps": 7, "eval_every_n_steps": 5, "model.attn_dropout": 0.1}
ALONE = Parallel(0, 1, torch.device("cpu"))
TERMINATED = 128 + signal.SIGTERM


def _evaluated(toys: Toys) -> dict[str, Any]:
    return {**RUN, "eval_dataset": text_section(toys.data / "held_out.jsonl", toys.data / "cache")}


def _signalled(config: Path, at: int, **settings: Any) -> int:
    """The exit status of a run that gets a signal at a step."""
    logger = {"_component_": "toy.SignallingLogger", "at": at, **settings}
    return run_recipe("distill", ["--config", str(config), *(f"metric_logger.{k}={v}" for k, v in logger.items())])


def _assert_same(run: Path, unbroken: Path, parameters: dict[str, Any], expected: dict[str, Any]) -> None:
    assert all(torch.equal(parameter, expected[name]) for name, parameter in parameters.items())
    timeless = [
        {
            step: {
                name: value for name, value in metrics.items() if not name.startswith(("time", "throughput", "memory"))
            }
            for step, metrics in logged(path).items()
        }
        for path in (run, unbroken)
    ]
    assert timeless[0] == timeless[1]


def test_interrupted_at_every_step(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, **_evaluated(toys), health=None)
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    assert unbroken.step == 20
    for at in range(1, 21):
        run = tmp_path / f"run{at}"
        config = write_config(tmp_path, **_evaluated(toys), health=None, output_dir=str(run))
        assert _signalled(config, at) == TERMINATED
        assert RunDirectory(run).checkpoints()[-1].name == f"step_{at:08d}"  # no step is lost
        resumed = distill(config, "resume_from_checkpoint=auto")
        _assert_same(run, tmp_path / "unbroken", resumed._updates.parameters, unbroken._updates.parameters)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_middle_of_an_evaluation(
    number: int, toys: Toys, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, **_evaluated(toys))
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    calls: list[None] = []
    forward = Student.__call__

    def call(self: Student, batch: Batch) -> Any:
        if not torch.is_grad_enabled() and not calls and (tmp_path / "run" / "checkpoints").is_dir():
            calls.append(os.kill(os.getpid(), number))
        return forward(self, batch)

    monkeypatch.setattr(Student, "__call__", call)
    status = run_recipe("distill", ["--config", str(config), "save_every_n_steps=4"])
    assert calls
    assert status == 128 + number
    assert RunDirectory(tmp_path / "run").checkpoints()[-1].name == "step_00000005"
    resumed = distill(config, "resume_from_checkpoint=True")
    _assert_same(tmp_path / "run", tmp_path / "unbroken", resumed._updates.parameters, unbroken._updates.parameters)


def test_the_same_signal_twice_is_one(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler sends it to every process, and torchrun hands it on."""
    config = write_config(tmp_path, **RUN)
    log_dict = SignallingLogger.log_dict

    def twice(self: SignallingLogger, payload: Any, step: int) -> None:
        log_dict(self, payload, step)
        log_dict(self, payload, step)

    monkeypatch.setattr(SignallingLogger, "log_dict", twice)
    assert _signalled(config, 3) == TERMINATED
    assert RunDirectory(tmp_path / "run").checkpoints()[-1].name == "step_00000003"


def test_a_signal_in_the_middle_of_saving(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, **RUN)
    save = torch.save

    def save_and_signal(*args: Any, **kwargs: Any) -> None:
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save_and_signal)
    assert run_recipe("distill", ["--config", str(config)]) == TERMINATED
    assert "SIGTERM after step 7, which is saved" in capfd.readouterr().err
    assert [path.name for path in RunDirectory(tmp_path / "run").checkpoints()] == ["step_00000007"]
    assert distill(config, "resume_from_checkpoint=True").step == 20


def test_the_training_goes_on_while_a_checkpoint_is_written(
    toys: Toys, write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that is held back until steps later holds the weights of its own step."""
    config = write_config(tmp_path, **_evaluated(toys), enable_async_checkpointing=True)
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    write, done = checkpoint.write_tensors, threading.Event()
    steps: list[int] = []
    train = Updates.apply

    def apply(self: Updates, *around: Any) -> None:
        train(self, *around)
        steps.append(len(steps) + 1)
        if steps[-1] == 10:
            done.set()

    def write_late(directory: Path, *args: Any) -> Any:
        assert done.wait(60)
        return write(directory, *args)

    monkeypatch.setattr(Updates, "apply", apply)
    monkeypatch.setattr(checkpoint, "write_tensors", write_late)
    assert _signalled(config, 11) == TERMINATED
    assert steps[-1] == 11
    names = [path.name for path in RunDirectory(tmp_path / "run").checkpoints()]
    assert names == ["step_00000007", "step_00000011"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / names[1])
    resumed = distill(config, "resume_from_checkpoint=auto")
    assert all(
        torch.equal(parameter, unbroken._updates.parameters[name])
        for name, parameter in resumed._updates.parameters.items()
    )


def test_a_checkpoint_that_cannot_be_written_stops_the_run_that_went_on(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, **RUN)

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", refuse)
    assert run_recipe("distill", ["--config", str(config), "enable_async_checkpointing=True"]) == EXIT_STOPPED
    assert "step_00000007: No space left on device. What had been saved before is untouched" in capfd.readouterr().err


def _save_for_ever(path: Path) -> None:
    torch.set_num_threads(1)
    run = RunDirectory(path, keep_last_n=2)
    (path / "begun").touch()
    for step in range(1, 10_000):
        tensors = {"w": torch.full((50_000,), float(step))}
        run.save(step, tensors, {"step": step, "x": torch.full((50_000,), step)}, ALONE)


def test_killed_at_fifty_moments_of_saving(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kd_recipes.training.checkpoint"])  # type: ignore[attr-defined]
    generator, steps = random.Random(0), set()
    RunDirectory(tmp_path).save(1, {"w": torch.ones(50_000)}, {"step": 1, "x": torch.ones(5)}, ALONE)
    for attempt in range(50):
        process = context.Process(target=_save_for_ever, args=(tmp_path,))  # type: ignore[attr-defined]
        process.start()
        while not (tmp_path / "begun").exists():
            time.sleep(0.001)
        time.sleep(generator.uniform(0.0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (tmp_path / "begun").unlink()
        directory, state = RunDirectory(tmp_path).load()
        weights = {"w": torch.empty(50_000)}
        read_tensors(directory, weights, None)
        assert weights["w"].unique().tolist() == [state["step"]] == state["x"].unique().tolist(), attempt
        steps.add(state["step"])
    assert len(steps) > 1, "the kills fell on one moment"
    RunDirectory(tmp_path).save(10_000, {"w": torch.ones(1)}, {}, ALONE)


def test_what_a_manifest_sees(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"12345")
    assert storage.damage(tmp_path) == "manifest.json is missing"
    storage.write_manifest(tmp_path)
    assert storage.damage(tmp_path) is None
    (tmp_path / "a" / "x.bin").write_bytes(b"12346")
    assert storage.damage(tmp_path) == "a/x.bin is not what was written: its SHA-256 differs"
    (tmp_path / "a" / "x.bin").write_bytes(b"1234")
    assert storage.damage(tmp_path) == "a/x.bin has 4 bytes of 5"
    (tmp_path / "manifest.json").write_text("{")
    assert str(storage.damage(tmp_path)).startswith("manifest.json cannot be read")


# ------------------------------------------------------------------------------------------------------- not finite
_CALLS: list[int] = []


def sometimes_nan(log_p: Tensor, log_q: Tensor) -> Tensor:
    """A divergence that is no number at the second and third step."""
    _CALLS.append(1)
    value = (log_p.exp() * (log_p - log_q)).sum(-1)
    return value * float("nan") if len(_CALLS) in (2, 3) else value


@pytest.mark.parametrize("limit", [1, 2])
def test_steps_that_are_not_finite_are_left_out_up_to_a_limit(
    limit: int, write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _CALLS.clear()
    config = write_config(tmp_path, kd_loss={"_component_": f"{__name__}.sometimes_nan"}, chunk_size=1000)
    argv = ["--config", str(config), "max_steps=5", f"max_skipped_steps={limit}", "chunk_size=4096"]
    status = run_recipe("distill", argv)
    error = capfd.readouterr()
    assert status == (0 if limit == 2 else EXIT_STOPPED), error.err
    assert "left out: step 2: loss nan" in error.out + error.err
    assert ("stopped:\n  - step 3: loss nan" in error.err) == (limit == 1)


# ------------------------------------------------------------------------------------------------------------ memory
def test_memory_that_runs_out_is_explained(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    code = f"""
import torch
from kd_recipes import entry
from kd_recipes.students import Student
def greedy(self, batch):
    torch.ones(1 << 60)
Student.__call__ = greedy
raise SystemExit(entry.run_recipe("distill", ["--config", {str(config)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == EXIT_STOPPED, done.stderr
    assert "stopped:\n  - out of memory; besides activations and gradients it holds: student 0.00 GiB" in done.stderr
    assert "batch_size=1 gradient_accumulation_steps=2 is the same update" in done.stderr
    assert "Traceback" not in done.stderr
