"""The key of a step: another one where what its config names has another content, however it is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd_recipes.pipelining.contents import Contents, adding_key, step_key

Key = Callable[..., str]


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Key:
    """``key(**settings)`` of a step that writes to ``out/step``, from a directory with checkpoints and data."""
    for name in ("student/model.safetensors", "x.jsonl", "data/a.jsonl", "data/deep/down/b.jsonl", "out/other/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "out" / "step").mkdir()
    monkeypatch.chdir(tmp_path)

    def of(**settings: Any) -> str:
        return step_key("distill", settings, Path("out/step"), Contents(Path("out/.hashes.json")))

    return of


@pytest.mark.parametrize(
    ("named", "changed"),
    [
        ("student", "student/model.safetensors"),
        ("data", "data/deep/down/b.jsonl"),
        ("data/**/*.jsonl", "data/deep/down/b.jsonl"),
        ("data/?.jsonl", "data/a.jsonl"),
        ("data/[ab].jsonl", "data/a.jsonl"),
        ("out/other/*.jsonl", "out/other/c.jsonl"),
        ("?.jsonl", "x.jsonl"),
        ("{here}", "data/a.jsonl"),
    ],
)
def test_a_key_follows_the_content_of_what_a_setting_names(named: str, changed: str, key: Key, tmp_path: Path) -> None:
    settings = {"checkpointer": {"checkpoint_dir": named.format(here=tmp_path)}, "others": [named]}
    before = key(**settings)
    assert key(**settings) == before
    Path(changed).write_text("another content")
    assert key(**settings) != before


@pytest.mark.parametrize("named", [".", "{here}", "**/*.jsonl", "out", "{here}/out/*/*.jsonl"])
def test_what_the_pipeline_writes_is_no_input_of_the_directory_that_holds_it(
    named: str, key: Key, tmp_path: Path
) -> None:
    before = key(data=named.format(here=tmp_path))
    for name in ("pipeline.json", "step/d.jsonl", "other/e.jsonl"):
        Path("out", name).write_text("new")
    assert key(data=named.format(here=tmp_path)) == before


def test_a_link_to_the_pipeline_s_directory_is_the_pipeline_s(key: Key, tmp_path: Path) -> None:
    os.symlink(tmp_path, tmp_path.with_name("linked"))
    before = key(data=str(tmp_path.with_name("linked")))
    Path("out/step/d.jsonl").write_text("new")
    assert key(data=str(tmp_path.with_name("linked"))) == before


@pytest.mark.parametrize("setting", [".", "..", "*", "**", "?", "a*"])
def test_what_names_the_directory_that_the_pipeline_is_in_is_a_setting(setting: str, key: Key, tmp_path: Path) -> None:
    before = key(separator=setting)
    (tmp_path / "a.log").write_text("what this run says")
    assert key(separator=setting) == before


def test_the_working_directory_is_an_input_where_the_pipeline_is_elsewhere(
    key: Key, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = Contents(tmp_path / "out" / ".hashes.json")
    monkeypatch.chdir(tmp_path / "data")
    before = step_key("distill", {"data": "."}, tmp_path / "out" / "step", contents)
    Path("a.jsonl").write_text("another content")
    assert step_key("distill", {"data": "."}, tmp_path / "out" / "step", contents) != before


def test_a_file_that_may_not_be_read_is_left_out(key: Key, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.jsonl")
    before = key(file="data/a.jsonl", directory="data")
    Path("data/a.jsonl").write_text("what would change the key if it were read")
    assert key(file="data/a.jsonl", directory="data") == before


@pytest.mark.parametrize(
    ("change", "is_another"),
    [
        ({"teacher_quantization": "int8"}, True),
        ({"model": {"_component_": "llama", "vocab_size": 90}}, True),
        ({"model": {"_component_": "tiny"}}, True),
        ({"model": {"_component_": "lora_llama", "vocab_size": 100, "lora_rank": 4}}, False),
        ({"lr": 0.5}, False),
    ],
)
def test_a_cache_is_known_by_what_it_is_of(change: dict[str, Any], is_another: bool, key: Key) -> None:
    model = {"_component_": "llama", "vocab_size": 100}
    before = {"teacher": "data", "teacher_quantization": None, "model": model, "lr": 1}
    place = (Path("out/step"), Contents(Path("out/.hashes.json")))
    for of in (step_key, adding_key):
        old, new = (of("cache_teacher", settings, *place) for settings in (before, before | change))
        assert (old != new) == is_another


def test_a_text_that_is_no_path_is_a_setting(key: Key) -> None:
    texts = ["a" * 300 + "/" + "b" * 5000, "Who? " * 100, "[" * 300, "\0", "\0*", "/", "", "**", "two\nlines?"]
    keys = {key(prompts=[text]) for text in texts}
    assert len(keys) == len(texts)
