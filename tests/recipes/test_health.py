"""Over-distillation on purpose: a student that ends in templates raises alarms, a healthy one none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bad_input import WriteConfig

from kd_recipes.entry import run_recipe
from kd_recipes.history import History
from toy import Toys, distill, sentence, text_section, write_jsonl

TEMPLATED = [{"text": "the cat sat on the mat and the cat sat on the mat"}] * 8
HEALTH = {"_component_": "kd_recipes.monitoring.Health", "num_prompts": 8, "prompt_length": 2, "max_new_tokens": 24}
IN_TEMPLATES = {"commonest_opening", "distinct_2", "self_bleu", "repetition_4"}


@pytest.fixture
def settings(toys: Toys) -> dict[str, Any]:
    held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
    return {"eval_dataset": held_out, "batch_size": 8, "shuffle": False, "max_steps": None, "health": dict(HEALTH)}


@pytest.fixture
def collapsing(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Many epochs of one sentence, at a high learning rate and by its labels alone."""
    text = str(write_jsonl(tmp_path / "templated.jsonl", TEMPLATED))
    run = {"epochs": 64, "eval_every_n_steps": 8, "kd_ratio": 0.0, "optimizer.lr": 2e-2}
    return {**settings, **run, "dataset.data_files": text}


def fired(run: Path) -> dict[str, int]:
    """Signal -> the step of its first alert."""
    found: dict[str, int] = {}
    for entry in History(run).read("alert"):
        found.setdefault(entry.values["signal"], entry.step)
    return found


def of_steps(run: Path, metric: str) -> dict[int, float]:
    """Step -> a metric of the training."""
    return {entry.step: entry.values[metric] for entry in History(run).read("train")}


