"""The sweep as a user runs it: trials are real distillations of toys, in processes of their own."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from optuna.trial import TrialState
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from kd_recipes.config import configured
from kd_recipes.entry import EXIT_BAD_INPUT, EXIT_STOPPED, run_recipe
from kd_recipes.errors import ConfigError
from kd_recipes.history import History
from kd_recipes.searching.page import html
from kd_recipes.searching.records import Metric, markdown
from kd_recipes.searching.space import build_space
from kd_recipes.searching.strategy import Strategy
from kd_recipes.searching.study import Search
from kd_recipes.searching.trials import CONFIG, LOG, end_leftover, why_failed
from toy import TUNE, Toys, distill, text_section

WriteConfig = Callable[..., Path]
OWN, BETTER = 1e-8, 2e-2  # learning rates: the config's, at which nothing is learned, and the one to be found
NUM_STEPS = 120  # seconds: a trial that is asked to end must not have come to its end by itself
CHECKED = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}


@pytest.fixture
def base(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Path:
    """A distillation's config, evaluated every 6 steps."""
    held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
    length = {"max_steps": NUM_STEPS, "epochs": 50, "eval_every_n_steps": 6}
    return write_config(tmp_path, eval_dataset=held_out, health=None, **length, **{"optimizer.lr": OWN})


