"""Several teachers in a run: the command that a user types, what it reports, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import Rejected
from omegaconf import OmegaConf

from kd_recipes.batch import Batch
from kd_recipes.teachers import Mixture
from toy import (
    Toys,
    checkpointer_section,
    distill,
    hf_config,
    logged,
    model_section,
    prepare,
    run_tune,
    save_tokenizer,
    text_section,
)

WriteConfig = Callable[..., Path]


def _member(checkpoint: Path, **settings: Any) -> dict[str, Any]:
    section = {"model": model_section(hf_config(checkpoint)), "checkpointer": checkpointer_section(checkpoint)}
    return {**section, **settings}


def _section(toys: Toys, **settings: Any) -> dict[str, Any]:
    teachers = {"large": _member(toys.teacher), "wide": _member(toys.wide)}
    return {"_component_": "kd_recipes.teachers.Mixture", "teachers": teachers, **settings}


@pytest.fixture
def mixed(toys: Toys, write_config: WriteConfig, tmp_path: Path) -> Callable[..., Path]:
    """``mixed(weights=…, **{"max_steps": …})``: a config with two teachers in the place of ``teacher_model``."""

    def write(*, weights: Any = None, by_likelihood: bool = False, **settings: Any) -> Path:
        teacher = _section(toys, weights=weights, by_likelihood=by_likelihood)
        held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache")
        absent = {"teacher_model": None, "teacher_checkpointer": None}
        return write_config(tmp_path, **{**absent, "teacher": teacher, "eval_dataset": held_out, **settings})

    return write


def test_a_run_reports_each_teacher(mixed: Callable[..., Path], tmp_path: Path) -> None:
    config = mixed(weights={"large": 3, "wide": 1})
    done = run_tune("run", "kd_recipes.distill", "--config", str(config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = logged(tmp_path / "run")
    for values in (found[1], found[2]):
        assert values["kd/teacher_large/weight"] == pytest.approx(0.75)
        assert values["kd/teacher_wide/weight"] == pytest.approx(0.25)
        alone = [values[f"kd/teacher_{name}/cross_entropy"] for name in ("large", "wide")]
        # a mixture's is no more than the mean of theirs, by Jensen's inequality
        assert min(alone) - 1.5 < values["kd/teacher_cross_entropy"] < 0.75 * alone[0] + 0.25 * alone[1]
    for name in ("large", "wide"):
        assert {f"held_out/teacher_{name}/{value}" for value in ("kl", "cross_entropy", "weight")} <= found[2].keys()
    records = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert any("teacher_wide/kl" in record["values"] for record in records if record["split"] == "held_out")


@pytest.mark.parametrize("by_likelihood", [False, True])
def test_one_teacher_twice_is_that_teacher(
    by_likelihood: bool, mixed: Callable[..., Path], toys: Toys, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": 3, "temperature": 2.0, "optimizer": {"_component_": "torch.optim.SGD"}}
    settings["optimizer"]["lr"] = 0.1
    twice = _section(toys, teachers=dict.fromkeys("ab", _member(toys.teacher)), by_likelihood=by_likelihood)
    distill(mixed(**settings, teacher=twice))
    alone = _member(toys.teacher)
    models = {"teacher": None, "teacher_model": alone["model"], "teacher_checkpointer": alone["checkpointer"]}
    distill(mixed(**settings, **models, output_dir=str(tmp_path / "alone")))
    found, expected = logged(tmp_path / "run"), logged(tmp_path / "alone")
    for step, values in expected.items():
        for name, value in values.items():
            if name.split("/")[0] in ("loss", "kd", "quality", "held_out", "health"):
                assert found[step][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, name)


def test_by_likelihood_the_better_teacher_of_a_token_gets_more_of_it(
    mixed: Callable[..., Path], tmp_path: Path
) -> None:
    distill(mixed(by_likelihood=True, max_steps=1))
    values = logged(tmp_path / "run")[1]
    weights = {name: values[f"kd/teacher_{name}/weight"] for name in ("large", "wide")}
    losses = {name: values[f"kd/teacher_{name}/cross_entropy"] for name in ("large", "wide")}
    assert sum(weights.values()) == pytest.approx(1)
    assert max(weights, key=weights.__getitem__) == min(losses, key=losses.__getitem__)
    assert weights["large"] != pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_weights_by_data_set(packed: bool, mixed: Callable[..., Path], toys: Toys) -> None:
    text = text_section(toys.data / "text.jsonl", toys.data / "cache", packed=packed)
    held_out = text_section(toys.data / "held_out.jsonl", toys.data / "cache", packed=packed)
    weights = [{"large": 1, "wide": 0}, {"large": 1, "wide": 3}]
    recipe = prepare(mixed(weights=weights, dataset=[text, held_out], eval_dataset=[held_out, held_out], batch_size=3))
    sizes = [len(part) for part in recipe._loader._order.dataset._whole._datasets]
    seen = []
    for batch in recipe._loader.batches():
        assert recipe._teacher is not None
        assert batch.sources_B is not None
        signal = recipe._teacher.signal(batch)
        weights_BSM = signal.log_weights_TM.exp().unflatten(0, batch.tokens_BS.shape)
        for source, weights_SM in zip(batch.sources_B.tolist(), weights_BSM, strict=True):
            expected = torch.tensor([[1.0, 0.0], [0.25, 0.75]][source])
            torch.testing.assert_close(weights_SM, expected.expand_as(weights_SM))
            seen.append(source)
    drop = len(seen) % 3
    assert abs(seen.count(0) - sizes[0]) <= 2 + drop
    assert seen.count(1) >= sizes[1] - 2
    recipe.cleanup()


def test_the_heaviest_writes_texts_and_all_are_counted(mixed: Callable[..., Path]) -> None:
    recipe = prepare(mixed(weights={"large": 1e39, "wide": 2e39}))  # beyond float32; their shares are not
    assert recipe._teacher is not None
    large, wide = recipe._teacher.models
    assert recipe._teacher.online is not None
    assert recipe._teacher.online.model is wide
    sizes = [sum(p.numel() for p in model.parameters()) * 4 for model in (large, wide)]
    assert recipe._sizes()["teacher"] == sum(sizes)
    recipe.cleanup()


def test_two_processes_do_what_one_does(mixed: Callable[..., Path], tmp_path: Path) -> None:
    config = mixed(
        weights={"large": 1, "wide": 2},
        by_likelihood=True,
        **{"optimizer": {"_component_": "torch.optim.SGD", "lr": 0.1}, "batch_size": 4},
    )
    distill(config)
    words = ("batch_size=2", f"output_dir={tmp_path / 'two'}")
    done = run_tune("run", "--nproc_per_node", "2", "kd_recipes.distill", "--config", str(config), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = logged(tmp_path / "run"), logged(tmp_path / "two")
    for step, values in one.items():
        for name, value in values.items():
            if name.split("/")[0] in ("loss", "kd", "quality", "held_out"):
                assert two[step][name] == pytest.approx(value, rel=1e-3, abs=1e-4), (step, name)


# ---------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"large": 1}}, "teacher.weights: got ['large'], wanted a number for each of large, wide"),
        ({"weights": {"large": 1, "wide": -1}}, "teacher.weights.wide: got -1, wanted a number from 0"),
        (
            {"weights": {"large": 1e200, "wide": 1}},
            "teacher.weights.large: got 1e+200, wanted a number from 0 to 1e+100",
        ),
        ({"weights": {"large": 0, "wide": 0}}, "wanted a number above 0 among them"),
        ({"weights": "by_likelihood"}, "teacher.weights: got 'by_likelihood', wanted a number for each of large, wide"),
        ({"weights": []}, "teacher.weights: got [], wanted some"),
        ({"weights": [{"large": 1, "wide": 1}] * 2}, "teacher.weights: got 'a list of 2', wanted 1, one for each data"),
        ({"teachers": {}}, "teacher.teachers: got {}, wanted names"),
        ({"teachers": {"a b": {"model": {}}}}, "teacher.teachers.a b: got 'a b', wanted a name of letters"),
        ({"teachers": {"a": {"model": {}}}}, "teacher.teachers.a.checkpointer: got None, wanted a section"),
        (
            {"teachers": {"a": {"_component_": "kd_recipes.teachers.CachedTeacher", "path": "x"}}},
            "What a cache has kept of a distribution cannot be mixed",
        ),
    ],
)
def test_settings_that_make_no_mixture(settings: dict[str, Any], message: str, toys: Toys, rejected: Rejected) -> None:
    assert message in rejected(teacher=_section(toys, **settings), **{"eval_dataset": None})


def test_a_misspelt_setting_of_a_teacher_is_named(toys: Toys, rejected: Rejected) -> None:
    teachers = {"large": _member(toys.teacher, quantisation="int8")}
    found = rejected(teacher=_section(toys, teachers=teachers))
    assert "teacher.teachers.large.quantisation: got 'quantisation'" in found
    assert "Did you mean `quantization`?" in found


def test_feature_losses_and_losses_of_torchtunes_are_refused(toys: Toys, rejected: Rejected) -> None:
    feature = [{"_component_": "kd_recipes.losses.HiddenStates"}]
    assert "none with a `teacher` section" in rejected(teacher=_section(toys), feature_losses=feature)
    theirs = {"_component_": "torchtune.modules.loss.ForwardKLWithChunkedOutputLoss"}
    assert "torchtune's need the logits of one teacher" in rejected(teacher=_section(toys), kd_loss=theirs)


def test_the_files_of_every_teacher_are_looked_at(toys: Toys, rejected: Rejected, tmp_path: Path) -> None:
    copy = shutil.copytree(toys.wide, tmp_path / "copy")
    save_tokenizer(copy, vocab_size=300)
    found = rejected(teacher=_section(toys, teachers={"large": _member(toys.teacher), "wide": _member(copy)}))
    assert "teacher.teachers.wide.checkpointer.checkpoint_dir: got" in found
    assert "the same token-to-id map for student and teacher" in found
    (copy / "model.safetensors").unlink()
    found = rejected(teacher=_section(toys, teachers={"wide": _member(copy)}))
    assert "teacher.teachers.wide.checkpointer.checkpoint_files: got 'model.safetensors'" in found
    wrong = _member(toys.teacher)
    wrong["model"] = {**wrong["model"], "num_layers": 7}
    found = rejected(teacher=_section(toys, teachers={"large": wrong}))
    assert "teacher.teachers.large.model: got" in found
    assert "Its layers: 3 in the file, 7 in" in found
    found = rejected(teacher=_section(toys, teachers={"wide": _member(toys.wide, device="cuda:77")}))
    assert "teacher.teachers.wide.device: got 'cuda:77'" in found


def test_a_batch_without_its_source_is_no_silent_guess(toys: Toys) -> None:
    weights = [{"large": 1, "wide": 0}, {"large": 0, "wide": 1}]
    source = Mixture(OmegaConf.create(_section(toys)["teachers"]), weights)
    assert list(source.models()) == [".teachers.large", ".teachers.wide"]
    from kd_recipes.teachers.mixture import MixedTeachers

    teacher = MixedTeachers({"large": None, "wide": None}, torch.eye(2), False)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="which one they are of"):
        teacher.signal(Batch(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)))