def test_templates_raise_alarms_that_say_what_to_do(
    collapsing: dict[str, Any], write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    distill(write_config(tmp_path, **collapsing))
    alerts = fired(tmp_path / "run")
    assert len(IN_TEMPLATES & alerts.keys()) >= 2, alerts
    assert {"kl_gap", "entropy_ratio"} & alerts.keys(), alerts
    assert min(alerts.values()) >= 16  # two evaluations in a row
    said = capfd.readouterr()
    assert "ALERT step" in said.out + said.err
    assert "To do: lower kd_ratio or raise temperature" in said.out + said.err
    entry = list(History(tmp_path / "run").read("health"))[-1]
    assert entry.values["entropy"] < 0.7 * entry.values["teacher_entropy"]
    samples = list(History(tmp_path / "run").read("samples"))[-1].values["samples"]
    assert len(samples) == 6  # as many as there are held-out texts
    assert all(sample.keys() == {"prompt", "teacher", "student"} for sample in samples)


def test_a_healthy_run_raises_none(settings: dict[str, Any], write_config: WriteConfig, tmp_path: Path) -> None:
    text = str(write_jsonl(tmp_path / "varied.jsonl", [{"text": sentence(index)} for index in range(96)]))
    run = {"epochs": 1, "eval_every_n_steps": 2, "kd_ratio": 1.0, "optimizer.lr": 1e-3}
    distill(write_config(tmp_path, **settings, **run, **{"dataset.data_files": text}))
    assert len(list(History(tmp_path / "run").read("health"))) == 7
    assert fired(tmp_path / "run") == {}


def test_it_can_stop_the_run(
    collapsing: dict[str, Any], write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    collapsing["health"]["action"] = "stop"
    recipe = distill(write_config(tmp_path, **collapsing))
    first = min(fired(tmp_path / "run").values())
    assert recipe.step == first < 64
    assert json.loads((tmp_path / "run" / "final" / "held_out.json").read_text())["step"] == first
    said = capfd.readouterr()
    assert "stopped by health.action" in said.out + said.err


def test_it_can_go_back_to_the_best_student(
    collapsing: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    collapsing["health"]["action"] = "restore_best"
    distill(write_config(tmp_path, **collapsing, best_metric="perplexity"))
    run = tmp_path / "run"
    first = min(fired(run).values())
    perplexities = {entry.step: entry.values["perplexity"] for entry in History(run).read("held_out")}
    best = min(perplexities, key=perplexities.__getitem__)
    assert (run / "best_state" / "checkpoints" / f"step_{best:08d}").is_dir()
    # the text is one sentence: eight steps from the best student lead to where they did the first time
    assert perplexities[first + 8] == pytest.approx(perplexities[best + 8], rel=1e-5)
    assert list(of_steps(run, "optimizer/lr")) == list(range(1, 65))  # the steps go on


def test_it_does_not_go_back_for_ever(
    collapsing: dict[str, Any], write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    collapsing["health"] |= {"action": "restore_best", "max_restores": 1}
    recipe = distill(write_config(tmp_path, **collapsing, best_metric="perplexity"))
    alarms = sorted({entry.step for entry in History(tmp_path / "run").read("alert")})
    assert recipe.step == alarms[1] < 64
    said = capfd.readouterr()
    assert "going on from the student" in said.out + said.err
    assert "stopped by health.action" in said.out + said.err


def test_it_can_anneal_kd_ratio_and_a_resumed_run_remembers(
    collapsing: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    collapsing["health"] |= {"action": "anneal_kd_ratio", "kd_ratio_factor": 0.25}
    collapsing |= {"kd_ratio": 0.4, "epochs": 40, "save_every_n_steps": 16}
    distill(write_config(tmp_path, **collapsing))
    run = tmp_path / "run"
    first = min(fired(run).values())
    ratios = of_steps(run, "kd/kd_ratio")
    assert ratios[first] == pytest.approx(0.4)
    assert ratios[first + 1] == pytest.approx(0.1)
    before = list(History(run).read())
    for name in ("best", "final"):
        assert (run / name).is_dir()
    checkpoint = sorted((run / "checkpoints").iterdir())[0].name
    distill(
        write_config(tmp_path, **collapsing, resume_from_checkpoint=True),
        f"checkpointer.recipe_checkpoint={checkpoint}",
    )
    after = list(History(run).read())
    assert [(entry.step, entry.split) for entry in after] == [(entry.step, entry.split) for entry in before]
    assert of_steps(run, "kd/kd_ratio") == ratios


def test_a_run_that_begins_anew_forgets_the_one_that_saved_nothing(
    settings: dict[str, Any], write_config: WriteConfig, tmp_path: Path
) -> None:
    config = write_config(tmp_path, **{**settings, "max_steps": 1}, resume_from_checkpoint="auto")
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.yaml").write_text("{}")  # begun, and killed after its first evaluation
    History(run).append(0, "held_out", {"kl": 7.0})
    History(run).append(0, "health", {"held_out_kl": 7.0})
    distill(config)
    assert [entry.step for entry in History(run).read("held_out")] == [0, 1]
    assert [entry.step for entry in History(run).read("health")] == [0, 1]
    assert all(entry.values["kl"] != 7.0 for entry in History(run).read("held_out"))


def test_null_watches_over_nothing(settings: dict[str, Any], write_config: WriteConfig, tmp_path: Path) -> None:
    distill(write_config(tmp_path, **{**settings, "health": None, "max_steps": 2}))
    assert not list(History(tmp_path / "run").read("health", "samples"))
    assert list(History(tmp_path / "run").read("held_out"))


def test_wrong_limits_are_refused(
    settings: dict[str, Any], write_config: WriteConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, **settings)
    overrides = ["health.persistence=0", "health.action=panic"]
    assert run_recipe("distill", ["--config", str(config), *overrides]) == 2
    error = capfd.readouterr().err
    assert "health.persistence: got 0, wanted a whole number above 0" in error
    assert "health.action: got 'panic', wanted one of warn, stop, restore_best" in error
