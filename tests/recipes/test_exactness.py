"""What must not depend on how a run is cut up: a step into micro-batches, a run into processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_recipes.distill import DistillRecipe
from kd_recipes.entry import EXIT_STOPPED, run_recipe
from kd_recipes.training.checkpoint import RunDirectory
from toy import Interrupted, Toys, distill, logged, lora_section, prepare

WriteConfig = Callable[..., Path]


# ---------------------------------------------------------------------------------------------------- micro-batches
def _chat(toys: Toys) -> dict[str, Any]:
    """Conversations of different lengths, of which the answers alone have labels: masks are ragged."""
    section = {"_component_": "torchtune.datasets.chat_dataset", "conversation_style": "openai", "source": "json"}
    section |= {"conversation_column": "messages", "split": "train", "train_on_input": False}
    return {**section, "data_files": str(toys.data / "chat.jsonl"), "cache_dir": str(toys.data / "cache")}


def _train(config: Path, *overrides: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The student's weights before and after a run."""
    recipe = prepare(config, *overrides)
    before = {name: tensor.detach().clone() for name, tensor in recipe.student.trainable().items()}
    recipe.train()
    recipe.cleanup()
    return before, recipe.student.trainable()


# plain SGD: Adam would hide a gradient of the wrong size
SGD = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.25}, "kd_ratio": 0.6, "temperature": 2.0}
TORCHTUNE_LOSSES = {
    "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
    "kd_loss": {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"},
}


@pytest.mark.parametrize("losses", ["ours", "torchtune's"])
@pytest.mark.parametrize("clip_grad_norm", [None, 1.0])
def test_updates_do_not_depend_on_the_split_into_micro_batches(
    losses: str, clip_grad_norm: float | None, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    overrides = {"dataset": _chat(toys), "clip_grad_norm": clip_grad_norm, "max_steps": 2, **SGD}
    overrides |= {} if losses == "ours" else TORCHTUNE_LOSSES
    config = write_config(tmp_path, **overrides)
    weights = {}
    for size in (8, 4, 2, 1):
        split = [f"batch_size={size}", f"gradient_accumulation_steps={8 // size}"]
        before, weights[size] = _train(config, *split, f"output_dir={tmp_path / str(size)}")
    whole = torch.cat([(weights[8][name] - before[name]).flatten() for name in before])
    for size in (4, 2, 1):
        difference = torch.cat([(weights[size][name] - weights[8][name]).flatten() for name in before])
        relative = (difference.norm() / whole.norm()).item()
        print(
            f"\n{losses}, clip_grad_norm {clip_grad_norm}, {size}x{8 // size}: updates differ by {relative:.1e}", end=""
        )
        assert relative < 1e-5
        for name, tensor in weights[8].items():
            # of each tensor too, beyond what rounding the weight itself after either step leaves
            allowed = 1e-5 * (tensor - before[name]).norm() + 2**-23 * tensor.norm()
            assert (weights[size][name] - tensor).norm() < allowed, name


# ----------------------------------------------------------------------------------------------------------- resuming
def _state(recipe: DistillRecipe) -> dict[str, Any]:
    """Everything that decides how a run goes on."""
    optimizer = recipe._updates.optimizer.state_dict()
    return {
        "weights": recipe.student.trainable(),
        "optimizer": optimizer["state"],
        "lr": [group["lr"] for group in optimizer["param_groups"]],
        "scheduler": recipe._updates.scheduler.state_dict() if recipe._updates.scheduler else None,
        "masters": recipe._updates.parameters,
        "random": torch.get_rng_state(),
        "best": recipe._best,
        "step": recipe.step,
    }


def _assert_equal(got: Any, expected: Any, path: str = "") -> None:
    """Bit for bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected), path
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), path
        for key in expected:
            _assert_equal(got[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(got) == len(expected), path
        for index, item in enumerate(expected):
            _assert_equal(got[index], item, f"{path}[{index}]")
    else:
        assert got == expected, path


def _exact(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if not name.startswith(("time", "throughput", "memory"))}


# 24 texts in micro-batches of 2, 2 a step: 6 steps an epoch, 12 in all
RUN = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 2, "max_steps": None, "shuffle": True}
SCHEDULE = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 3}
INTERRUPTING = ["metric_logger._component_=toy.InterruptingLogger"]
# (save_every_n_steps, where the run stops, the step it is resumed from)
STOPS = {"mid_epoch": (4, 5, 4), "epoch_boundary": (None, 8, 6), "mid_second_epoch": (4, 10, 8), "on_a_step": (3, 4, 3)}


def _student(kind: str, toys: Toys) -> dict[str, Any]:
    """A student with dropout: the random state has to come back too."""
    if kind == "lora":
        return {"model": lora_section(toys.student, lora_dropout=0.1)}
    full = {"model.attn_dropout": 0.1, "optimizer.lr": 1e-3}
    return full | ({"dtype": "bf16"} if kind == "bf16_full" else {})


@pytest.mark.parametrize(
    ("kind", "stop"),
    [
        ("full", "mid_epoch"),
        ("full", "epoch_boundary"),
        ("full", "mid_second_epoch"),
        ("bf16_full", "on_a_step"),
        ("lora", "mid_epoch"),
        ("lora", "epoch_boundary"),
    ],
)
def test_a_resumed_run_equals_an_unbroken_one(
    kind: str, stop: str, toys: Toys, write_config: WriteConfig, tmp_path: Path
) -> None:
    save_every, stop_at, resume_from = STOPS[stop]
    held_out = {**_chat(toys), "_component_": "torchtune.datasets.chat_dataset"}
    overrides = {**RUN, **_student(kind, toys), "lr_scheduler": SCHEDULE, "save_every_n_steps": save_every}
    overrides |= {"eval_dataset": held_out, "eval_every_n_steps": 4, "clip_grad_norm": 1.0}
    config = write_config(tmp_path, **overrides)
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    assert unbroken.step == 12

    with pytest.raises(Interrupted):
        distill(config, *INTERRUPTING, f"metric_logger.stop_at={stop_at}")
    assert RunDirectory(tmp_path / "run").checkpoints()[-1].name == f"step_{resume_from:08d}"
    assert not (tmp_path / "run" / "final").exists()
    resumed = prepare(config, "resume_from_checkpoint=True")
    assert resumed.step == resume_from
    resumed.train()
    resumed.cleanup()

    _assert_equal(_state(resumed), _state(unbroken))
    expected, got = logged(tmp_path / "unbroken"), logged(tmp_path / "run")
    assert got.keys() == expected.keys()
    for step, metrics in expected.items():
        assert _exact(got[step]) == _exact(metrics), step
    for result in ("best", "final"):
        files = ((tmp_path / run / result).rglob("*.safetensors") for run in ("run", "unbroken"))
        pairs = list(zip(*map(sorted, files), strict=True))
        assert pairs
        assert all(a.read_bytes() == b.read_bytes() for a, b in pairs)


def test_packed_text_is_resumed_where_it_was(write_config: WriteConfig, tmp_path: Path) -> None:
    overrides = {**RUN, "batch_size": 1, "gradient_accumulation_steps": 1, "save_every_n_steps": 1}
    config = write_config(tmp_path, **overrides, **{"dataset.packed": True})
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    assert unbroken.step > 3
    with pytest.raises(Interrupted):
        distill(config, *INTERRUPTING, "metric_logger.stop_at=2")
    _assert_equal(_state(distill(config, "resume_from_checkpoint=True")), _state(unbroken))


def test_a_named_checkpoint_is_resumed_from(write_config: WriteConfig, tmp_path: Path) -> None:
    config = write_config(tmp_path, **RUN, save_every_n_steps=2, keep_last_n_checkpoints=3)
    unbroken = distill(config)
    assert [path.name for path in RunDirectory(tmp_path / "run").checkpoints()][-1] == "step_00000012"
    name = RunDirectory(tmp_path / "run").checkpoints()[0].relative_to(tmp_path / "run")
    again = prepare(config, "resume_from_checkpoint=True", f"checkpointer.recipe_checkpoint={name}")
    assert again.step == 8
    again.train()
    again.cleanup()
    _assert_equal(_state(again), _state(unbroken))


# ----------------------------------------------------------------------------------------------------------- full disk
@pytest.fixture
def _unlimited_files() -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# a checkpoint is some 300 KiB of weights and twice as much state: the limit breaks off one file or the other
@pytest.mark.parametrize("max_bytes", [100_000, 450_000])
@pytest.mark.usefixtures("_unlimited_files")
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(
    max_bytes: int, write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    config = write_config(tmp_path, **RUN, save_every_n_steps=2)
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk = ["metric_logger._component_=toy.FullDiskLogger", "metric_logger.full_at=4"]
    status = run_recipe("distill", ["--config", str(config), *full_disk, f"metric_logger.max_bytes={max_bytes}"])
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == EXIT_STOPPED
    assert "What had been saved before is untouched" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    resumed = prepare(config, "resume_from_checkpoint=True")
    assert resumed.step == 2
    resumed.train()
    resumed.cleanup()
    _assert_equal(_state(resumed), _state(unbroken))


def test_a_run_that_has_ended_goes_on_for_another_epoch(write_config: Callable[..., Path], tmp_path: Path) -> None:
    first = distill(write_config(tmp_path, max_steps=None), "epochs=1")
    more = distill(write_config(tmp_path, max_steps=None), "epochs=2", "resume_from_checkpoint=True")
    assert more.step == 2 * first.step
