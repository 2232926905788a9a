"""Several processes, by torchrun on CPUs: the same update as one process, the same files, and from one to the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_recipes.training.data import Loader
from kd_recipes.training.order import Rows
from toy import TUNE, Toys, distill, logged, lora_section, run_tune, saved_weights, text_section

WriteConfig = Callable[..., Path]
SGD = {"_component_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
CHAT = {
    "_component_": "torchtune.datasets.chat_dataset",
    "source": "json",
    "split": "train",
    "conversation_style": "openai",
}
HIDDEN = {"_component_": "kd_recipes.losses.HiddenStates", "distance": "mse", "weight": 0.1}


@pytest.fixture
def trained(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Callable[..., dict[str, Tensor]]:
    """``trained(num_processes, *overrides, **settings)``: the weights after the last step; 4 samples a step."""

    def run(num_processes: int, *overrides: str, name: str = "", **settings: Any) -> dict[str, Tensor]:
        directory = tmp_path / (name or f"{num_processes}")
        directory.mkdir(exist_ok=True)
        cache = {"source": "json", "data_files": str(toys.data / "chat.jsonl"), "cache_dir": str(toys.data / "cache")}
        chat = {**CHAT, **cache, "conversation_column": "messages", "train_on_input": False}
        settings = {"dataset": chat, **settings}
        defaults = {"optimizer": SGD, "clip_grad_norm": 0.5, "batch_size": 4 // num_processes}
        config = write_config(directory, **{**defaults, "max_steps": 3, **settings})
        launcher = [] if num_processes == 1 else ["--nproc_per_node", str(num_processes)]
        done = run_tune("run", *launcher, "kd_recipes.distill", "--config", str(config), *overrides, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return saved_weights(directory / "run")

    return run


def _assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name] - tensor).norm() <= tolerance * tensor.norm(), name


@pytest.mark.parametrize("kind", ["full", "four", "lora", "replicated", "features", "stream", "grouped"])
def test_the_update_does_not_depend_on_the_number_of_processes(
    kind: str, trained: Callable[..., dict[str, Tensor]], toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"eval_every_n_steps": 2}
    if kind == "lora":
        settings["model"] = lora_section(toys.student)
    if kind == "replicated":
        settings |= {"shard_size": 1, "shard_teacher": False}
    if kind == "features":
        settings["feature_losses"] = HIDDEN
    if kind == "stream":
        settings |= {"dataset.streaming": True, "shuffle_buffer_size": 8, "max_steps": 5}  # 20 of 16 rows
    if kind == "grouped":
        settings["group_by_length"] = True
    if kind == "four":
        settings["shard_size"] = 2  # two rows of two: hybrid sharding
    many = 4 if kind == "four" else 2
    one, two = trained(1, **{**settings, "shard_size": None}), trained(many, **settings)
    _assert_close(two, one)
    logs = [logged(tmp_path / name / "run") for name in ("1", str(many))]
    for step in (1, 2, 3):
        for metric in ("loss/total", "quality/accuracy", "kd/forward_kl", "optimizer/grad_norm"):
            assert logs[1][step][metric] == pytest.approx(logs[0][step][metric], rel=1e-4), (step, metric)
    exports = [
        load_file(tmp_path / name / "run" / "final" / "model-00001-of-00001.safetensors") for name in ("1", str(many))
    ]
    _assert_close(exports[1], exports[0])


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, trained: Callable[..., dict[str, Tensor]], tmp_path: Path
) -> None:
    settings = {
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 0.01},
        "feature_losses": HIDDEN,
        "shuffle": True,
        "enable_async_checkpointing": before == 2,
    }
    whole = trained(1, "max_steps=4", name="whole", **settings)
    trained(before, "max_steps=2", name="parts", **settings)
    resumed = trained(after, "max_steps=4", "resume_from_checkpoint=True", name="parts", **settings)
    _assert_close(resumed, whole, 1e-4)  # Adam divides rounding errors by gradients that are as small


def _run_on_two(script: str, config: Path) -> str:
    """What a script beside this file prints, started once by torchrun in two processes."""
    path = Path(__file__).with_name(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(path), str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("reshard", [True, False])
def test_traffic_is_what_the_cost_model_says(reshard: bool, write_config: WriteConfig, tmp_path: Path) -> None:
    """docs/scaling.md, in float32."""
    config = write_config(tmp_path, max_steps=4, fsdp_reshard_after_forward=reshard)
    lines = _run_on_two("count_traffic.py", config).splitlines()
    counted = json.loads(next(line for line in lines if line.startswith("{")))
    student, teacher = counted["student"], counted["teacher"]
    gathered = teacher["blocks"] + student["root"] + (2 if reshard else 1) * student["blocks"]
    assert counted["gathered"] == 4 * (4 * gathered + teacher["root"])  # the teacher's root stays whole
    assert counted["reduced"] == 4 * 4 * (student["root"] + student["blocks"])


def _loader(num_samples: int, batch_size: int, rank: int, world_size: int, *, shuffle: bool) -> Loader:
    dataset = [{"tokens": [i, i, i], "labels": [i, i, i]} for i in range(num_samples)]
    settings: dict[str, Any] = {"packed": False, "padding_idx": 0, "max_seq_len": 9}
    order = Rows(dataset, shuffle=shuffle, seed=3, rank=rank, world_size=world_size)
    return Loader(order, batch_size=batch_size, device=torch.device("cpu"), **settings)


@pytest.mark.parametrize("num_samples", [24, 25, 26, 27])
def test_every_turn_has_the_same_samples(num_samples: int) -> None:
    turns = {}
    for world_size in (1, 2, 4):
        loaders = [_loader(num_samples, 4 // world_size, rank, world_size, shuffle=True) for rank in range(world_size)]
        passes = [[set(batch.tokens_BS[:, 0].tolist()) for batch in loader.batches(1)] for loader in loaders]
        turns[world_size] = [set.union(*turn) for turn in zip(*passes, strict=True)]
        assert {len(loader) for loader in loaders} == {6}
        assert set(loaders[0].rows(1, 0, 4)) >= passes[0][0]
    assert turns[1] == turns[2] == turns[4]


def test_a_repeated_sample_is_masked_after_a_seek_too() -> None:
    loader = _loader(5, 1, 1, 2, shuffle=False)
    whole = [batch.num_valid_tokens for batch in loader.batches()]
    assert whole == [2, 2, 0]
    loader.seek(2, 3)
    assert [batch.num_valid_tokens for batch in loader.batches()] == whole[1:]
    assert [batch.num_valid_tokens for batch in loader.batches()] == whole


def test_another_number_of_samples_a_step_is_refused(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=1)
    distill(config)
    with pytest.raises(ValueError, match="got 4, wanted 2 samples a step, as the checkpoint has"):
        distill(config, "resume_from_checkpoint=True", "batch_size=4")


def test_held_out_text_is_counted_once(trained: Callable[..., dict[str, Tensor]], toys: Toys, tmp_path: Path) -> None:
    """Five texts for two processes: one of them gets a text twice."""
    rows = (toys.data / "held_out.jsonl").read_text().splitlines()[:5]
    (tmp_path / "five.jsonl").write_text("\n".join(rows))
    section = text_section(tmp_path / "five.jsonl", toys.data / "cache")
    for num_processes in (1, 2):
        trained(num_processes, "max_steps=1", eval_dataset=section)
    perplexities = [logged(tmp_path / name / "run")[0]["held_out/perplexity"] for name in ("1", "2")]
    assert perplexities[1] == pytest.approx(perplexities[0], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ faults
# without it torchrun's own store goes down with the first worker that is killed, and a restart may not find it
RELIABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LAUNCHER = ["run", "--nproc_per_node", "2", "--max-restarts", "1", "kd_recipes.distill"]


def _failing(how: str, tmp_path: Path, at: int = 5, times: int = 1) -> dict[str, Any]:
    section = {"_component_": "toy.fail", "how": how, "rank": 1, "at": at, "times": times}
    section["marker"] = str(tmp_path / how)
    return {"token_weights": section, "save_every_n_steps": 2, "max_steps": 6, "batch_size": 2}


def test_a_process_that_is_killed_is_started_again_and_the_run_goes_on(
    write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **_failing("kill", tmp_path))
    command = [*LAUNCHER, "--config", str(config), "resume_from_checkpoint=auto"]
    done = run_tune(*command, cwd=tmp_path, **RELIABLE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kill").exists()
    steps = logged(tmp_path / "run")
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    done = run_tune(*command, f"output_dir={tmp_path / 'unbroken'}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = [tmp_path / name / "final" / "model-00001-of-00001.safetensors" for name in ("run", "unbroken")]
    _assert_close(load_file(files[0]), load_file(files[1]))


@pytest.mark.slow
def test_ten_killed_processes_of_ten(write_config: WriteConfig, tmp_path: Path) -> None:
    settings = _failing("kill", tmp_path, at=3, times=10)
    config = write_config(tmp_path, **{**settings, "save_every_n_steps": 1, "max_steps": 40, "epochs": 10})
    launcher = ["run", "--nproc_per_node", "2", "--max-restarts", "10", "kd_recipes.distill"]
    command = [*launcher, "--config", str(config), "resume_from_checkpoint=auto"]
    done = run_tune(*command, cwd=tmp_path, **RELIABLE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kill").read_text() == "x" * 10
    assert list(logged(tmp_path / "run")) == list(range(1, 41))


@pytest.mark.slow
def test_two_processes_interrupted_at_every_step(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
    settings = {"max_steps": 20, "epochs": 4, "save_every_n_steps": 7, "eval_every_n_steps": 5, "batch_size": 2}
    config = write_config(tmp_path, **settings, eval_dataset=held_out, **{"model.attn_dropout": 0.1})
    _run_on_two("interrupt_every_step.py", config)
    unbroken = tmp_path / "unbroken"
    for at in range(1, 21):
        run = tmp_path / f"run{at}"
        files = [next((where / "final").glob("*.safetensors")) for where in (run, unbroken)]
        assert files[0].read_bytes() == files[1].read_bytes()
        for step, metrics in logged(unbroken).items():
            timeless = {name for name in metrics if not name.startswith(("time", "throughput", "memory"))}
            assert {name: logged(run)[step][name] for name in timeless} == {name: metrics[name] for name in timeless}


def test_a_process_that_hangs_is_named(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, **_failing("hang", tmp_path), distributed_timeout=20)
    command = ["run", "--nproc_per_node", "2", "kd_recipes.distill", "--config", str(config)]
    done = run_tune(*command, cwd=tmp_path)
    assert done.returncode != 0
    assert "process 1 did not answer for 20 s (distributed_timeout)" in done.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_all_processes_save_and_end_when_they_are_asked_to(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, max_steps=None, epochs=1000, save_every_n_steps=100_000)
    command = [str(TUNE), "run", "--nproc_per_node", "2", "kd_recipes.distill", "--config", str(config)]
    log = tmp_path / "output"
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file, env=environment)
        deadline = time.monotonic() + 120
        while "loss=" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    assert log.read_text().count("SIGTERM after step") == 2
    (newest,) = (tmp_path / "run" / "checkpoints").iterdir()
    step = int(newest.name.removeprefix("step_"))
    assert step == max(logged(tmp_path / "run"))
    assert distill(config, "resume_from_checkpoint=True", "batch_size=4", f"max_steps={step + 1}").step == step + 1
