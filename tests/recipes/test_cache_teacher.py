"""A teacher that is asked once: the cache is what the teacher says, whatever happens on the way, or it is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bad_input import snapshot
from caches import ALL, DRAWN, TOP_K, fill, records
from safetensors.torch import load_file, save_file

from kd_recipes.entry import EXIT_BAD_INPUT, EXIT_STOPPED, run_recipe
from kd_recipes.teachers.cache.store import Store
from toy import Toys, distill, logged, run_tune, sentence, text_section, write_jsonl

Fill = Callable[..., Path]


def test_distils_as_from_the_teacher_itself(cached: Fill, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "eval_every_n_steps": 2, "kd_ratio": 0.8}
    distill(cached(ALL, teacher=None, output_dir=str(tmp_path / "online"), **settings))
    config = cached(ALL, **settings)
    fill(config, "check=True")
    recipe = distill(config)
    assert recipe._teacher is not None
    assert recipe._teacher.online is None
    online, found = logged(tmp_path / "online"), logged(tmp_path / "run")
    assert found.keys() == online.keys()
    for step, values in found.items():
        for name, value in values.items():
            if name.split("/")[0] in ("loss", "kd", "quality", "held_out"):
                assert value == pytest.approx(online[step][name], rel=2e-3, abs=2e-3), (step, name)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("encoding", [TOP_K, DRAWN])
def test_what_is_said_of_the_teacher_is_exact(
    encoding: dict[str, Any], temperature: float, cached: Fill, tmp_path: Path
) -> None:
    settings = {"temperature": temperature, "max_steps": 1}
    distill(cached(encoding, teacher=None, output_dir=str(tmp_path / "online"), **settings))
    config = cached(encoding, **settings)
    fill(config)
    distill(config)
    online, found = logged(tmp_path / "online"), logged(tmp_path / "run")
    for name in ("cross_entropy", "accuracy", "entropy", "calibration_error"):
        name = f"held_out/teacher_{name}"
        assert found[0][name] == pytest.approx(online[0][name], abs=2e-3), name
    for name in (
        "kd/teacher_cross_entropy",
        "kd/teacher_entropy",
        "kd/teacher_label_mass",
        "kd/agreement",
        "kd/student_entropy",
    ):
        assert found[1][name] == pytest.approx(online[1][name], rel=5e-3), name


def test_says_what_the_teacher_makes_of_the_labels(
    cached: Fill, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = cached(TOP_K, temperature=2.0)
    fill(config)
    said = capsys.readouterr().out
    distill(cached(TOP_K, teacher=None, output_dir=str(tmp_path / "online"), max_steps=1))
    own = logged(tmp_path / "online")[0]["held_out/teacher_cross_entropy"]
    (found,) = re.findall(r"^eval_dataset: the teacher's cross entropy is ([\d.]+) nats a token", said, re.M)
    assert float(found) == pytest.approx(own, abs=2e-3)
    assert re.search(r"^dataset: the teacher's cross entropy is", said, re.M)


def test_a_cache_serves_any_batch_size_order_and_packing(cached: Fill, tmp_path: Path) -> None:
    config = cached(DRAWN)
    fill(config)
    before = snapshot(tmp_path / "cache")
    fill(config, "batch_size=5", "shuffle=False", "dataset.packed=True", "dataset.split_across_pack=False")
    assert snapshot(tmp_path / "cache").keys() == before.keys()
    packed = ("dataset.packed=True", "dataset.split_across_pack=False")
    distill(config, "batch_size=1", *packed)


def test_adds_only_what_is_missing(cached: Fill, toys: Toys, tmp_path: Path) -> None:
    rows = [{"text": sentence(i)} for i in (0, 1, 0, 2)]
    config = cached(dataset=text_section(write_jsonl(tmp_path / "data.jsonl", rows), toys.data / "cache"))
    fill(config, "~eval_dataset")
    assert len(Store(tmp_path / "cache")) == 3  # a document that is there twice is kept once
    size = (tmp_path / "cache" / "part-00000.data").stat().st_size
    fill(config, "~eval_dataset")
    assert (tmp_path / "cache" / "part-00000.data").stat().st_size == size
    fill(config)
    assert len(Store(tmp_path / "cache")) == 9


def test_two_processes_write_what_one_does(cached: Fill, tmp_path: Path) -> None:
    config = cached(DRAWN)
    fill(config)
    one = records(tmp_path / "cache")
    for share in ("False", "True"):
        words = ("teacher.path=shared", f"shard_teacher={share}")
        command = ("run", "--nproc_per_node", "2", "kd_recipes.cache_teacher", "--config", str(config), *words)
        done = run_tune(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in (tmp_path / "shared").glob("*.data")) == [
            "part-00000.data",
            "part-00001.data",
        ]
        assert records(tmp_path / "shared") == one
        shutil.rmtree(tmp_path / "shared")


@pytest.mark.parametrize("num_kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_cache_that_was_killed_again_and_again_equals_an_unbroken_one(
    num_kills: int, cached: Fill, tmp_path: Path
) -> None:
    config = cached(DRAWN, batch_size=1)
    script = Path(__file__).parent.parent / "teachers" / "kill_often.py"
    done = subprocess.run(
        [sys.executable, str(script), str(config), str(num_kills)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_through_the_command_line(cached: Fill, tmp_path: Path) -> None:
    config = cached(TOP_K)
    done = run_tune("run", "kd_recipes.cache_teacher", "--config", str(config), "check=True", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"30 documents with 434 tokens in .* bytes a token", done.stdout)
    assert re.search(r"eval_dataset: what is stored is \S+ nats a token from what the teacher says", done.stdout)
    assert re.search(r"434 tokens to ask about: some .* MB .* and .* minutes", done.stdout + done.stderr)
    done = run_tune("run", "kd_recipes.distill", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("what texts tell is not watched") == 1


def test_a_flipped_bit_is_found(cached: Fill, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = cached()
    fill(config)
    file = tmp_path / "cache" / "part-00000.data"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run_recipe("cache_teacher", ["--config", str(config), "check=True"]) == EXIT_STOPPED
    assert "its checksum differs" in capfd.readouterr().err
    assert run_recipe("distill", ["--config", str(config), "epochs=1", "~max_steps"]) == EXIT_STOPPED
    assert "its checksum differs" in capfd.readouterr().err


@pytest.fixture
def refused(
    cached: Fill, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    """``refused(encoding, recipe, *overrides)``: what is said of a cache that does not suit, with nothing loaded."""

    def run(encoding: dict[str, Any], *overrides: str, recipe: str = "distill") -> str:
        config = cached(encoding)
        fill(config)
        before = snapshot(tmp_path / "cache")

        def loads(*_: Any, **__: Any) -> None:
            raise AssertionError("weights were loaded")

        monkeypatch.setattr("kd_recipes._torchtune.load_checkpoint", loads)
        capfd.readouterr()
        assert run_recipe(recipe, ["--config", str(config), *overrides]) == EXIT_BAD_INPUT
        assert snapshot(tmp_path / "cache") == before
        return capfd.readouterr().err

    return run


TORCHTUNE_LOSS = "kd_loss._component_=torchtune.modules.loss.ForwardKLLoss"
CASES = [
    (TOP_K, ["temperature=2.0"], "temperature: got 2.0, wanted 1.0"),
    (TOP_K, ["teacher_temperature=2.0"], "teacher_temperature: got 2.0, wanted 1.0"),
    (TOP_K, ["temperature.start=1.0", "temperature.end=2.0"], "temperature: got .*wanted 1.0"),
    (TOP_K, ["health.action=raise_temperature"], "health.action: got 'raise_temperature'"),
    (TOP_K, [TORCHTUNE_LOSS], "kd_loss: got 'ForwardKLLoss', wanted a divergence"),
    (DRAWN, ["kd_loss._component_=kd_recipes.losses.ReverseKL"], "kd_loss: got 'ReverseKL', wanted ForwardKL"),
    (TOP_K, ["feature_losses._component_=kd_recipes.losses.HiddenStates"], "feature_losses"),
    (TOP_K, ["teacher.encoding.k=9"], r"teacher.encoding: got .*9.*wanted that of the cache.*8"),
    (TOP_K, ["teacher.encoding._component_=torch.nn.Identity"], "teacher.encoding: got"),
    (TOP_K, ["teacher.path=nowhere"], "teacher.path: got 'nowhere'.*cache_teacher"),
    (TOP_K, ["model.vocab_size=319"], "model: got"),
    (TOP_K, ["teacher_model.num_layers=2"], "teacher_model.num_layers: got 2, wanted 3"),
    (TOP_K, ["tokenizer.max_seq_len=9"], "dataset: got '.* that are missing, or have other labels'.*cache_teacher"),
]


@pytest.mark.parametrize(("encoding", "overrides", "message"), CASES)
def test_a_cache_that_does_not_suit_is_refused(
    encoding: dict[str, Any], overrides: list[str], message: str, refused: Callable[..., str]
) -> None:
    assert re.search(message, refused(encoding, *overrides))


@pytest.mark.parametrize("recipe", ["distill", "cache_teacher"])
def test_another_teacher_is_refused(recipe: str, refused: Callable[..., str], toys: Toys, tmp_path: Path) -> None:
    other = Path(shutil.copytree(toys.teacher, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    found = refused(TOP_K, f"teacher_checkpointer.checkpoint_dir={other}", recipe=recipe)
    assert "model.safetensors is another one" in found
    shutil.copy(toys.teacher / "model.safetensors", other / "model.safetensors")  # the same in another place
    fill(tmp_path / "config.yaml", f"teacher_checkpointer.checkpoint_dir={other}")


def test_another_tokenizer_is_named(refused: Callable[..., str], toys: Toys, tmp_path: Path) -> None:
    other = Path(shutil.copytree(toys.student, tmp_path / "tokenizer"))
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    for directory in ("tokenizer.path", "checkpointer.checkpoint_dir"):
        found = refused(TOP_K, f"tokenizer.path={other}", f"checkpointer.checkpoint_dir={other}")
        assert re.search(r"tokenizer.path: got \"?'a' is \d+ for the tokenizer and \d+ for the cache", found), directory


def test_no_room_on_the_disk_is_known_after_the_first_batch(
    cached: Fill, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    directory = small_disk(40)
    config = cached(ALL)
    assert run_recipe("cache_teacher", ["--config", str(config), f"teacher.path={directory}/cache"]) == EXIT_BAD_INPUT
    assert "teacher.path: got" in capfd.readouterr().err
    assert os.path.getsize(directory / "cache" / "part-00000.data") == 0


def test_nothing_else_is_written_into(cached: Fill, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.txt").write_text("mine")
    assert run_recipe("cache_teacher", ["--config", str(cached())]) == EXIT_BAD_INPUT
    assert "teacher.path: got" in capfd.readouterr().err
    assert len([*(tmp_path / "cache").iterdir()]) == 1


def test_a_cache_needs_to_be_told_how(cached: Fill, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_recipe("cache_teacher", ["--config", str(cached(None))]) == EXIT_BAD_INPUT
    assert "teacher.encoding: got None" in capfd.readouterr().err


def test_a_distillation_takes_what_it_finds_and_needs_no_teacher_in_its_config(cached: Fill) -> None:
    fill(cached(DRAWN))
    distill(cached(None, teacher_model=None, teacher_checkpointer=None))