@pytest.fixture
def write_sweep(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """``write_sweep(**settings)`` writes a sweep over learning rates, and returns its path."""

    def write(**settings: Any) -> Path:
        config = {
            "recipe": "sweep",
            "output_dir": str(tmp_path / "sweep"),
            "config": str(base),
            "search": {"optimizer.lr": {"choices": [OWN, BETTER]}},
            "sampler": "grid",
            "num_startup_trials": 1,
            "num_warmup_steps": 12,
            **settings,
        }
        OmegaConf.save(OmegaConf.create(config), tmp_path / "sweep.yaml")
        return tmp_path / "sweep.yaml"

    return write


def read_trials(directory: Path) -> list[dict[str, Any]]:
    """The trials of a sweep.json, in the order of their names."""
    trials: list[dict[str, Any]] = json.loads((directory / "sweep.json").read_text(encoding="utf-8"))["trials"]
    return trials


# ------------------------------------------------------------------------------------------------------ the whole way
def interrupt(config: Path, in_trial: Path) -> int:
    """Start the real command, and end it as Ctrl-C does when a trial has been evaluated."""
    sweep = subprocess.Popen([str(TUNE), "run", "kd_recipes.sweep", "--config", str(config)])
    while sweep.poll() is None and not any(entry.step > 0 for entry in History(in_trial).read("held_out")):
        time.sleep(0.02)
    sweep.send_signal(signal.SIGINT)
    return sweep.wait()


def test_a_search_that_is_interrupted_goes_on_and_finds_the_best(
    write_sweep: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, out = write_sweep(), tmp_path / "sweep"
    assert interrupt(config, out / "trials" / "000") == 128 + signal.SIGINT
    assert "SIGINT; the same command goes on from here" in capfd.readouterr().err
    assert not (out / "sweep.json").exists()
    assert (out / "trials" / "000" / "checkpoints").is_dir()  # it has saved itself, and is gone

    assert run_recipe("sweep", ["--config", str(config)]) == 0
    hopeless, best = read_trials(out)
    assert [(trial["name"], trial["status"]) for trial in (hopeless, best)] == [("000", "pruned"), ("001", "complete")]
    assert (hopeless["is_baseline"], hopeless["values"]) == (True, {"optimizer.lr": OWN})
    assert (best["is_baseline"], best["values"]) == (False, {"optimizer.lr": BETTER})
    assert best["metric"] == best["held_out"]["perplexity"] < hopeless["metric"]
    assert 12 <= hopeless["num_steps"] < best["num_steps"] == NUM_STEPS
    trained = [entry.step for entry in History(out / "trials" / "000").read("train")]
    assert trained == [*range(1, hopeless["num_steps"] + 1)], "each step once: it went on from its checkpoint"

    kept = {path.relative_to(out / "trials").parts[:2] for path in out.rglob("*.safetensors")}
    assert kept == {("001", name) for name in ("best", "final", "checkpoints")}
    printed = capfd.readouterr().out
    assert f"Best of 2 trials: 001 with optimizer.lr {BETTER}: perplexity {best['metric']:.4g} at step" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("| 00")] == ["001", "000"]
    assert hyperparameters(out / "hparams" / "001") == ({"optimizer.lr": BETTER}, pytest.approx(best["metric"]))
    recipe = distill(out / "best.yaml", "max_steps=2")
    assert (recipe.step, recipe._cfg.optimizer.lr) == (2, BETTER)
    assert (out / "best" / "final").is_dir()


def hyperparameters(run: Path) -> tuple[dict[str, float], float]:
    """What TensorBoard's HPARAMS page reads of a run: its settings, and its perplexity."""
    accumulator = EventMultiplexer({"run": str(run)}).Reload().GetAccumulator("run")
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    values = {name: value.number_value for name, value in settings.items()}
    return values, accumulator.Tensors("sweep/perplexity")[0].tensor_proto.float_val[0]


# ---------------------------------------------------------------------------------------------------------- failures
def test_three_failures_in_a_row_end_it_with_the_last_message(
    write_sweep: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    (broken / "torchtune").mkdir(parents=True)
    (broken / "torchtune" / "__init__.py").write_text("raise ImportError('there is something <wrong> with it')")
    monkeypatch.setenv("PYTHONPATH", str(broken))
    config = write_sweep(search=CHECKED, sampler="random")
    assert run_recipe("sweep", ["--config", str(config)]) == EXIT_STOPPED
    message = "exit status 1: ImportError: there is something <wrong> with it"
    assert f"3 trials failed one after the other, the last one: {message}" in capfd.readouterr().err
    assert [trial["message"] for trial in read_trials(tmp_path / "sweep")] == [message] * 3
    page = (tmp_path / "sweep" / "sweep.html").read_text(encoding="utf-8")
    assert "something &lt;wrong&gt; with it" in page
    assert not (tmp_path / "sweep" / "best.yaml").exists()


def test_why_a_trial_failed(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def said(*overrides: str, status: int) -> str:
        argv = ["--config", str(base), f"output_dir={tmp_path}/{len(overrides)}", *overrides]
        assert run_recipe("distill", argv) == status
        (tmp_path / LOG).write_text(capfd.readouterr().err, encoding="utf-8")
        return why_failed(tmp_path, status)

    assert said("optimizer.lr=1e30", status=EXIT_STOPPED).startswith("step 2: loss ")
    assert said("batch_size=0", "max_steps=0", status=EXIT_BAD_INPUT).startswith("batch_size: got 0, wanted sequences")
    (tmp_path / LOG).write_text("step 3\n")
    assert why_failed(tmp_path, -9) == "ended by SIGKILL"


def test_no_trial_begins_when_the_time_is_over(
    write_sweep: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_recipe("sweep", ["--config", str(write_sweep(timeout_minutes=1e-9))]) == 0
    assert "0 of 2 trials" in capfd.readouterr().out
    assert not (tmp_path / "sweep" / "trials").exists()


def test_a_trial_that_outlived_its_search_is_ended(tmp_path: Path) -> None:
    sleep = "[sys.executable, '-c', 'import time; time.sleep(60)', *sys.argv[1:]]"
    start = f"import subprocess, sys; print(subprocess.Popen({sleep}, stdout=subprocess.DEVNULL).pid)"
    command = [sys.executable, "-c", start, "kd_recipes/distill", "--config"]
    left, other = (
        psutil.Process(int(subprocess.check_output([*command, str(where / CONFIG)])))
        for where in (tmp_path, tmp_path / "other")
    )
    end_leftover(tmp_path)
    assert psutil.wait_procs([left], timeout=10)[0] == [left]
    assert other.is_running()
    other.kill()


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_trials": 0}, "num_trials: got 0, wanted a whole number above 0"),
        ({"search": {}}, "search: got {}, wanted at least one key of the config with {low, high}"),
        ({"search": {"kd_ratio": 0.5}}, "search.kd_ratio: got 0.5, wanted {low, high}"),
        ({"search": {"kd_ratio": {"low": 0, "high": 1, "lg": True}}}, "search.kd_ratio: got {'low': 0"),
        ({"search": {"kd_ratio": {"low": "a", "high": 1}}}, "wanted numbers for low, high and step"),
        ({"search": {"kd_ratio": {"low": 1, "high": 0.5}}}, "`low <= high` must hold"),
        ({"search": {"optimizer.lr": {"low": 0, "high": 1e-2, "log": True}}}, "`low > 0` must hold for `log=True`"),
        ({"search": {"kd_ratio": {"low": 0, "high": 1, "step": 0.3}}}, "the range is not divisible by `step`"),
        ({"search": {"kd_ratio": {"choices": []}}}, "search.kd_ratio.choices: got [], wanted a list of at least one"),
        (
            {"search": {"kd_ratio": {"choices": [1, 1]}}},
            "search.kd_ratio.choices: got [1, 1], wanted values that differ",
        ),
        ({"search": {"kd_ratio": {"low": 0, "high": 1}}}, "search.kd_ratio: got 'a range without step'"),
        ({"search": {"kd_ratio": {"choices": [0.5, 2]}}}, "kd_ratio: got 2, wanted a number in [0, 1]"),
        ({"search": {"kd_ration": {"choices": [1]}}}, "Did you mean `kd_ratio`?"),
        ({"search": {"optimizer.lrr": {"choices": [1]}}}, "Did you mean `lr`?"),
        ({"search": {"feature_losses.3.x": {"choices": [1]}}}, "feature_losses: got"),
        ({"search": {"output_dir": {"choices": ["a"]}}}, "search.output_dir: got 'output_dir', wanted another key"),
        (
            {"search": {"kd_loss": {"choices": [{"_component_": "kd_recipes.losses.SkewForwardKL", "alpha": 3}]}}},
            "kd_loss: got 'kd_recipes.losses.SkewForwardKL', wanted one that can be built. alpha is 3",
        ),
        (
            {"search": {"optimizer": {"choices": [1]}, "optimizer.lr": {"choices": [1]}}},
            "wanted a section, or settings",
        ),
        ({"overrides": {"optimizer.lr": 1}}, "search.optimizer.lr: got 'overrides.optimizer.lr as well'"),
        ({"overrides": ["optimizer.lr=1"]}, "search.optimizer.lr: got 'overrides.optimizer.lr as well'"),
        ({"overrides": ["trusted_components=[os]"]}, "A config cannot vouch for itself"),
        ({"overrides": "max_steps=3"}, "overrides: got 'max_steps=3', wanted key: value"),
        ({"overrides": {"eval_dataset": None}}, "eval_dataset: got None, wanted held-out data"),
        ({"overrides": {"checkpointer.checkpoint_dir": "/nowhere"}}, "checkpointer.checkpoint_dir: got '/nowhere'"),
        ({"config": "nowhere.yaml"}, "config: got 'nowhere.yaml', wanted a YAML file"),
        ({"metric": "loss"}, "metric: got 'loss', wanted of held-out text"),
        ({"metric": "objective", "search": {"kd_ratio": {"choices": [0, 1]}}}, "metric: got 'objective', wanted"),
        (
            {"metric": "kl", "overrides": {"kd_ratio": 0, "teacher_model": None, "teacher_checkpointer": None}},
            "metric: got 'kl', wanted perplexity or cross_entropy: the config has no teacher_model",
        ),
    ],
)
def test_bad_input(
    settings: dict[str, Any],
    problem: str,
    write_sweep: Callable[..., Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_recipe("sweep", ["--config", str(write_sweep(**settings))]) == EXIT_BAD_INPUT
    error = capfd.readouterr().err
    assert problem in error
    assert "Traceback" not in error
    assert not (tmp_path / "sweep").exists()


def test_code_that_is_not_trusted_is_not_imported(
    write_sweep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KD_RECIPES_TRUSTED_COMPONENTS", "")
    config = write_sweep(search={"optimizer._component_": {"choices": ["torch.optim.SGD", "antigravity.fly"]}})
    assert run_recipe("sweep", ["--config", str(config)]) == EXIT_BAD_INPUT
    assert "put the package into the environment's KD_RECIPES_TRUSTED_COMPONENTS" in capfd.readouterr().err
    assert "antigravity" not in sys.modules


def test_a_directory_belongs_to_one_search_at_a_time(
    write_sweep: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refused(**settings: Any) -> str:
        config = write_sweep(timeout_minutes=1e-9, **settings)
        return capfd.readouterr().err if run_recipe("sweep", ["--config", str(config)]) == EXIT_BAD_INPUT else ""

    assert not refused()
    assert "which holds a search with another space" in refused(search=CHECKED, sampler="tpe")
    assert "another base and another metric" in refused(overrides={"max_steps": 3}, metric="kl")
    with FileLock(tmp_path / "sweep" / ".lock"):
        assert "wanted a directory that no search is running in" in refused()
    assert not refused(num_trials=3)
    (tmp_path / "sweep" / "plan.json").unlink()
    (tmp_path / "sweep" / "trials").mkdir()
    assert "wanted a directory without trials" in refused()


# ---------------------------------------------------------------------------------------------------------- the parts
def build_search(directory: Path, search: dict[str, Any], own: dict[str, Any], **strategy: Any) -> Search:
    settings = {"sampler": "random", "pruner": "none", "num_startup_trials": 1, "num_warmup_steps": 0, "seed": 0}
    space = build_space(search, OmegaConf.create(own), {"kd_ratio": "scheduled"})
    return Search(directory, space, own, Strategy(**{**settings, **strategy}), Metric("kl"))


def finish(search: Search, kl: float | None = 1.0, **how: Any) -> dict[str, Any]:
    """Ask for a trial and end it with a history of one evaluation; returns its values."""
    trial, values = search.ask()
    history = History(search.directory(trial))
    history.append(0, "held_out", {"kl": 0.0})  # the student as it was, which is no result
    history.append(5, "held_out", {"kl": kl})
    search.tell(trial, **{"is_pruned": False, **how})
    return values


def test_the_baseline_has_the_config_s_own_values_whatever_is_searched(tmp_path: Path) -> None:
    own = {"temperature": 9.0, "kd_ratio": 0.5}
    search = {"temperature": {"low": 1.0, "high": 4.0}, "kd_ratio": {"low": 0, "high": 1}}
    first = build_search(tmp_path, search, own)
    first.resume(10)
    assert finish(first) == {"kd_ratio": 0.5}
    values = finish(first)
    assert 1 <= values["temperature"] <= 4
    assert 0 < values["kd_ratio"] < 1  # a fraction, though the ends are whole
    assert [record.values for record in first.records()] == [own, values]
    assert [record.metric for record in first.records()] == [1.0, 1.0]


def test_a_trial_that_was_cut_off_is_tried_again_where_it_was(tmp_path: Path) -> None:
    own = {"temperature": 1.0}
    search = {"temperature": {"low": 1.0, "high": 4.0}}
    first = build_search(tmp_path, search, own)
    first.resume(10)
    finish(first)
    _, values = first.ask()  # and the process is killed

    second = build_search(tmp_path, search, own)
    assert second.resume(10) == [tmp_path / "trials" / "001"]
    assert len(second.records()) == 1
    assert finish(second) == values
    assert finish(second) not in (values, own)  # nothing is drawn twice
    assert [record.name for record in second.records()] == ["000", "001", "002"]
    states = [trial.state for trial in second._study.trials]
    assert states == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert build_search(tmp_path, search, own).resume(10) == []


def test_a_grid_ends_and_has_no_point_twice(tmp_path: Path) -> None:
    search = {"temperature": {"low": 1, "high": 3}, "kd_ratio": {"low": 0, "high": 1, "step": 0.5}}
    own = {"temperature": 2, "kd_ratio": 1}
    grid = build_search(tmp_path, search, own, sampler="grid")
    grid.resume(4)
    found = [finish(grid) for _ in range(3)]
    grid = build_search(tmp_path, search, own, sampler="grid")
    grid.resume(100)
    while grid.num_left(100):
        found.append(finish(grid))
    assert found[0] == own
    assert sorted((values["temperature"], values["kd_ratio"]) for values in found) == [
        (temperature, ratio) for temperature in (1, 2, 3) for ratio in (0, 0.5, 1)
    ]


@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
def test_what_is_pruned(pruner: str, tmp_path: Path) -> None:
    search = build_search(tmp_path, {"temperature": {"low": 1, "high": 3}}, {"temperature": 1}, pruner=pruner)
    search.resume(10)

    def num_steps(kl: float) -> int:
        trial, _ = search.ask()
        history = History(search.directory(trial))
        for step in range(9):
            history.append(step, "held_out", {"kl": kl if step else 99.0})
            *_, entry = history.read()
            if search.is_hopeless(trial, entry):
                break
        search.tell(trial, is_pruned=step < 8)
        return step

    assert [num_steps(1.0), num_steps(0.9)] == [8, 8]
    assert (num_steps(2.0) < 8) == (pruner != "none")


def test_a_trial_without_a_finite_evaluation_has_failed(tmp_path: Path) -> None:
    search = build_search(tmp_path, {"temperature": {"low": 1, "high": 3}}, {"temperature": 1})
    search.resume(10)
    finish(search, kl=None)
    finish(search, message="out of memory")
    assert [record.message for record in search.records()] == ["no held-out kl that is finite", "out of memory"]
    assert {record.status for record in search.records()} == {"failed"}


def test_ranges_and_choices_as_the_config_has_them() -> None:
    section = {"_component_": "kd_recipes.losses.SkewForwardKL", "alpha": 0.1}
    base = OmegaConf.create({"lr_scheduler": {"_component_": "a.b", "num_warmup_steps": 4}, "kd_loss": section})
    search = {
        "lr_scheduler.num_warmup_steps": {"low": 0, "high": 8, "step": 4},
        "kd_loss": {"choices": [None, section, {"_component_": "kd_recipes.losses.ReverseKL"}]},
        "betas": {"choices": [[0.9, 0.95], [0.9, 0.999]]},
    }
    warmup, kd_loss, betas = build_space(search, base, {})
    assert (warmup.grid, warmup.suggestions(4), warmup.suggestions(5)) == ([0, 4, 8], {warmup.key: 4}, {})
    assert kd_loss.grid == (None, "SkewForwardKL(alpha=0.1)", "ReverseKL")
    assert kd_loss.suggestions(section) == {"kd_loss": "SkewForwardKL(alpha=0.1)"}
    assert betas.edges == [[0.9, 0.95], [0.9, 0.999]]
    changed = configured(base, {"kd_loss": kd_loss.value("ReverseKL"), warmup.key: 8, "betas": betas.edges[1]})
    assert changed.kd_loss == {"_component_": "kd_recipes.losses.ReverseKL"}  # nothing of the other section's
    assert (changed.lr_scheduler.num_warmup_steps, changed.betas) == (8, [0.9, 0.999])
    assert base.kd_loss == section
    with pytest.raises(ConfigError, match=r"feature_losses.3: got 1, wanted a key of the config"):
        configured(OmegaConf.create({"feature_losses": []}), {"feature_losses.3": 1})


def test_the_page_has_pictures_and_no_markup_of_a_config(tmp_path: Path) -> None:
    search = {"optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}, "kd_loss": {"choices": ["<b>", "|"]}}
    found = build_search(tmp_path, search, {"optimizer.lr": 1e-3, "kd_loss": "|"})
    found.resume(10)
    for kl in (1.0, 30.0, 2.0):
        finish(found, kl)
    page = html(found.records(), found.ended(), "kl", "<i>")
    assert page.count("<svg") == 4
    assert "&lt;i&gt;" in page
    assert not re.search(r"<[bi]>|<script|<\?xml", page)
    assert "\\|" in markdown(found.records(), "kl")


def test_the_objective_is_the_mixture_that_is_trained() -> None:
    held_out = {"kl": 2.0, "cross_entropy": 4.0, "perplexity": 54.6}
    assert Metric("objective", 0.25).of(held_out) == 3.5
    assert Metric("perplexity").of(held_out) == 54.6
    assert Metric("objective", 0.25).of({**held_out, "kl": None}) is None
