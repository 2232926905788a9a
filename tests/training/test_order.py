"""Which samples a process gets, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from kd_recipes.training.order import Rows, Stream
from toy import Interrupted, Toys, distill, prepare, save_config, text_section

WriteConfig = Callable[..., Path]
LENGTHS_N = torch.randint(1, 100, (1003,), generator=torch.Generator().manual_seed(0))


def _grouped(rank: int = 0, world_size: int = 1) -> Rows:
    grouping: dict[str, Any] = {"lengths_N": LENGTHS_N, "samples_per_step": 8}
    return Rows(list(range(1003)), shuffle=True, seed=3, rank=rank, world_size=world_size, **grouping)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_has_samples_of_about_the_same_length(world_size: int) -> None:
    orders = [_grouped(rank, world_size).rows(1, 0, 10_000) for rank in range(world_size)]
    together = [row for turn in zip(*orders, strict=True) for row in turn]
    assert together[:1000] == _grouped().rows(1, 0, 1000)
    assert len(set(together)) == len(together) >= 1000
    steps = LENGTHS_N[together[:1000]].view(-1, 8)
    spread = (steps.amax(1) - steps.amin(1)).float().mean()
    assert spread < 4, "of 99 without grouping about 77"
    means = steps.float().mean(1)
    assert (means[1:] < means[:-1]).float().mean().item() == pytest.approx(0.5, abs=0.15), "the steps are not shuffled"
    assert together != _grouped().rows(2, 0, 10_000)[: len(together)]


def test_a_grouped_order_is_gone_on_with() -> None:
    whole = _grouped(1, 2)
    rows = list(whole.sampler)
    whole.seek(64, 3)
    assert list(whole.sampler) == rows[32:] == whole.rows(0, 32, 10_000)


class _Source:
    """Three rows, another first one in each pass."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter([10 * self.epoch + i for i in range(3)])


def test_a_stream_begins_again_and_can_be_gone_on_with() -> None:
    def stream(rank: int, world_size: int) -> Stream:
        return Stream(_Source(), lambda row: {"row": row}, rank=rank, world_size=world_size)

    def rows(of: Stream, number: int) -> list[int]:
        return [sample["row"] for sample in islice(of, number)]

    whole = [0, 1, 2, 10, 11, 12, 20, 21]
    assert rows(stream(0, 1), 8) == whole
    assert [rows(stream(rank, 2), 4) for rank in (0, 1)] == [whole[::2], whole[1::2]]
    behind = stream(1, 2)
    behind.seek(4, 0)
    assert rows(behind, 2) == whole[5::2]
    assert behind.rows(0, 2, 4) == [5, 7]


@pytest.mark.parametrize("kind", ["stream", "grouped"])
def test_a_run_goes_on_where_it_was(kind: str, toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 16, "epochs": 2, "save_every_n_steps": 5}
    settings["seed"] = None  # drawn, and saved
    if kind == "stream":
        settings |= {"dataset.streaming": True, "shuffle_buffer_size": 4}
        settings |= {
            "eval_dataset": text_section(toys.data / "held_out.jsonl", toys.data / "cache", streaming=True),
            "max_eval_batches": 2,
        }
    else:
        settings["group_by_length"] = True
    config = write_config(tmp_path, **settings)
    unbroken = distill(config, f"output_dir={tmp_path / 'unbroken'}")
    config = save_config(OmegaConf.load(config), config, seed=unbroken._seed)
    with pytest.raises(Interrupted):
        distill(config, "metric_logger._component_=toy.InterruptingLogger", "metric_logger.stop_at=14")
    resumed = prepare(config, "resume_from_checkpoint=True", "seed=null")
    assert resumed.step in (10, 12)
    resumed.train()
    resumed.cleanup()
    assert resumed.step == 16
    parameters = unbroken._updates.parameters
    assert all(torch.equal(value, parameters[name]) for name, value in resumed._updates.parameters.items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dataset.streaming": True, "max_steps": None}, "wanted max_steps alone: dataset is a stream"),
        ({"dataset.streaming": True, "max_steps_per_epoch": 2}, "wanted max_steps alone: dataset is a stream"),
        ({"dataset.streaming": True, "group_by_length": True}, "False with dataset.streaming"),
        ({"dataset.packed": True, "dataset.streaming": True}, "dataset.packed: got True, wanted False with streaming"),
        ({"dataset.packed": True, "group_by_length": True}, "False with dataset.packed"),
        ({"shuffle": False, "group_by_length": True}, "False with shuffle=False"),
        ({"shuffle_buffer_size": 0}, "rows of a stream"),
    ],
)
def test_what_does_not_go_together(
    settings: dict[str, Any], message: str, write_config: WriteConfig, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(write_config(tmp_path, **settings))


def test_held_out_streams_need_an_end(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> None:
    held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache", streaming=True)
    with pytest.raises(ValueError, match="max_eval_batches: got None, wanted a number: eval_dataset is a stream"):
        prepare(write_config(tmp_path, eval_dataset=held_out))
