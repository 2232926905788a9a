"""The phases of a step add up to it, and measuring them costs next to nothing."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator

import pytest
import torch

from kd_recipes.monitoring.timing import PHASES, StepTimer, memory_stats

CPU = torch.device("cpu")


def test_phases_of_several_micro_batches_add_up_to_the_step() -> None:
    timer = StepTimer(CPU)
    start = time.perf_counter()
    for _ in range(3):
        with timer.phase("student"):
            time.sleep(0.01)
            with timer.phase("teacher"):  # a moment belongs to the innermost
                time.sleep(0.05)
            time.sleep(0.01)
        time.sleep(0.01)
    found = timer.finish(num_tokens=100)
    elapsed = time.perf_counter() - start
    times = {name: value for name, value in found.items() if name.startswith("time/")}
    assert list(times) == ["time/student", "time/teacher", "time/other", "time/step"]
    assert times["time/student"] >= 0.06
    assert times["time/teacher"] >= 0.15
    assert times["time/other"] >= 0.03
    assert times["time/student"] <= elapsed - 0.18
    assert times["time/other"] <= elapsed - 0.21
    assert times.pop("time/step") == pytest.approx(sum(times.values()))
    assert sum(times.values()) <= elapsed
    assert found["throughput/tokens_per_second"] == 100 / found["time/step"]
    assert timer.finish(num_tokens=100) == {}


def test_a_step_begins_with_its_data_and_what_lies_between_steps_is_of_none() -> None:
    def items() -> Iterator[int]:
        for item in range(3):
            time.sleep(0.02)
            yield item

    timer = StepTimer(CPU)
    seen = []
    began = time.perf_counter()
    for item in timer.steps(items()):
        seen.append(item)
        if item != 1:  # a step that is given up is not added to the next
            with timer.phase("loss"):
                time.sleep(0.01)
            found = timer.finish(1)
            elapsed = time.perf_counter() - began
            assert 0.02 <= found["time/data"] <= elapsed - 0.01
            assert 0.03 <= found["time/step"] <= elapsed
        time.sleep(0.1)  # an evaluation
        began = time.perf_counter()
    assert seen == [0, 1, 2]


def test_a_phase_that_fails_ends() -> None:
    timer = StepTimer(CPU)
    with pytest.raises(RuntimeError), timer.phase("loss"):
        raise RuntimeError
    time.sleep(0.01)
    assert timer.finish(1)["time/other"] >= 0.01


def test_timing_costs_next_to_nothing() -> None:
    timer = StepTimer(CPU)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        for name in PHASES:
            with timer.phase(name):
                pass
        timer.finish(1)
        best = min(best, time.perf_counter() - start)
    print(f"\n{len(PHASES)} phases of a step: {1e6 * best:.0f} us")
    assert best < 2e-4  # 2% of a step of 10 ms, which no model that is of use takes


def test_memory_is_that_of_the_process() -> None:
    before = memory_stats(CPU)
    with mmap.mmap(-1, 2**28) as fresh:  # 256 MiB that nobody has had before
        fresh.write(b"x" * 2**28)
        after = memory_stats(CPU)
    assert list(after) == ["memory/process_gib"]
    assert after["memory/process_gib"] - before["memory/process_gib"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.gpu
def test_phases_on_a_gpu_are_its_own_time() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    timer = StepTimer(device)
    start = time.perf_counter()
    with timer.phase("student"):
        for _ in range(50):
            a = (a @ a).clamp(-1, 1)
    issued = time.perf_counter() - start
    with timer.phase("loss"):
        a.sum()
    found = timer.finish(1)
    whole = time.perf_counter() - start
    assert found["time/student"] > issued  # nothing has waited for the device
    assert found["time/student"] == pytest.approx(whole, rel=0.2)
    assert found["time/loss"] < 0.1 * found["time/student"]
    stats = memory_stats(device)
    assert 0.06 < stats["memory/allocated_gib"] <= stats["memory/peak_gib"] <= stats["memory/reserved_gib"]
