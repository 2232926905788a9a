"""Traces of a run: Chrome's JSON, which Perfetto opens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kd_recipes.monitoring.timing import PHASES, StepTimer
from toy import distill

PROFILER = {
    "_component_": "torchtune.training.setup_torch_profiler",
    "enabled": True,
    "cpu": True,
    "cuda": False,
    "xpu": False,
    "output_dir": "${output_dir}/profile",
    "wait_steps": 1,
    "warmup_steps": 1,
    "active_steps": 2,
    "num_cycles": 1,
}


def _complete_events(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_a_run_leaves_a_trace_of_the_steps_asked_for(write_config: Callable[..., Path], tmp_path: Path) -> None:
    distill(write_config(tmp_path, profiler=PROFILER, max_steps=5))
    (file,) = (tmp_path / "run" / "profile").rglob("*.pt.trace.json.gz")
    with gzip.open(file, "rt", encoding="utf-8") as content:
        events = _complete_events(json.load(content))
    # what Perfetto needs of a complete event; times are microseconds
    assert all({"name", "ts", "dur", "pid", "tid"} <= set(event) for event in events)
    assert all(event["dur"] >= 0 for event in events)
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert "aten::mm" in {event["name"] for event in events}


def test_the_phases_of_a_step_are_in_its_trace(tmp_path: Path) -> None:
    timer = StepTimer(torch.device("cpu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for phase in PHASES:
            with timer.phase(phase):
                torch.ones(8)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = _complete_events(json.loads((tmp_path / "trace.json").read_text()))
    spans = {event["name"]: (event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] in PHASES}
    assert sorted(spans, key=spans.__getitem__) == list(PHASES)
    calls = sorted(event["ts"] for event in events if event["name"] == "aten::ones")
    assert len(calls) == len(PHASES)
    for ts, (start, end) in zip(calls, sorted(spans.values()), strict=True):
        assert start <= ts <= end
    seconds = timer.finish(1)
    assert {f"time/{phase}" for phase in PHASES} <= set(seconds)
    assert seconds["time/loss"] == pytest.approx((spans["loss"][1] - spans["loss"][0]) / 1e6, rel=0.5, abs=2e-3)
