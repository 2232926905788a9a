"""`kd-recipes doctor` as a user runs it, and its estimate beside a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.doctor import measure, save_pair
from benchmarks.doctor import write_config as write_pair_config

from kd_recipes.compression.keeping import Keeping
from kd_recipes.config import load_and_validate
from kd_recipes.estimation import examine, render
from kd_recipes.estimation.memory import Question, estimate_memory
from kd_recipes.estimation.remedies import find_remedies
from kd_recipes.teachers.loading import load_frozen
from kd_recipes.training.faults import num_bytes
from kd_recipes.training.preflight import check_models
from toy import Toys, checkpointer_section, hf_config, lora_section, model_section

WriteConfig = Callable[..., Path]


def _doctor(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kd_recipes.cli", "doctor", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Large enough for its tensors to be most of what a process holds."""
    sizes = ((4, 384, 1024, 32_000), (4, 512, 1408, 32_000))
    return save_pair(tmp_path_factory.mktemp("doctor") / "pair", sizes)


@pytest.mark.parametrize(("kind", "setting"), [("full", "batch_size=1"), ("LoRA", "batch_size=4")])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    kind: str, setting: str, pair: Toys, tmp_path: Path
) -> None:
    report, peak = measure(str(write_pair_config(pair, kind, tmp_path, length=64)), [setting], tmp_path)
    estimate = report["memory"]["peak"]
    print(f"\n{kind}: {estimate / 2**20:,.0f} MiB estimated, {peak / 2**20:,.0f} MiB measured")
    assert estimate == pytest.approx(peak, rel=0.15)


def test_a_config_that_is_right_and_fits(write_config: WriteConfig, tmp_path: Path) -> None:
    said = _doctor("--config", str(write_config(tmp_path)), "batch_size=3")
    assert said.returncode == 0, said.stdout + said.stderr
    for line in ("the same map", "end of text", "at its peak", "fits", "checkpoints (1 at most)", "for 2 steps"):
        assert line in said.stdout
    assert not (tmp_path / "run").exists()


def test_problems_do_not_stop_the_estimate(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    said = _doctor("--config", config, "checkpointer.checkpoint_dir=nowhere", "--device", "h100", "--json")
    assert said.returncode == 2
    report = json.loads(said.stdout)
    assert any(line.startswith("checkpointer.checkpoint_dir: got 'nowhere'") for line in report["problems"])
    assert report["machine"]["name"] == "H100"
    assert report["memory"]["peak"] > 600 * 2**20
    assert report["duration"]["step_seconds"] > 0


def test_a_config_that_is_none(write_config: WriteConfig, tmp_path: Path) -> None:
    said = _doctor("--config", str(write_config(tmp_path)), "temprature=2")
    assert (said.returncode, said.stdout) == (2, "")
    assert "did you mean `temperature`" in said.stderr.lower()
    said = _doctor("--config", str(write_config(tmp_path)), "--device", "H1000")
    assert said.returncode == 2
    assert "Known: cpu, A100-40GB" in said.stderr


def test_a_gpu_that_need_not_be_here(write_config: WriteConfig, tmp_path: Path) -> None:
    report = examine(str(write_config(tmp_path)), ["device=cuda"], device="A10")
    assert not report.problems
    assert report.exit_status == 0
    absent = examine(str(write_config(tmp_path)), ["device=cuda"])
    assert absent.exit_status == 2
    assert absent.memory is not None
    assert absent.machine.memory is None


def test_what_to_change_is_what_saves(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, **{"dataset.packed": True}))
    report = examine(config, ["batch_size=16"], device="H100")
    assert report.memory is not None
    tight = replace(report, machine=replace(report.machine, memory=report.memory.peak - 1))
    assert tight.exit_status == 1
    cfg = load_and_validate(config, ["batch_size=16"], "distill")
    question = Question(cfg, tight.machine, report.length, 0)
    remedies = {remedy.settings: remedy for remedy in find_remedies(question, report.memory)}
    assert remedies["batch_size=1 gradient_accumulation_steps=16"].fits
    fewer = load_and_validate(config, ["batch_size=1", "gradient_accumulation_steps=16"], "distill")
    expected = estimate_memory(replace(question, cfg=fewer)).peak
    assert remedies["batch_size=1 gradient_accumulation_steps=16"].peak == expected
    text = render(replace(tight, remedies=[*remedies.values()]))
    assert "does not fit" in text
    assert "smaller micro-batches" in text


