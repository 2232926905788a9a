"""What may be wrong with a cached teacher: it is said, and nothing wrong is kept, or taken for right."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from caches import ALL, DRAWN, TOP_K, fill, records
from safetensors.torch import load_file, save_file
from torchtune.models.qwen2_5._tokenizer import Qwen2_5Tokenizer

from kd_recipes import cache_teacher
from kd_recipes.entry import EXIT_BAD_INPUT, EXIT_STOPPED, run_recipe
from kd_recipes.errors import ConfigError
from kd_recipes.teachers.cache import identity
from kd_recipes.teachers.cache.content import uniform
from kd_recipes.teachers.cache.identity import Identity
from kd_recipes.teachers.cache.store import Store, Writer
from toy import VOCABULARY, Toys, checkpointer_section, distill, hf_config, logged, run_tune, save_model, save_tokenizer

Cached = Callable[..., Path]
Run = Callable[..., str]
WITHOUT_STUDENT = ("~model", "~checkpointer")


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """``run(recipe, config, *overrides, status)``: what is said on stderr by a recipe that ends with that status."""

    def ends(recipe: str, config: Path, *overrides: str, status: int = EXIT_BAD_INPUT) -> str:
        capfd.readouterr()
        assert run_recipe(recipe, ["--config", str(config), *overrides]) == status
        return capfd.readouterr().err

    return ends


def _teacher(toys: Toys, directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    """The override that makes a changed copy the teacher."""
    shutil.copytree(toys.teacher, directory)
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return f"teacher_checkpointer.checkpoint_dir={directory}"


def _break(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"][3] = torch.nan


# --------------------------------------------------------------------------------------------------- what is kept
@pytest.mark.parametrize("encoding", [TOP_K, DRAWN])
def test_a_teacher_of_nan_is_not_kept_and_leaves_room_for_the_right_one(
    encoding: dict[str, Any], cached: Cached, run: Run, toys: Toys, tmp_path: Path
) -> None:
    config = cached(encoding)
    broken = _teacher(toys, tmp_path / "broken", _break)
    assert "logits are nan or inf at" in run("cache_teacher", config, broken, "temperature=2.0", status=EXIT_STOPPED)
    assert len(Store(tmp_path / "cache")) == 0
    fill(config)
    there = Identity.load(tmp_path / "cache")
    assert there is not None
    assert there.temperature == 1.0
    assert "teacher_checkpointer.checkpoint_dir" in run("cache_teacher", config, broken)


def test_a_teacher_that_has_become_nan_does_not_pass_the_check(
    cached: Cached, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached()
    fill(config)
    forward = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: torch.nan * forward(*args))
    assert "is nan at" in run("cache_teacher", config, "check=True", status=EXIT_STOPPED)


def test_an_empty_cache_beside_something_else_is_left_alone(
    cached: Cached, run: Run, toys: Toys, tmp_path: Path
) -> None:
    config = cached()
    run("cache_teacher", config, _teacher(toys, tmp_path / "broken", _break), status=EXIT_STOPPED)
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    assert "teacher.path: got" in run("cache_teacher", config)
    assert (tmp_path / "cache" / "mine.txt").read_text() == "mine"


def test_an_empty_cache_that_another_process_is_about_to_write_to_is_left_alone(
    cached: Cached, run: Run, toys: Toys, tmp_path: Path
) -> None:
    config = cached()
    run("cache_teacher", config, _teacher(toys, tmp_path / "broken", _break), status=EXIT_STOPPED)
    other = Writer(tmp_path / "cache", 0)
    assert "wanted a cache that no other process is writing to" in run("cache_teacher", config)
    other.close()
    fill(config)


def test_no_process_can_add_to_an_empty_cache_while_it_is_replaced(
    cached: Cached, run: Run, toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = cached()
    run("cache_teacher", config, _teacher(toys, tmp_path / "broken", _break), status=EXIT_STOPPED)
    write = identity.write_json

    def writes(*args: Any) -> None:
        with pytest.raises(ConfigError, match="no other process"):
            Writer(tmp_path / "cache", 0)
        write(*args)

    monkeypatch.setattr(identity, "write_json", writes)
    fill(config)


def test_a_cache_that_another_one_has_taken_the_place_of_is_not_written_to(
    cached: Cached, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, look = cached(), cache_teacher._look_for_damage

    def looks(job: Any) -> None:
        look(job)
        _edit(tmp_path / "cache", temperature=2.0)

    monkeypatch.setattr(cache_teacher, "_look_for_damage", looks)
    assert "wanted a cache that no other process is writing to" in run("cache_teacher", config)
    assert len(Store(tmp_path / "cache")) == 0


# ------------------------------------------------------------------------------------------------- whose it is
def _binary(toys: Toys, directory: Path, offset: float) -> str:
    shutil.copytree(toys.teacher, directory)
    weights = {name: tensor + offset for name, tensor in load_file(directory / "model.safetensors").items()}
    (directory / "model.safetensors").unlink()
    torch.save(weights, directory / "pytorch_model.bin")
    return f"teacher_checkpointer.checkpoint_dir={directory}"


@pytest.mark.parametrize("recipe", ["distill", "cache_teacher"])
def test_another_teacher_in_another_format_is_refused(
    recipe: str, cached: Cached, run: Run, toys: Toys, tmp_path: Path
) -> None:
    config = cached(**{"teacher_checkpointer.checkpoint_files": ["pytorch_model.bin"]})
    fill(config, _binary(toys, tmp_path / "one", 0.0))
    assert "pytorch_model.bin is another one" in run(recipe, config, _binary(toys, tmp_path / "other", 1e-3))


@pytest.mark.parametrize("recipe", ["distill", "cache_teacher"])
def test_another_file_of_the_same_directory_is_refused(
    recipe: str, cached: Cached, run: Run, toys: Toys, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(toys.teacher, tmp_path / "teacher"))
    weights = load_file(own / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, own / "other.safetensors", {"format": "pt"})
    config = cached(**{"teacher_checkpointer.checkpoint_dir": str(own)})
    fill(config)
    said = run(recipe, config, "teacher_checkpointer.checkpoint_files=[other.safetensors]")
    assert "of which model.safetensors is not read" in said
    run(recipe, config, "teacher_checkpointer.checkpoint_files={filename_format: m-{}-{}, max_filename: last}")
    (own / "other.safetensors").unlink()  # what is not read is of no account
    fill(config)


@pytest.mark.parametrize("recipe", ["distill", "cache_teacher"])
def test_a_cache_of_format_1_may_name_files_that_are_not_read(
    recipe: str, cached: Cached, run: Run, toys: Toys, tmp_path: Path
) -> None:
    config = cached()
    fill(config)
    there = Identity.load(tmp_path / "cache")
    assert there is not None
    more = {**there.weights, "other.safetensors": {"bytes": 1, "sha256": "0"}}
    _edit(tmp_path / "cache", weights=more, stamps={})
    assert "of which other.safetensors is not read" in run(recipe, config)
    _edit(tmp_path / "cache", format=1)
    changed = _teacher(toys, tmp_path / "other", lambda weights: weights["model.norm.weight"].add_(1e-3))
    assert "model.safetensors is another one" in run(recipe, config, changed)
    run(recipe, config, status=0)


def test_a_cache_that_knows_no_file_of_its_teacher_is_refused(cached: Cached, run: Run, tmp_path: Path) -> None:
    config = cached()
    fill(config)
    _edit(tmp_path / "cache", weights={})
    assert "teacher.path: got" in run("distill", config)


# --------------------------------------------------------------------------------------------------- the student
def test_a_student_that_is_yet_to_be_made_can_be_left_out(cached: Cached, run: Run) -> None:
    config = cached()
    said = run("cache_teacher", config, "checkpointer.checkpoint_dir=nowhere")
    assert re.search(r"checkpointer.checkpoint_dir: got 'nowhere'.*left out: ~model ~checkpointer", said)
    said = run("cache_teacher", config, "checkpointer.checkpoint_files=[gone.safetensors]")
    assert "checkpointer.checkpoint_files: got 'gone.safetensors'" in said
    fill(config, *WITHOUT_STUDENT)


def test_a_student_of_more_ids_than_the_cache_learns_as_from_the_teacher_itself(
    cached: Cached, toys: Toys, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    save_model(student, vocab_size=VOCABULARY + 32)
    save_tokenizer(student)
    settings: dict[str, Any] = {
        "kd_loss": {"_component_": "kd_recipes.losses.ReverseKL"},
        "checkpointer": checkpointer_section(student),
        "model.vocab_size": hf_config(student)["vocab_size"],
    }
    distill(cached(ALL, teacher=None, output_dir=str(tmp_path / "online"), **settings))
    config = cached(ALL, **settings)
    fill(config, *WITHOUT_STUDENT)
    distill(config)
    online, found = logged(tmp_path / "online"), logged(tmp_path / "run")
    for name in ("loss/total", "kd/reverse_kl"):
        assert found[1][name] == pytest.approx(online[1][name], rel=2e-3), name


def test_ids_are_counted_without_a_vocab_size(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = Qwen2_5Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert cache_teacher._size_of(tokenizer).num_rows == 151_665
    with pytest.raises(ConfigError, match="wanted one with a vocab_size"):
        cache_teacher._size_of(SimpleNamespace())


# --------------------------------------------------------------------------------------------------------- damage
def _edit(cache: Path, **values: Any) -> None:
    content = json.loads((cache / "cache.json").read_text())
    (cache / "cache.json").write_text(json.dumps({**content, **values}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty data": (lambda cache: (cache / "part-00000.data").write_bytes(b""), "is shorter than"),
    "no data": (lambda cache: (cache / "part-00000.data").unlink(), "is shorter than"),
    "no encoding": (lambda cache: _edit(cache, encoding={}), "teacher.path: got .*a cache.json that can be read"),
    "no k": (lambda cache: _edit(cache, encoding={"kind": "TopK", "depth": 8}), "a cache.json that can be read"),
    "no number": (lambda cache: _edit(cache, num_ids=None), "a cache.json that can be read"),
    "no mapping": (lambda cache: _edit(cache, weights=7), "a cache.json that can be read"),
    "other format": (lambda cache: _edit(cache, format=3), "teacher.path: got .*format 3"),
}


@pytest.mark.parametrize("recipe", ["distill", "cache_teacher"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_directory_is_said_to_be(
    damage: str, recipe: str, cached: Cached, tmp_path: Path, capfd: Any
) -> None:
    config = cached()
    fill(config)
    break_it, message = DAMAGE[damage]
    break_it(tmp_path / "cache")
    capfd.readouterr()
    assert run_recipe(recipe, ["--config", str(config)]) in (EXIT_BAD_INPUT, EXIT_STOPPED)
    said = capfd.readouterr().err
    assert re.search(message, said)
    assert said.count("  - ") == 1


def test_files_of_other_names_are_no_parts(cached: Cached, tmp_path: Path) -> None:
    config = cached()
    fill(config)
    (tmp_path / "cache" / "part-zz.index").write_text("mine")
    fill(config)


@pytest.mark.parametrize("recipe", ["distill", "cache_teacher"])
def test_a_path_below_a_file_is_refused(recipe: str, cached: Cached, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "teacher.path: got" in run(recipe, cached(), f"teacher.path={tmp_path}/file/cache")


def _damage_some(cache: Path) -> dict[bytes, bytes]:
    """Damage two of 30 records in one part; returns all of them as they were."""
    store, data = Store(cache), cache / "part-00000.data"
    whole = records(cache)
    content = bytearray(data.read_bytes())
    for key in list(whole)[3::20]:
        entry = store.find(key)
        assert entry is not None
        content[entry.offset + entry.size // 2] ^= 1
    data.write_bytes(content)
    return whole


def test_all_damage_is_listed_and_mended(cached: Cached, run: Run, tmp_path: Path, capfd: Any) -> None:
    config = cached(DRAWN)
    fill(config)
    cache = tmp_path / "cache"
    whole = _damage_some(cache)
    said = run("cache_teacher", config, "--check", status=EXIT_STOPPED)
    assert said.count("its checksum differs") == 2
    fill(config)
    assert "2 records in " in capfd.readouterr().out
    assert records(cache) == whole
    fill(config, "--check")


def test_two_processes_list_and_mend_all_damage(cached: Cached, tmp_path: Path) -> None:
    config = cached(DRAWN)
    fill(config)
    whole = _damage_some(tmp_path / "cache")
    command = ("run", "--nproc_per_node", "2", "kd_recipes.cache_teacher", "--config", str(config))
    said = run_tune(*command, "check=True", cwd=tmp_path)
    assert said.returncode != 0
    assert said.stderr.count("is damaged at byte") >= 2
    done = run_tune(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 records in ") == 1
    assert records(tmp_path / "cache") == whole


# ------------------------------------------------------------------------------------------------------ the check
def test_ids_that_were_drawn_wrong_do_not_pass_the_check(
    cached: Cached, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Any
) -> None:
    config = cached(DRAWN)
    fill(config, "--check")
    assert re.search(
        r"eval_dataset: .* drawn from what is at a squared distance of \S+ \+- \S+ ", capfd.readouterr().out
    )
    monkeypatch.setattr("kd_recipes.teachers.cache.fill.uniform", lambda *args: 0.5 * uniform(*args))
    said = run("cache_teacher", config, "--check", f"teacher.path={tmp_path}/wrong", status=EXIT_STOPPED)
    assert "the ids were not drawn from what the teacher says" in said


def test_check_is_a_key_of_the_recipe_alone(cached: Cached, run: Run) -> None:
    assert "check: got 'check', wanted a known key" in run("distill", cached(), "--check")


@pytest.mark.parametrize("k", ["8.7", "True", "'8'", "0"])
def test_a_number_of_ids_is_a_whole_number(k: str, cached: Cached, run: Run) -> None:
    said = run("cache_teacher", cached(), f"teacher.encoding.k={k}")
    assert re.search(r"teacher.encoding.k: got .*wanted a whole number", said)


def test_a_setting_that_an_encoding_lacks_is_named_once(cached: Cached, run: Run) -> None:
    assert "  - teacher.encoding: got" in run("cache_teacher", cached(), "teacher.encoding.depth=1")
