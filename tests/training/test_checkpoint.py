"""What a checkpoint gives back, and what stays the config's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torchtune.training import get_cosine_schedule_with_warmup

from kd_recipes.errors import ConfigError
from kd_recipes.training.checkpoint import Background, RunDirectory, load_optimizer
from kd_recipes.training.parallel import Parallel
from kd_recipes.training.step import Updates

ALONE = Parallel(0, 1, torch.device("cpu"))


def schedule(optimizer: Optimizer) -> Any:
    return get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=20)


def steps(optimizer: Optimizer, scheduler: Any, count: int) -> list[float]:
    """The learning rates of some steps."""
    rates = []
    for _ in range(count):
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.full_like(weight, 0.5)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return rates


def begin(build: Callable[..., Optimizer], scheduled: bool, **settings: Any) -> tuple[Optimizer, Any]:
    optimizer = build([nn.Parameter(torch.ones(2, 3))], **settings)
    return optimizer, schedule(optimizer) if scheduled else None


def saved(optimizer: Optimizer, scheduler: Any) -> dict[str, Any]:
    return {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict() if scheduler else None}


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_same_settings_go_on_as_if_nothing_had_happened(scheduled: bool) -> None:
    first = begin(AdamW, scheduled, lr=0.1)
    steps(*first, 5)
    second = begin(AdamW, scheduled, lr=0.1)
    load_optimizer(*second, saved(*first))
    assert steps(*second, 5) == steps(*first, 5)
    old, new = (part[0].state_dict()["state"][0] for part in (first, second))
    assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("scheduled", [False, True])
def test_another_rate_counts_from_where_the_schedule_stands(scheduled: bool) -> None:
    first = begin(AdamW, scheduled, lr=0.1, weight_decay=0.1)
    steps(*first, 5)
    second = begin(AdamW, scheduled, lr=0.01, weight_decay=0.0)
    load_optimizer(*second, saved(*first))
    assert second[0].param_groups[0]["weight_decay"] == 0.0
    assert steps(*second, 5) == pytest.approx([rate / 10 for rate in steps(*first, 5)])


def test_a_schedule_that_is_left_out_leaves_the_rate_of_the_config() -> None:
    first = begin(AdamW, True, lr=0.1)
    steps(*first, 2)
    second = begin(AdamW, False, lr=0.1)
    load_optimizer(*second, saved(*first))
    assert steps(*second, 3) == [0.1] * 3


@pytest.mark.parametrize(("before", "after", "missing"), [(AdamW, SGD, "dampening, momentum"), (SGD, Adam, "betas")])
def test_another_kind_of_optimizer_is_refused(before: Any, after: Any, missing: str) -> None:
    first = begin(before, False, lr=0.1)
    steps(*first, 2)
    with pytest.raises(ValueError, match="the optimizer that was saved has no .*" + missing.split(", ")[0]):
        load_optimizer(*begin(after, False, lr=0.1), saved(*first))


class Peculiar(SGD):
    """An optimizer whose state is of kinds that no file takes as they are."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        shared = torch.arange(4.0)
        for parameter in self.param_groups[0]["params"]:
            own = {"shared": shared, "transposed": torch.arange(6.0).view(2, 3).T, "a.b": torch.ones(3), "none": None}
            self.state[parameter] |= {**own, 0: torch.ones(2)}


def eight_bit(parameters: Any, lr: float) -> Optimizer:
    from torchao.optim import AdamW8bit

    optimizer: Optimizer = AdamW8bit(parameters, lr=lr)
    return optimizer


def _state(value: Any) -> Any:
    return value.dequantize() if hasattr(value, "dequantize") and type(value) is not torch.Tensor else value


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("build", [SGD, AdamW, Peculiar, eight_bit])
def test_whatever_an_optimizer_keeps_comes_back(build: Any, enabled: bool, tmp_path: Path) -> None:
    def parameters() -> dict[str, nn.Parameter]:
        return {name: nn.Parameter(torch.ones(64, 128)) for name in ("a", "a.b")}

    def updates(of: dict[str, nn.Parameter]) -> Updates:
        def build_optimizer(groups: Any) -> tuple[Optimizer, None]:
            return build(groups, lr=0.1), None

        return Updates(of, {}, build_optimizer, master_weights=True, clip_grad_norm=None, parallel=ALONE)

    first = updates(parameters())
    for name, parameter in first.parameters.items():
        parameter.grad = torch.full_like(parameter, float(len(name)))
    first.apply()
    run = RunDirectory(tmp_path)
    background = Background(run, ALONE, enabled=enabled)
    background.save(1, *first.state_dict())
    background.wait()
    second = updates(parameters())
    second.load_state_dict(*run.load(), ALONE)
    before, after = (part.optimizer.state_dict()["state"] for part in (first, second))
    assert before.keys() == after.keys()
    for index, entries in before.items():
        assert entries.keys() == after[index].keys()
        for key, value in entries.items():
            torch.testing.assert_close(_state(after[index][key]), _state(value), rtol=0, atol=0)
    assert all(torch.equal(second.parameters[name], value) for name, value in first.parameters.items())


def test_a_run_that_went_back_drops_the_steps_of_the_way_it_left(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path, keep_last_n=2)
    for step in (10, 20, 30):
        run.save(step, {"weight": torch.tensor([float(step)])}, {"step": step}, ALONE)
    assert [path.name for path in run.checkpoints()] == ["step_00000020", "step_00000030"]
    run.save(25, {"weight": torch.tensor([25.0])}, {"step": 25}, ALONE)  # resumed from 20
    assert [path.name for path in run.checkpoints()] == ["step_00000020", "step_00000025"]
    assert run.load()[1]["step"] == 25
    assert run.find("step_00000020").name == "step_00000020"
    with pytest.raises(
        ConfigError, match=r"step_7', wanted a checkpoint that is there: \['step_00000020', 'step_00000025'\]"
    ):
        run.find("step_7")