def test_a_teacher_in_fewer_bits(write_config: WriteConfig, toys: Toys, tmp_path: Path) -> None:
    wide = {
        "teacher_model": model_section(hf_config(toys.wide)),
        "teacher_checkpointer": checkpointer_section(toys.wide),
    }
    config, setting = str(write_config(tmp_path, **wide)), "teacher_quantization=int4_g32"
    memory = examine(config, [setting], device="H100").memory
    assert memory is not None
    cfg = load_and_validate(config, [setting], "distill")
    keeping = Keeping.of("teacher_model", cfg.teacher_model, cfg)
    parts, settings = (
        (cfg.teacher_model, cfg.teacher_checkpointer),
        {"dtype": torch.float32, "device": torch.device("cpu")},
    )
    model = load_frozen("teacher_model", *parts, keeping, **settings)
    assert memory.parts["teacher: weights"] == pytest.approx(num_bytes(model.parameters()), rel=0.001)


def test_a_teacher_in_host_memory(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    whole, offloaded = (examine(config, words, device="H100").memory for words in ([], ["teacher_cpu_offload=True"]))
    assert whole is not None
    assert offloaded is not None
    assert offloaded.parts["teacher: weights"] < 0.9 * whole.parts["teacher: weights"]


def test_a_teacher_in_bits_that_cannot_be_had_here(write_config: WriteConfig, tmp_path: Path) -> None:
    version_2 = {"_component_": "torchao.quantization.Int4WeightOnlyConfig", "group_size": 32}  # for GPUs alone
    report = examine(str(write_config(tmp_path, teacher_quantization=version_2)), device="H100")
    assert [problem.partition(":")[0] for problem in report.problems] == ["teacher_quantization"]
    assert report.memory is not None
    assert report.memory.notes[0].startswith("teacher_quantization, which cannot be tried here: ")


def test_a_cache_and_the_teacher_that_it_is_of(write_config: WriteConfig, tmp_path: Path) -> None:
    encoding = {"_component_": "kd_recipes.teachers.TopK", "k": 8}
    section = {
        "_component_": "kd_recipes.teachers.CachedTeacher",
        "path": str(tmp_path / "cache"),
        "encoding": encoding,
    }
    config = str(write_config(tmp_path, teacher=section, max_steps=10))
    report = examine(config, ["batch_size=2"])
    assert report.memory is not None
    assert "teacher: weights" not in report.memory.parts
    assert {c.what: c.verdict for c in report.comparisons}["tokens"] == "the same map"
    assert report.disk is not None
    assert report.disk.cache is not None
    assert report.disk.cache.num_tokens == 10 * 2 * report.length
    assert "for all that the run sees" in render(report)


def test_the_student_on_disk_is_whole_on_any_number_of_devices(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    missing = ["checkpointer.checkpoint_dir=nowhere"]
    alone, shared = (examine(config, missing, device="H100", num_devices=number).disk for number in (1, 4))
    assert alone is not None
    assert shared is not None
    assert alone.parts == shared.parts


def test_another_recipes_config(tmp_path: Path) -> None:
    said = _doctor("--config", "pipeline_quickstart")
    assert said.returncode == 2
    assert "recipe: got 'pipeline', wanted distill" in said.stderr
    assert "configs/ of its output_dir" in said.stderr


def test_devices_share_weights_and_adapters_need_little(write_config: WriteConfig, toys: Toys, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    alone, shared = (examine(config, device="H100", num_devices=number).memory for number in (1, 4))
    adapted = examine(str(write_config(tmp_path, model=lora_section(toys.student))), device="H100").memory
    assert alone is not None
    assert shared is not None
    assert adapted is not None
    assert shared.parts["optimizer"] == pytest.approx(alone.parts["optimizer"] / 4, rel=0.01)
    assert adapted.parts["optimizer"] < alone.parts["optimizer"] / 2
    assert shared.checkpoint == pytest.approx(alone.checkpoint, rel=0.01)


def test_a_teacher_that_ends_its_texts_otherwise(write_config: WriteConfig, toys: Toys, tmp_path: Path) -> None:
    teacher = Path(shutil.copytree(toys.teacher, tmp_path / "teacher"))
    file = teacher / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}))
    report = examine(str(write_config(tmp_path, **{"teacher_checkpointer.checkpoint_dir": str(teacher)})))
    verdicts = {comparison.what: comparison.verdict for comparison in report.comparisons}
    assert verdicts["tokens"] == "the same map"
    assert verdicts["end of text"].startswith("differ")
    assert verdicts["ends a reply"].startswith("differ")
    assert verdicts["chat template"].startswith("differ")
    assert not verdicts["beginning of text"]


def test_sizes_are_those_of_the_files(write_config: WriteConfig, tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    cfg = load_and_validate(config, [], "distill")
    from kd_recipes.parts import build

    sizes = check_models(cfg, build("tokenizer", cfg.tokenizer), ["model"])
    report = examine(config)
    rows = {comparison.what: comparison.student for comparison in report.comparisons}
    assert rows["rows of the head"] == f"{sizes[0].num_rows:,}"
