"""What an export's directory holds stays until what is asked for is there; what somebody has put there stays at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd_recipes.errors import ConfigError
from kd_recipes.exporting.formats import FORMATS, Format
from kd_recipes.exporting.record import Record

HF, GGUF, GRAPH = (FORMATS[name] for name in ("hf", "gguf_f16", "torch_export"))


def write(out: Path, form: Format, text: str) -> None:
    path = out / form.path
    if form is HF:
        path.mkdir(exist_ok=True)
        path /= "model.safetensors"
    path.write_text(text)


def content(out: Path) -> dict[str, str]:
    return {path.relative_to(out).as_posix(): path.read_text() for path in sorted(out.rglob("*")) if path.is_file()}


def opened(out: Path, student: str = "a") -> Record:
    record = Record.read(out, {"student": student}, {})
    record.settle()
    return record


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An export of the student ``a`` in two formats."""
    out = tmp_path / "out"
    record = opened(out)
    for form in (HF, GGUF):
        write(out, form, "a")
        record.add(form)
        record.measure(form, {"kl": 0}, {})
    record.finish("of a")
    return out


def test_nothing_changes_until_there_is_a_file_of_another_student(out: Path) -> None:
    before = content(out)
    record = opened(out, "b")
    assert not record.holds(HF)
    assert not record.results
    assert record.make_room(HF) == out / "hf"
    assert content(out) == before  # the writer has failed
    assert opened(out).holds(HF)
    assert opened(out).results.keys() == {"hf", "gguf_f16", "student"}


def test_what_was_not_asked_for_is_removed_at_the_end_though_it_was_cut_off(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = opened(out, "b")
    write(out, HF, "b")
    record.add(HF)
    assert content(out).keys() == {"export.json", "f16.gguf", "hf/model.safetensors"}  # the old table would mislead
    record = opened(out, "b")
    assert record.holds(HF)
    assert not record.holds(GGUF)
    record.finish("of b")
    assert content(out).keys() == {"export.json", "export.md", "hf/model.safetensors"}
    assert f"{out / 'f16.gguf'} removed: it is of another student" in capsys.readouterr().out
    assert opened(out, "b").stale == {}


def test_of_three_students_in_a_row_each_file_is_known(out: Path) -> None:
    record = opened(out, "b")
    write(out, GRAPH, "b")
    record.add(GRAPH)
    record = opened(out, "c")
    assert record.stale.keys() == {"hf", "gguf_f16", "torch_export"}
    write(out, GGUF, "c")
    record.add(GGUF)
    record.finish("of c")
    assert content(out).keys() == {"export.json", "export.md", "f16.gguf"}


@pytest.mark.parametrize("form", [HF, GGUF])
@pytest.mark.parametrize("is_asked", [True, False])
def test_what_was_moved_away_and_linked_to_is_left_where_it_is(
    form: Format, is_asked: bool, out: Path, tmp_path: Path
) -> None:
    (out / form.path).rename(tmp_path / "elsewhere")
    (out / form.path).symlink_to(tmp_path / "elsewhere")
    assert opened(out).holds(form)
    record = opened(out, "b")
    if is_asked:
        assert not record.make_room(form).exists()
    record.finish("of b")
    assert (out / f"{form.path}.kept-1").resolve() == tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere").exists()


def test_a_record_of_an_early_version_lists_no_file(tmp_path: Path) -> None:
    write(tmp_path, HF, "early")
    (tmp_path / "export.json").write_text(json.dumps({"made_of": {"stamps": {}}, "formats": {"hf": {}}}))
    record = opened(tmp_path)
    assert not record.results
    record.make_room(HF)
    assert (tmp_path / "hf.kept-1" / "model.safetensors").read_text() == "early"


@pytest.mark.parametrize("text", ["[]", "{}", "1", '{"made_of": {}, "formats": {}, "files": []}'])
def test_what_is_no_record_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text(text)
    with pytest.raises(ConfigError, match="the record of an export"):
        opened(tmp_path)
