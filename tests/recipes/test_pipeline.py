"""The pipeline as a user runs it, on toys: each step is a real recipe in a process of its own."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from omegaconf import OmegaConf
from pipelines import Forked, digests, save_pipeline

from kd_recipes.config import find_config, load, load_and_validate
from kd_recipes.entry import EXIT_BAD_INPUT, run_recipe
from kd_recipes.errors import ConfigError
from kd_recipes.pipelining import runner
from kd_recipes.pipelining.contents import Contents, step_key
from kd_recipes.pipelining.page import as_html
from kd_recipes.pipelining.plan import build_plan, check_inputs
from kd_recipes.pipelining.records import Record, Records
from kd_recipes.pipelining.runner import StepFailed
from kd_recipes.processes import Stopped
from toy import TUNE, Toys, run_tune


@pytest.fixture(scope="module")
def config(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and what it names; its own directory is beside it."""
    return save_pipeline(toys, tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def printed(config: Path) -> str:
    """What the pipeline says that runs from its first step to its last."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as said:
        patch.setattr(runner.processes, "start", Forked)
        assert run_recipe("pipeline", ["--config", str(config)]) == 0
    return said.getvalue()


@pytest.fixture
def copied(config: Path, printed: str, tmp_path: Path) -> list[str]:
    """The words for a copy of what it has made, to be changed: that is known by its content, not by its place."""
    shutil.copytree(config.parent / "out", tmp_path / "out")
    return ["--config", str(config), f"output_dir={tmp_path / 'out'}"]


def run(words: list[str], *more: str) -> int:
    return run_recipe("pipeline", [*words, *more])


# ------------------------------------------------------------------------------------------------------ the whole way
def test_every_step_is_a_directory_with_its_config_and_a_line_in_one_report(config: Path, printed: str) -> None:
    out = config.parent / "out"
    names = ["teacher", "pruned", "cached", "distilled", "evaluation", "exported"]
    for number, name in enumerate(names, start=1):
        assert f"[{number}/6] {name}: tune run kd_recipes/" in printed
        assert f"[{number}/6] {name}: done in " in printed
        assert (out / name).is_dir()
        assert "step:" not in (out / "configs" / f"{name}.yaml").read_text()
    wholes = [re.sub(r" \d+\.\d min", "", line) for line in printed.splitlines() if line.startswith("pipeline: ")]
    assert len(wholes) == 6  # one where a step begins
    assert wholes[3] == (
        "pipeline: 3 of 6 steps | teacher done | pruned done | cached done | distilled running"
        " | to come: evaluation, exported"
    )
    load_and_validate(str(out / "configs" / "distilled.yaml"))
    assert OmegaConf.load(out / "configs" / "distilled.yaml").model.num_layers == 2  # as pruning has left it
    record = json.loads((out / "pipeline.json").read_text())["steps"]
    assert list(record) == names
    assert all(step["is_done"] and step["seconds"] > 0 for step in record.values())
    page = (out / "report.html").read_text()
    assert '<a href="evaluation/report.html">' in page
    for text in ("torch_export", "Greedy continuations", "perplexity ", "num_blocks: 2", record["pruned"]["key"]):
        assert text in page
    assert "http" not in page.replace("http-equiv", "")
    rows = [line.split(" | ")[:3] for line in (out / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert rows[2:8] == [[f"| {name}", record[name]["recipe"], "done"] for name in names]


def test_what_has_not_changed_is_not_run_again(
    copied: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner.processes, "start", None)
    assert run(copied) == 0
    assert capfd.readouterr().out.count("nothing has changed since it was made") == 6
    (tmp_path / "out" / "evaluation" / "notes.txt").write_text("what was added is no matter")
    assert run(copied, "steps.exported.enabled=False") == 0
    assert "| exported |  | left out" in (tmp_path / "out" / "report.md").read_text()


def begun(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *more: str
) -> tuple[list[str], str]:
    """The steps that would be run, each ended at once by a status of 0, and what is printed."""
    started: list[str] = []

    def start(recipe: str, config: Path, num_processes: int) -> subprocess.Popen[bytes]:
        started.append(config.stem)
        (config.parents[1] / config.stem).mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({7 if num_processes == 1 else 0})"])

    monkeypatch.setattr(runner.processes, "start", start)
    status = run(words, *more)
    found = capfd.readouterr()
    assert status in (0, 7), found.err
    return started, found.out + found.err


@pytest.mark.parametrize(
    ("change", "step"),
    [
        ("steps.pruned.with.compress.num_blocks=1", "pruned"),
        ("steps.distilled.with.optimizer.lr=0.5", "distilled"),
        ("steps.evaluation.with.max_new_tokens=6", "evaluation"),
        ("steps.pruned.enabled=False", "distilled"),
        ("values.tokenizer.max_seq_len=64", "pruned"),
    ],
)
def test_a_setting_that_has_changed_runs_its_step_and_keeps_the_old_result(
    change: str,
    step: str,
    copied: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    started, said = begun(copied, monkeypatch, capfd, change)
    assert started == [step]
    assert f"its inputs have changed; what was in {tmp_path / 'out' / step} is in" in said
    assert any((tmp_path / "out" / f"{step}.old-1").iterdir())
    assert f"step `{step}` (" in said
    assert "ended with status 7; the same command goes on from there" in said
    assert f"| {step} " in (tmp_path / "out" / "report.md").read_text()


def test_a_file_that_has_changed_runs_its_step(
    config: Path,
    copied: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    teacher = shutil.copy(config.parent / "teacher.gguf", tmp_path / "again.gguf")
    elsewhere = f"steps.teacher.with.gguf_file={teacher}"
    assert begun(copied, monkeypatch, capfd, elsewhere)[0] == []  # the same content
    with Path(teacher).open("ab") as file:
        file.write(b"\0")
    assert begun(copied, monkeypatch, capfd, elsewhere)[0] == ["teacher"]
    weights = tmp_path / "out" / "pruned" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert begun(copied, monkeypatch, capfd)[0] == ["teacher"]  # it was begun anew, and comes first
    shutil.rmtree(tmp_path / "out")
    shutil.copytree(config.parent / "out", tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    assert begun(copied, monkeypatch, capfd, "keep_old=False")[0] == ["pruned"]  # it is not what the step left
    assert not list((tmp_path / "out").glob("*.old-*"))


def test_a_learning_rate_is_nothing_to_a_cache_and_new_text_is_added(
    copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert begun(copied, monkeypatch, capfd, "steps.cached.with.optimizer.lr=0.5")[0] == []
    assert begun(copied, monkeypatch, capfd, "steps.cached.with.dataset.split=train[:5]")[0] == ["cached"]
    assert (tmp_path / "out" / "cached" / "cache.json").is_file()
    assert not (tmp_path / "out" / "cached.old-1").exists()


def test_a_step_that_had_come_to_its_end_before_it_was_recorded_is_not_run_again(
    copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "pipeline.json"
    content = json.loads(file.read_text())
    for name in ("teacher", "pruned"):
        content["steps"][name] |= {"is_done": False, "result": {}}
    file.write_text(json.dumps(content))
    assert begun(copied, monkeypatch, capfd)[0] == []
    assert json.loads(file.read_text())["steps"]["pruned"]["is_done"]


# ---------------------------------------------------------------------------------------------------------- cut off
def test_a_distillation_that_is_killed_goes_on_to_the_same_student(config: Path, printed: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(config.parent / "out", out)
    shutil.rmtree(out / "distilled")
    words = [str(TUNE), "run", "kd_recipes.pipeline", "--config", str(config), f"output_dir={out}"]
    killed = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while killed.poll() is None and not list(out.glob("distilled/checkpoints/step_*")):
        time.sleep(0.05)
    killed.kill()  # the step lives on, and is ended by the next pipeline
    killed.wait()
    assert not (out / "distilled" / "final").exists()
    done = run_tune(*words[1:], "steps.evaluation.enabled=False", "steps.exported.enabled=False", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing has changed since it was made") == 3
    for place in ("best", "final"):
        assert digests(out / "distilled" / place) == digests(config.parent / "out" / "distilled" / place) != {}


def test_a_signal_reaches_the_step_and_the_same_command_goes_on(
    copied: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (Path({str(saved)!r}).touch(), sys.exit(143)))\n"
        "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"
    )
    monkeypatch.setattr(
        runner.processes, "start", lambda *_: subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    )
    change = "steps.evaluation.with.max_new_tokens=6"
    assert run(copied, change) == 128 + signal.SIGINT
    assert saved.exists()
    assert "SIGINT; the same command goes on from here" in capfd.readouterr().err
    assert "| evaluation | evaluate | cut off" in (tmp_path / "out" / "report.md").read_text()
    shutil.copytree(tmp_path / "out" / "evaluation.old-1", tmp_path / "out" / "evaluation")
    begun(copied, monkeypatch, capfd, change)
    assert not (tmp_path / "out" / "evaluation.old-2").exists()  # what is there is its own


def test_a_directory_belongs_to_one_pipeline_at_a_time(
    copied: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with FileLock(tmp_path / "out" / ".lock"):
        assert run(copied) == EXIT_BAD_INPUT
    assert "wanted a directory that no pipeline is running in" in capfd.readouterr().err
    (tmp_path / "out" / "pipeline.json").write_text("{")
    assert run(copied) == EXIT_BAD_INPUT
    assert "Delete it, and steps run again; their directories are kept" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("overrides", "problems"),
    [
        (
            ["steps.distilled.with.optimizer.lrr=1", "steps.pruned.with.compress.num_blcks=1"],
            [
                "steps.pruned.with.compress.num_blcks: got 'num_blcks', wanted a known argument of",
                "steps.distilled.with.optimizer.lrr: got 'lrr', wanted a known argument of torch.optim.AdamW. Did you",
            ],
        ),
        (["steps.pruned.with.seedd=1"], ["steps.pruned.with.seedd: got 'seedd', wanted a known key. Did you mean"]),
        (
            ["steps.teacher.enabled=False"],
            ["steps.pruned.with.checkpoint_dir: got 'step:teacher', wanted a step that is not left out. Leave this"],
        ),
        (
            ["steps.pruned.with.checkpoint_dir=step:techer"],
            ["steps.pruned.with.checkpoint_dir: got 'step:techer', wanted one of the steps teacher, pruned, cached,"],
        ),
        (
            ["steps.pruned.with.checkpoint_dir=step:distilled"],
            ["steps.pruned.with.checkpoint_dir: got 'step:distilled', wanted a step that comes before: `distilled`"],
        ),
        (["~steps.pruned"], ["steps.distilled.checkpoints.model: got 'step:pruned|teacher', wanted one of the steps"]),
        (["steps.pruned.wth=1"], ["steps.pruned.wth: got 'wth', wanted one of recipe, config, with"]),
        (["steps.pruned.num_processes=0"], ["steps.pruned.num_processes: got 0, wanted a whole number above 0"]),
        (["steps.pruned.recipe=prune"], ["steps.pruned.recipe: got 'prune', wanted one of cache_teacher, compress"]),
        (["steps.pruned.recipe=pipeline"], ["steps.pruned.recipe: got 'pipeline', wanted another recipe"]),
        (["steps.pruned.config=nowhere"], ["steps.pruned.config: got 'nowhere', wanted a YAML file"]),
        (["steps.pruned.with.output_dir=x"], ["steps.pruned.with.output_dir: got 'output_dir', wanted another key"]),
        (
            ["steps.distilled.checkpoints.modl=x"],
            ["steps.distilled.checkpoints.modl: got 'modl', wanted one of model,"],
        ),
        (["steps.configs=x"], ["steps.configs: got 'configs', wanted a name of letters"]),
        (["steps.pruned=3"], ["steps.pruned: got 3, wanted a section with recipe and config, or the path"]),
        (["steps.teacher=/nowhere"], ["steps.teacher: got '/nowhere', wanted the path of what is there"]),
        (
            ["steps.pruned.with.dataset.data_files=/no.jsonl", "steps.pruned.with.device=cuda:77"],
            [
                "steps.pruned.with.dataset.data_files: got '/no.jsonl', wanted what is there",
                "steps.pruned.with.device:",
            ],
        ),
    ],
)
def test_everything_wrong_is_said_before_the_first_step(
    overrides: list[str], problems: list[str], config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config), f"output_dir={tmp_path / 'new'}"]
    assert run(words, *overrides) == EXIT_BAD_INPUT
    error = capfd.readouterr().err
    for problem in problems:
        assert problem in error
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_code_that_is_not_trusted_is_not_imported(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KD_RECIPES_TRUSTED_COMPONENTS", "")
    distillation = OmegaConf.load(config.parent / "distill.yaml")
    distillation.optimizer._component_ = "antigravity.fly"
    OmegaConf.save(distillation, tmp_path / "bad.yaml")
    words = ["--config", str(config), f"output_dir={tmp_path / 'new'}"]
    assert run(words, f"steps.distilled.config={tmp_path / 'bad.yaml'}") == EXIT_BAD_INPUT
    error = capfd.readouterr().err
    assert "steps.distilled.config: optimizer._component_: got 'antigravity.fly'" in error
    assert "put the package into the environment's KD_RECIPES_TRUSTED_COMPONENTS" in error
    assert "antigravity" not in sys.modules


def test_secrets_of_the_environment_are_in_no_file(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("A_SECRET", "hunter22")
    words = ["steps.distilled.with.metric_logger.filename=${oc.env:A_SECRET}", f"output_dir={tmp_path}"]
    step = build_plan(load(str(config), words)).steps[3]
    assert "${oc.env:A_SECRET}" in OmegaConf.to_yaml(step.config(), resolve=False)
    assert "hunter22" not in OmegaConf.to_yaml(step.config(), resolve=False)


@pytest.mark.parametrize("name", ["pipeline_quickstart", "pipeline_qwen_1b"])
def test_shipped_pipelines_are_right_whatever_is_left_out(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no quickstart has left its files
    cfg = load(str(find_config(name)))
    left = [name for name, section in cfg.steps.items() if not isinstance(section, str)]
    for without in left:
        others = {"quantized": ["qad"]}.get(without, [])  # what cannot do without it
        overrides = [f"steps.{step}.enabled=False" for step in (without, *others)]
        if without in ("teacher", "cached"):
            with pytest.raises(ConfigError, match="wanted a step that is not left out"):
                build_plan(load(str(find_config(name)), overrides))
        else:
            assert without in build_plan(load(str(find_config(name)), overrides)).left_out
    with pytest.raises(ConfigError):
        check_inputs(build_plan(cfg))


# ---------------------------------------------------------------------------------------------------------- the parts
def test_a_key_is_of_what_is_in_files_and_not_of_where_they_lie(tmp_path: Path) -> None:
    contents, own = Contents(tmp_path / "hashes.json"), tmp_path / "own"
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.jsonl").write_text("same")

    def key(**settings: Any) -> str:
        return step_key("distill", settings, own, contents)

    assert key(data=str(tmp_path / "a")) == key(data=str(tmp_path / "b"))
    assert key(data=str(tmp_path / "*" / "text.jsonl")) != key(data=str(tmp_path / "a" / "text.jsonl"))
    assert key(output_dir="x", log=str(own / "logs")) == key(output_dir="y", log=str(own / "logs"))
    assert key(rate=1.0) != key(rate=2.0)
    before = key(data=str(tmp_path / "a"))
    (tmp_path / "a" / ".lock").touch()
    assert key(data=str(tmp_path / "a")) == before
    (tmp_path / "a" / "text.jsonl").write_text("other")
    assert key(data=str(tmp_path / "a")) != before
    assert Contents(tmp_path / "hashes.json").of(tmp_path / "a") == contents.of(tmp_path / "a")


def test_a_step_keeps_its_time_over_attempts(tmp_path: Path) -> None:
    records = Records(tmp_path)
    for seconds in (2.0, 3.0):
        records.begin("a", Record("key", "distill"))
        records.add_seconds("a", seconds)
    records.finish("a", "best", {"file": "digest"})
    found = Records(tmp_path).get("a")
    assert found is not None
    assert (found.is_done, found.seconds, found.place, found.result) == (True, 5.0, "best", {"file": "digest"})
    records.begin("a", Record("another", "distill"))
    assert records.get("a") == Record("another", "distill")


def test_markdown_of_a_model_s_texts_cannot_become_html() -> None:
    text = "**A \\<b>**\n\n### H\n\n| a | b |\n|---|---|\n| x \\| y | <script> |\n\n- **m**: <img>\n- n"
    html = str(as_html(text))
    assert "<p><b>A &lt;b&gt;</b></p>" in html
    assert '<th scope="row" class="label">x | y</th><td>&lt;script&gt;</td>' in html
    assert "<ul><li><b>m</b>: &lt;img&gt;</li><li>n</li></ul>" in html
    assert "<script" not in html
    assert "<img" not in html


def test_statuses() -> None:
    assert Stopped(signal.SIGTERM).exit_status == 143
    step: Any = build_plan(load(str(find_config("pipeline_quickstart")))).steps[0]
    assert StepFailed(step, 2).exit_status == 2
    assert StepFailed(step, -9).exit_status == 137
    assert "was ended by SIGKILL" in str(StepFailed(step, -9))
